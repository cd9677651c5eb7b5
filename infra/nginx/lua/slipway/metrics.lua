-- Counters in a shared dict, and their text for Prometheus. A request adds to six keys; all else is done when asked.
local dict = ngx.shared.slipway_metrics
local M = {}

local BOUNDS = { -- seconds
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10,
}
local OUTCOMES = { "ok", "refused", "error", "timeout" }

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
    dict:add("healed|" .. version, 0)
end

-- Drop the series of versions that are gone: as many stay as versions run, however many releases there were.
function M.keep(versions)
    for _, key in ipairs(dict:get_keys(0)) do
        local family, version = key:match("^(%a+)|([^|]+)")
        if version and family ~= "client" and version ~= "none" and not versions[version] then
            dict:delete(key)
        end
    end
end

-- What a client got, after how many tries; the bytes of the request and of the answer.
function M.request(version, track, class, code, seconds, tries, received, sent)
    local series = version .. "|" .. track .. "|" .. class
    dict:incr("requests|" .. series .. "|" .. code, 1, 0)
    dict:incr("sum|" .. series, seconds, 0)
    dict:incr("bucket|" .. series .. "|" .. bucket(seconds), 1, 0)
    dict:incr("received", received, 0)
    dict:incr("sent", sent, 0)
    if tries > 1 and code < 500 then
        dict:incr("healed|" .. version, 1, 0)
    end
end

-- What a client got. Clients are the names of tokens, at most as many as the file of tokens may hold, and three more.
function M.client(name, code)
    local outcome = code == 429 and "limited" or code >= 500 and "failed" or code >= 400 and "refused" or "ok"
    dict:incr("client|" .. name .. "|" .. outcome, 1, 0)
end

-- Drop the series of clients whose tokens are gone.
function M.keep_clients(names)
    local known = { slipway = true, anonymous = true, denied = true }
    for _, name in pairs(names) do
        known[name] = true
    end
    for _, key in ipairs(dict:get_keys(0)) do
        local name = key:match("^client|([^|]+)")
        if name and not known[name] then
            dict:delete(key)
        end
    end
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

