-- Counters in a shared dict, and their text for Prometheus. A request adds to four keys; all else is done when asked.
local dict = ngx.shared.slipway_metrics
local M = {}

local BOUNDS = { -- seconds
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10,
}
local OUTCOMES = { "ok", "error", "timeout" }

local function bucket(seconds)
    for index, bound in ipairs(BOUNDS) do
        if seconds <= bound then
            return index
        end
    end
    return #BOUNDS + 1
end

-- Series begin at zero, so that their first increase is seen.
function M.welcome(version, track)
    for _, outcome in ipairs(OUTCOMES) do
        dict:add("attempts|" .. version .. "|" .. outcome, 0)
    end
    dict:add("requests|" .. version .. "|" .. track .. "|realtime|200", 0)
    dict:add("sum|" .. version .. "|" .. track .. "|realtime", 0)
end

-- What a client got.
function M.request(version, track, class, code, seconds)
    local series = version .. "|" .. track .. "|" .. class
    dict:incr("requests|" .. series .. "|" .. code, 1, 0)
    dict:incr("sum|" .. series, seconds, 0)
    dict:incr("bucket|" .. series .. "|" .. bucket(seconds), 1, 0)
end

-- How one try at a replica ended.
function M.attempt(version, outcome)
    dict:incr("attempts|" .. version .. "|" .. outcome, 1, 0)
end

local function split(key)
    local parts = {}
    for part in (key .. "|"):gmatch("([^|]*)|") do
        parts[#parts + 1] = part
    end
    return parts
end

local function histogram(out, series, sum)
    local _, version, track, class = unpack(split(series))
    local labels = ('version="%s",track="%s",class="%s"'):format(version, track, class)
    local key = ("bucket|%s|%s|%s|"):format(version, track, class)
    local total = 0
    for index = 1, #BOUNDS + 1 do
        total = total + (dict:get(key .. index) or 0)
        out[#out + 1] = ('slipway_gateway_request_seconds_bucket{%s,le="%s"} %d'):format(
            labels, BOUNDS[index] or "+Inf", total)
    end
    out[#out + 1] = ("slipway_gateway_request_seconds_sum{%s} %.6f"):format(labels, sum)
    out[#out + 1] = ("slipway_gateway_request_seconds_count{%s} %d"):format(labels, total)
end

local WRITERS = {
    requests = function(lists, key, value)
        local _, version, track, class, code = unpack(split(key))
        table.insert(lists.requests, ('slipway_gateway_requests_total{version="%s",track="%s",class="%s",code="%s"} %d')
            :format(version, track, class, code, value))
    end,
    attempts = function(lists, key, value)
        local _, version, outcome = unpack(split(key))
        table.insert(lists.attempts, ('slipway_gateway_attempts_total{version="%s",outcome="%s"} %d')
            :format(version, outcome, value))
    end,
    sum = function(lists, key, value)
        histogram(lists.seconds, key, value)
    end,
}

local function live(state, health)
    local lines = {}
    for version, addresses in pairs(state.versions) do
        local sum = 0
        for _, address in ipairs(addresses) do
            sum = sum + health.in_flight(address)
        end
        lines[#lines + 1] = ('slipway_gateway_in_flight{version="%s"} %d'):format(version, sum)
    end
    return lines
end

local function family(name, kind, help, lines)
    table.sort(lines)
    ngx.print("# HELP ", name, " ", help, "\n# TYPE ", name, " ", kind, "\n", table.concat(lines, "\n"),
        #lines > 0 and "\n" or "")
end

function M.render()
    local lists = { requests = {}, attempts = {}, seconds = {} }
    for _, key in ipairs(dict:get_keys(0)) do
        local write = WRITERS[key:match("^[^|]*")]
        if write then
            write(lists, key, dict:get(key))
        end
    end
    local state, health = require("slipway.state").get(), require("slipway.health")
    family("slipway_gateway_requests_total", "counter", "Answers that clients got.", lists.requests)
    family("slipway_gateway_attempts_total", "counter", "Tries at replicas, healed ones too.", lists.attempts)
    ngx.print("# HELP slipway_gateway_request_seconds Time from a request's first byte to its answer's last.\n",
        "# TYPE slipway_gateway_request_seconds histogram\n", table.concat(lists.seconds, "\n"),
        #lists.seconds > 0 and "\n" or "")
    family("slipway_gateway_canary_weight", "gauge", "Share of users on the canary.",
        { "slipway_gateway_canary_weight " .. (state.canary and state.weight or 0) })
    family("slipway_gateway_in_flight", "gauge", "Requests at the replicas of a version.", live(state, health))
end

return M
