-- The way of one request: a track by its user, a replica by the load, another one when a try fails, the numbers at last.
local balancer = require "ngx.balancer"
local batch = require "slipway.batch"
local health = require "slipway.health"
local metrics = require "slipway.metrics"
local pools = require "slipway.pools"
local state = require "slipway.state"
local switch = require "slipway.switch"

local M = {}

local CONNECT_S = 0.1
local READ_S = { realtime = 0.3, feedback = 0.3, batch = 10 } -- of a try that another can follow
local LAST_READ_S = { realtime = 2, feedback = 2, batch = 30 } -- of the last one: late is better than never
local TRIES_OF_VERSION = 2 -- then the champion's turn
local TRIES = 4
local LOGGED_ONE_IN = 100
local NGX_BUSY = -3 -- has no name in Lua
local BUSY = "more requests wait than can be answered in time; try again later"

local function refuse(code, reason)
    ngx.var.slipway_reason = reason
    ngx.exit(code)
end

-- A user stays on a track, and a higher weight only adds users. The canary's name salts the hash, so that it is not the
-- same users who try every new version.
local function on_canary(user, canary, weight)
    return ngx.crc32_short(canary .. ":" .. user) % 10000 < weight * 10000
end

local function track_of(now, user)
    if now.canary and (not now.champion or on_canary(user, now.canary, now.weight)) then
        return "canary"
    end
    return now.champion and "champion"
end

-- A path that names a version goes to that version, whoever the user is.
local function track_of_version(now, version)
    for _, track in ipairs({ "champion", "canary" }) do
        if now[track] == version then
            return track
        end
    end
    return nil
end

-- Who asks: a header, or the query of a request that is answered from the user's own history.
local function user_of()
    local user = ngx.var.http_x_user
    if not user and ngx.req.get_method() == "GET" and ngx.var.arg_user then
        user = ngx.unescape_uri(ngx.var.arg_user)
    end
    return user ~= "" and user or nil
end

local function class_of(uri)
    if uri == "/v1/feedback" or uri == "/v1/events" then
        return "feedback" -- any replica will do
    end
    if uri:find("^/v1/users/") then
        return "batch" -- every file of the log is read
    end
    local class = ngx.var.http_x_request_class or "realtime"
    return (class == "realtime" or class == "batch") and class
end

local function begin(now, track, class, pinned)
    local order = pools.order(now.pools, class, switch.weight(), math.random())
    ngx.ctx.way = { now = now, version = now[track], class = class, order = order, tried = {}, tries = 0, pinned = pinned }
end

function M.assign()
    local uri = ngx.var.uri
    local class, track = class_of(uri), nil
    if not class then
        return refuse(400, "header X-Request-Class: realtime or batch")
    elseif class == "realtime" then
        switch.count()
    elseif class == "batch" then
        if not batch.enter() then
            return refuse(429, "too many batch requests at once; try again in a moment")
        end
        ngx.var.slipway_place = "taken"
    end
    local now = state.get() -- after the wait: what held before it may be gone
    local version = uri:match("^/v2/models/[^/]+/versions/([^/]+)")
    if class == "feedback" then
        track = now.champion and "champion" or now.canary and "canary"
    elseif version then
        track = track_of_version(now, version)
        if not track and (now.champion or now.canary) then
            return refuse(404, "this version is neither the champion nor the canary")
        end
    else
        track = track_of(now, user_of() or ngx.var.request_id)
    end
    if not track then
        return refuse(503, "no version is served yet: release one first")
    end
    ngx.var.slipway_class, ngx.var.slipway_track = class, track
    if track == "canary" and now.champion and class == "realtime" and not version then
        return ngx.exec("@canary") -- goes on with `resume`
    end
    begin(now, track, class, version ~= nil)
end

-- A canary's user, whose requests the champion answers where the canary refuses: its slowness is no user's affair. Batch
-- requests can wait, and who names a version means it.
function M.resume()
    local now = state.get() -- `assign` may have seen an older one: what it knew is lost on the way
    begin(now, now.canary and "canary" or "champion", "realtime", false)
end

