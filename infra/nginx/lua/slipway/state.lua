-- The document in force: who is served by which version, and where the replicas of each version listen.
--   {"routing": {"champion": "4", "canary": null, "canary_weight": 0},
--    "deployments": {"4": {"replicas": [{"name": "ranker-4-1", "port": 18100, "serving": true, "pool": "cpu"}, ...]}, ...},
--    "pools": {"realtime": ["cpu", "gpu"], "batch": null, "prices": {"cpu": 0.1, "gpu": 0.9},
--              "low_rps": 100, "high_rps": 500, "dwell_s": 60}}      without it all replicas are one pool
-- `sent_s` beside them: when it was sent, of a clock that all senders share; the file that is restored has none.
-- It lies as text in a shared dict with a generation beside it; a worker decodes it anew when the generation moves.
local cjson = require "cjson.safe"
local health = require "slipway.health"
local metrics = require "slipway.metrics"

local dict = ngx.shared.slipway_state
local M = {}
local seen, current = nil, nil

local function text(value)
    return type(value) == "string" and value or nil
end

local function pools_in(given)
    if type(given) ~= "table" then
        return { realtime = {}, prices = {} }
    end
    assert(#given.realtime <= 2, "pools: two for realtime requests at most")
    local names = { unpack(given.realtime) }
    names[#names + 1] = text(given.batch)
    for _, name in ipairs(names) do
        assert(type(given.prices[name]) == "number", "pools: no price of " .. name)
    end
    return { realtime = given.realtime, batch = text(given.batch), prices = given.prices, low_rps = given.low_rps,
        high_rps = given.high_rps, dwell_s = given.dwell_s }
end

-- Turn the document into what a request needs, or say why it is no document.
local function compile(document)
    if type(document) ~= "table" or type(document.routing) ~= "table" or type(document.deployments) ~= "table" then
        return nil, "the state must hold routing and deployments"
    end
    local weight = document.routing.canary_weight
    if type(weight) ~= "number" or weight < 0 or weight > 1 then
        return nil, "routing.canary_weight must lie in 0..1"
    end
    local versions, pools_of = {}, {}
    for version, deployment in pairs(document.deployments) do
        local addresses, by_pool = {}, {}
        for _, replica in ipairs(deployment.replicas) do
            if replica.serving then
                local address, pool = "127.0.0.1:" .. replica.port, replica.pool or ""
                addresses[#addresses + 1] = address
                by_pool[pool] = by_pool[pool] or {}
                table.insert(by_pool[pool], address)
            end
        end
        versions[version], pools_of[version] = addresses, by_pool
    end
    return {
        champion = text(document.routing.champion),
        canary = text(document.routing.canary),
        weight = weight,
        versions = versions,
        pools = pools_in(document.pools),
        pools_of = pools_of,
        routed = document.routed or ngx.now(),
        sent_s = document.sent_s or 0,
    }
end

-- Put a document in force: every request that begins after this returns is routed by it.
function M.replace(body)
    local document, problem = cjson.decode(body or "")
    if not document then
        return nil, "not JSON: " .. problem
    end
    local ok, state
    ok, state, problem = pcall(compile, document)
    if not ok then
        return nil, state
    end
    if not state then
        return nil, problem
    end
    local before = M.get()
    if before and document.sent_s and document.sent_s < before.sent_s then
        return nil, "it was sent before the one in force"
    end
    for version, addresses in pairs(state.versions) do
        health.welcome(addresses, before and before.versions[version] or {})
    end
    metrics.keep(state.versions)
    for _, track in ipairs({ "champion", "canary" }) do
        if state[track] then
            metrics.welcome(state[track], track)
        end
    end
    local stored, why = dict:safe_set("document", body)
    if not stored then
        return nil, why
    end
    dict:incr("generation", 1, 0)
    return true
end

-- The state in force, decoded.
function M.get()
    local generation = dict:get("generation")
    if generation ~= seen then
        current = compile(cjson.decode(dict:get("document")))
        seen = generation
    end
    return current
end

-- At the start: the document that the platform keeps in a file. Without one, nobody is served yet.
function M.restore(path)
    local file = io.open(path, "rb")
    local body = file and file:read("*a")
    if file then
        file:close()
    end
    local ok, problem = M.replace(body or '{"routing": {"canary_weight": 0}, "deployments": {}}')
    if not ok then
        error(path .. ": " .. problem)
    end
end

return M