-- One line of the exposition: its labels are given in order, as name and value in turn.
local function line(name, value, ...)
    local labels, given = {}, { ... }
    for index = 1, #given, 2 do
        labels[#labels + 1] = ('%s="%s"'):format(given[index], given[index + 1])
    end
    local braces = #labels > 0 and "{" .. table.concat(labels, ",") .. "}" or ""
    return ("%s%s %.14g"):format(name, braces, value)
end

local function add(lists, name, value, ...)
    table.insert(lists[name], line("slipway_gateway_" .. name, value, ...))
end

-- What is counted, by the first word of its key.
local WRITERS = {
    requests = function(lists, key, value)
        local _, version, track, class, code = unpack(split(key))
        add(lists, "requests_total", value, "version", version, "track", track, "class", class, "code", code)
    end,
    attempts = function(lists, key, value)
        local _, version, outcome = unpack(split(key))
        add(lists, "attempts_total", value, "version", version, "outcome", outcome)
    end,
    healed = function(lists, key, value)
        add(lists, "healed_total", value, "version", (key:match("|(.*)")))
    end,
    client = function(lists, key, value)
        local _, client, outcome = unpack(split(key))
        add(lists, "client_requests_total", value, "client", client, "outcome", outcome)
    end,
    received = function(lists, _, value)
        add(lists, "bytes_total", value, "direction", "received")
    end,
    sent = function(lists, _, value)
        add(lists, "bytes_total", value, "direction", "sent")
    end,
    sum = function(lists, key, value)
        histogram(lists.request_seconds, key, value)
    end,
}

-- What holds at this moment, and is counted by nobody.
local function measure(lists, slo)
    local state, health = require("slipway.state").get(), require("slipway.health")
    add(lists, "canary_weight", state.canary and state.weight or 0)
    add(lists, "routed_timestamp_seconds", state.routed)
    for _, track in ipairs({ "champion", "canary" }) do
        if state[track] then
            add(lists, "version_info", 1, "version", state[track], "track", track)
        end
    end
    for version, addresses in pairs(state.versions) do
        local flights, ready = 0, 0
        for _, address in ipairs(addresses) do
            flights = flights + health.in_flight(address)
            ready = ready + (health.is_ready(address) and 1 or 0)
        end
        add(lists, "in_flight", flights, "version", version)
        add(lists, "replicas", ready, "version", version, "state", "ready")
        add(lists, "replicas", #addresses - ready, "version", version, "state", "out")
    end
    for _, kind in ipairs({ "active", "reading", "writing", "waiting" }) do
        add(lists, "connections", ngx.var["connections_" .. kind], "state", kind)
    end
    for name, each in pairs(ngx.shared) do
        add(lists, "dict_free_bytes", each:free_space(), "dict", name)
    end
    local switch = require("slipway.switch")
    add(lists, "rate_rps", switch.rate())
    for _, pool in ipairs(switch.figures(state)) do
        add(lists, "pool_weight", pool.weight, "pool", pool.name)
        add(lists, "pool_wanted", pool.wanted and 1 or 0, "pool", pool.name)
        add(lists, "pool_switches_total", pool.switches, "pool", pool.name)
        add(lists, "pool_replicas", pool.ready, "pool", pool.name, "state", "ready")
        add(lists, "pool_replicas", pool.out, "pool", pool.name, "state", "out")
        add(lists, "pool_price_per_hour", pool.price_per_hour, "pool", pool.name)
    end
    add(lists, "slo_p99_seconds", slo.p99_seconds)
    add(lists, "slo_error_ratio", slo.error_ratio)
end

local FAMILIES = {
    { "requests_total", "counter", "Answers that clients got." },
    { "client_requests_total", "counter", "Answers by the name of the client's token, and how they ended." },
    { "attempts_total", "counter", "Tries at replicas, healed ones too." },
    { "healed_total", "counter", "Answers that took more than one try." },
    { "request_seconds", "histogram", "Time from a request's first byte to its answer's last." },
    { "bytes_total", "counter", "Bytes of requests and of answers, heads too." },
    { "canary_weight", "gauge", "Share of users on the canary (0..1)." },
    { "version_info", "gauge", "1: the version serves this track." },
    { "routed_timestamp_seconds", "gauge", "When the routing last changed, Unix time." },
    { "in_flight", "gauge", "Requests at the replicas of a version." },
    { "replicas", "gauge", "Replicas of a version that can be asked, and those that are out." },
    { "rate_rps", "gauge", "Realtime requests/s over the last 5 s, which the pools are switched by." },
    { "pool_weight", "gauge", "Share of the requests of its class that a pool gets (0..1)." },
    { "pool_wanted", "gauge", "1: the rate asks for this pool." },
    { "pool_switches_total", "counter", "Times that the rate began to ask for this pool." },
    { "pool_replicas", "gauge", "Replicas of a pool that can be asked, and those that are out." },
    { "pool_price_per_hour", "gauge", "Price of a replica of this pool for an hour, from params.yaml." },
    { "connections", "gauge", "Connections of clients, by what they do." },
    { "dict_free_bytes", "gauge", "Whole free pages of a shared dict." },
    { "slo_p99_seconds", "gauge", "Largest P99 that is promised, from params.yaml." },
    { "slo_error_ratio", "gauge", "Largest share of failed requests that is promised (0..1), from params.yaml." },
}

-- `slo`: what is promised, for rules to compare with.
function M.render(slo)
    local lists = {}
    for _, family in ipairs(FAMILIES) do
        lists[family[1]] = {}
    end
    for _, key in ipairs(dict:get_keys(0)) do
        local write = WRITERS[key:match("^[^|]*")]
        if write then
            write(lists, key, dict:get(key) or 0)
        end
    end
    measure(lists, slo)
    for _, family in ipairs(FAMILIES) do
        local name, kind, help = unpack(family)
        local lines = lists[name]
        if kind ~= "histogram" then -- its buckets stand in their order already
            table.sort(lines)
        end
        ngx.print("# HELP slipway_gateway_", name, " ", help, "\n# TYPE slipway_gateway_", name, " ", kind, "\n",
            table.concat(lines, "\n"), #lines > 0 and "\n" or "")
    end
end

return M
