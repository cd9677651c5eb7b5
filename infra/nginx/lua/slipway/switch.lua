-- The rate of realtime requests, over all workers, and the switch between their pools that follows it (pools.lua).
local health = require "slipway.health"
local pools = require "slipway.pools"

local dict = ngx.shared.slipway_health
local M = {}

local WINDOW_S = 5              -- of whole seconds: a burst of one second is no reason to switch
local EVERY_S = 0.25

-- A realtime request came.
function M.count()
    dict:incr("rate|" .. math.floor(ngx.now()), 1, 0, WINDOW_S + 2)
end

function M.rate()
    local now, sum = math.floor(ngx.now()), 0
    for second = now - WINDOW_S, now - 1 do
        sum = sum + (dict:get("rate|" .. second) or 0)
    end
    return sum / WINDOW_S
end

local function load()
    local wanted = dict:get("pool|wanted")
    if not wanted then
        return pools.start(ngx.now())
    end
    return { wanted = wanted, weight = M.weight(), at = dict:get("pool|at"), calm = dict:get("pool|calm") }
end

-- Share of the second realtime pool (0..1).
function M.weight()
    return dict:get("pool|weight") or 0
end

-- Has a pool a ready replica of the version that most users get?
local function is_ready(now, name)
    local of_version = now.pools_of[now.champion or now.canary] or {}
    for _, address in ipairs(of_version[name] or {}) do
        if health.is_ready(address) then
            return true
        end
    end
    return false
end

local function tick(premature, get_state)
    local now = not premature and get_state()
    local names = now and now.pools.realtime
    if not names or not names[2] then
        return
    end
    local before = load()
    local ready = { is_ready(now, names[1]), is_ready(now, names[2]) }
    local after = pools.decide(before, now.pools, ngx.now(), M.rate(), ready)
    for _, key in ipairs({ "wanted", "weight", "at", "calm" }) do
        dict:set("pool|" .. key, after[key])
    end
    if after.wanted ~= before.wanted then
        dict:incr("pool|switches|" .. after.wanted, 1, 0)
    end
end

function M.watch(get_state)
    assert(ngx.timer.every(EVERY_S, tick, get_state))
end

-- What there is to tell of the pools in `now`: name, wanted, weight, switches to it, ready replicas and others, price.
function M.figures(now)
    local found, share = {}, M.weight()
    local function add(name, wanted, weight, switches)
        local ready, out = 0, 0
        for _, of_version in pairs(now.pools_of) do
            for _, address in ipairs(of_version[name] or {}) do
                ready, out = ready + (health.is_ready(address) and 1 or 0), out + 1
            end
        end
        found[#found + 1] = { name = name, wanted = wanted, weight = weight, switches = switches, ready = ready,
            out = out - ready, price_per_hour = now.pools.prices[name] }
    end
    local alone = not now.pools.realtime[2]
    for index, name in ipairs(now.pools.realtime) do
        local weight = alone and 1 or index == 2 and share or 1 - share
        add(name, alone or load().wanted == index, weight, dict:get("pool|switches|" .. index) or 0)
    end
    if now.pools.batch then
        add(now.pools.batch, true, 1, 0)
    end
    return found
end

return M
