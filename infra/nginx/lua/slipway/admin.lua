-- What the gateway says about itself: to the platform over the admin socket, to people at `/`, to clients in errors.
local cjson = require "cjson.safe"
local clients = require "slipway.clients"
local health = require "slipway.health"
local state = require "slipway.state"
local switch = require "slipway.switch"

local M = {}

local REASONS = {
    [400] = "malformed HTTP request, or plain HTTP to a port that speaks TLS",
    [404] = "no such path: the service answers under /v1 and /v2",
    [405] = "method not allowed",
    [408] = "the request did not become whole in time",
    [429] = "more requests than this client may send, at once or in a second; try again in a moment",
    [502] = "every replica that was tried failed; try again in a moment",
    [503] = "no replica can take the request now; try again in a moment",
    [504] = "no replica answered in time; try again in a moment",
}

local function answer(value)
    ngx.header.content_type = "application/json"
    ngx.say((cjson.encode(value):gsub("\\/", "/"))) -- cjson escapes slashes, which people would have to read
end

local function put(replace)
    ngx.req.read_body()
    local ok, problem = replace(ngx.req.get_body_data())
    ngx.status = ok and 200 or 400
    return answer(ok and { ok = true } or { error = problem })
end

-- PUT: put another set of tokens in force.
function M.tokens()
    if ngx.req.get_method() ~= "PUT" then
        ngx.status = 405
        return answer({ error = "PUT" })
    end
    return put(clients.replace)
end

-- GET: the state in force with the health of every replica. PUT: put another one in force.
function M.state()
    local method = ngx.req.get_method()
    if method == "PUT" then
        return put(state.replace)
    elseif method ~= "GET" then
        ngx.status = 405
        return answer({ error = "GET or PUT" })
    end
    local now, replicas = state.get(), {}
    for _, addresses in pairs(now.versions) do
        for _, address in ipairs(addresses) do
            replicas[address] = { ready = health.is_ready(address), in_flight = health.in_flight(address) }
        end
    end
    return answer({
        champion = now.champion or cjson.null,
        canary = now.canary or cjson.null,
        canary_weight = now.weight,
        replicas = replicas,
        rate_rps = switch.rate(),
        pools = setmetatable(switch.figures(now), cjson.array_mt),
    })
end

function M.welcome()
    local now = state.get()
    answer({
        service = "slipway",
        champion = now.champion or cjson.null,
        canary = now.canary or cjson.null,
        canary_weight = now.canary and now.weight or 0,
        endpoints = { "/v1/... as the workload has it: any other path under /v1 names it", "/v1/feedback", "/v2/health/ready", "/v2/models/NAME/infer" },
    })
end

function M.explain(max_body_bytes)
    local code, reason = tonumber(ngx.var.slipway_code) or ngx.status, ngx.var.slipway_reason
    ngx.status = code
    if code == 401 then
        ngx.header["WWW-Authenticate"] = 'Bearer realm="slipway"'
            .. (ngx.var.http_authorization and ', error="invalid_token"' or "")
    elseif code == 405 then -- of nginx itself, which traces nothing; a replica names the methods of its path
        ngx.header["Allow"] = "GET, HEAD, POST, DELETE"
    elseif code == 429 then
        ngx.header["Retry-After"] = 1
    end
    if not reason or reason == "" then
        reason = code == 413 and ("the body is larger than " .. max_body_bytes .. " bytes")
            or REASONS[code] or "the gateway could not answer"
    end
    answer({ error = reason })
end

return M