-- The replica among `addresses` with the fewest requests in flight that was not tried yet and is ready (or need not be).
-- Fewest in flight, because a stalled replica keeps what it was given: it gets little more, even before it is found out.
local turn = 0
local function least_loaded(addresses, tried, must_be_ready)
    local best, best_load
    for offset = 1, #addresses do
        local address = addresses[(turn + offset) % #addresses + 1]
        if not tried[address] and (not must_be_ready or health.is_ready(address)) then
            local load = health.in_flight(address)
            if not best or load < best_load then
                best, best_load = address, load
            end
        end
    end
    return best
end

-- A replica of a version: in the pool that the request belongs to, else in another one.
local function pick(way, version, must_be_ready)
    local of_version = way.now.pools_of[version]
    for _, pool in ipairs(way.order) do
        local address = least_loaded(of_version[pool] or {}, way.tried, must_be_ready)
        if address then
            return address
        end
    end
    return least_loaded(way.now.versions[version], way.tried, must_be_ready)
end

-- Where the next try goes: address, version and whether it is ready; or nil. The version's own ready replicas first, unless
-- it refused, then the champion's, and only then those that are out: better a doubtful replica than none.
local function choose(way)
    local versions, champion = way.now.versions, not way.pinned and way.now.champion
    local has_champion = champion and versions[champion] and #versions[champion] > 0
    for _, must_be_ready in ipairs({ true, false }) do
        local address = versions[way.version]
            and (not way.refused and way.tries < TRIES_OF_VERSION or not has_champion or way.version == champion)
            and pick(way, way.version, must_be_ready)
        if address then
            return address, way.version, must_be_ready
        end
        address = has_champion and pick(way, champion, must_be_ready)
        if address then
            return address, champion, must_be_ready
        end
    end
    return nil
end

local function all_down(addresses)
    for _, address in ipairs(addresses or {}) do
        if not health.is_down(address) then
            return false
        end
    end
    return true
end

local function outcome_of(code)
    if code == 504 then
        return "timeout"
    end
    if code == 429 then
        return "refused"
    end
    return (code == 500 or code == 502 or code == 503) and "error" or "ok"
end

-- What tries tell of a version. Feedback goes to any replica and hangs on Redis, so it tells nothing.
local function count_try(class, version, outcome)
    if class ~= "feedback" then
        metrics.attempt(version, outcome)
    end
end

-- A try failed; 502 and 504 are nginx's own words for a broken or silent connection, 429 is a replica's that is well, and
-- has more to do than it can in time.
local function settle_failed(way)
    local _, code = balancer.get_last_failure()
    health.count(way.address, -1)
    local outcome = outcome_of(code)
    count_try(way.class, way.serving, outcome == "ok" and "error" or outcome)
    if code == 502 or code == 504 then
        health.failed(way.address, code == 504)
    end
    way.refused = outcome == "refused"
end

-- Ends a request without another try. nginx takes no code from here: `admin.explain` gives it this one. After an ERROR it
-- would close the client's connection; not after NGX_BUSY.
local function give_up(code, reason)
    ngx.var.slipway_code, ngx.var.slipway_reason = code, reason
    ngx.var.slipway_address = "" -- its try is settled
    return ngx.exit(NGX_BUSY)
end

function M.balance()
    local way = ngx.ctx.way
    if way.address then
        settle_failed(way)
        if way.refused and way.serving == way.now.champion then
            return give_up(429, BUSY) -- to ask once more would be more of what it has too much of
        end
    else
        turn = turn + 1 -- once a request, or ties of two would always go to the same one
        if all_down(way.now.versions[way.version]) then
            count_try(way.class, way.version, "error") -- nobody could even be asked
        end
    end
    local address, version, ready = choose(way)
    if not address and not way.address then
        return give_up(503, "no replica is left of the version that serves you; try again in a moment")
    end
    -- None left, yet asked again: nginx gives a try back when a kept connection turned out closed.
    address, version = address or way.address, version or way.serving
    way.address, way.serving, way.tries = address, version, way.tries + 1
    way.tried[address] = true
    ngx.var.slipway_address, ngx.var.slipway_version = address, version
    health.count(address, 1)
    local another, _, another_ready = choose(way)
    local more = another ~= nil and way.tries < TRIES
    if more then
        balancer.set_more_tries(1)
    end
    -- A slow replica that is ready is not given up for one that is known to be out.
    local short = more and (another_ready or not ready)
    balancer.set_timeouts(CONNECT_S, CONNECT_S, (short and READ_S or LAST_READ_S)[way.class])
    local host, port = address:match("^(.*):(%d+)$")
    assert(balancer.set_current_peer(host, tonumber(port)))
end

-- Every answer says which version gave it, and on which track the user is.
function M.label()
    local version, track = ngx.var.slipway_version, ngx.var.slipway_track
    ngx.header["X-Slipway-Version"] = version ~= "" and version or nil
    ngx.header["X-Slipway-Track"] = track ~= "" and track or nil
end

-- Which requests the log tells of: failed and slow ones, and one in a hundred of the others.
local function reason_to_log(code, seconds, slow_seconds)
    if code >= 400 then
        return "error"
    end
    return seconds > slow_seconds and "slow" or math.random(LOGGED_ONE_IN) == 1 and "sample" or nil
end

function M.log(slow_seconds)
    if ngx.var.slipway_place == "taken" then
        batch.leave()
    end
    ngx.var.slipway_logged = reason_to_log(ngx.status, tonumber(ngx.var.request_time), slow_seconds)
    local track, address = ngx.var.slipway_track, ngx.var.slipway_address
    if not track or track == "" then
        return
    end
    local version, code = ngx.var.slipway_version, ngx.status
    if address ~= "" then
        health.count(address, -1)
        local outcome = outcome_of(code)
        count_try(ngx.var.slipway_class, version, outcome)
        if outcome == "timeout" and not ngx.var.upstream_http_x_slipway_version then -- its own 504 is no silence
            health.failed(address, true)
        end
    end
    local way = ngx.ctx.way -- gone where nginx answers in the replicas' stead
    metrics.request(version ~= "" and version or "none", track, ngx.var.slipway_class, code,
        tonumber(ngx.var.request_time), way and way.tries or 1, tonumber(ngx.var.request_length),
        tonumber(ngx.var.bytes_sent))
end

return M
