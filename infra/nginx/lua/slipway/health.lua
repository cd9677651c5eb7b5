-- Which replicas can be asked. A failed try puts a replica out for a moment (passive); checks four times a second keep it out
-- for as long as they fail (active): a stalled process still accepts connections, and only a silent check shows it.
local dict = ngx.shared.slipway_health
local M = {}

local OUT_S = 1                 -- after a failed try; after a broken connection until a later check finds it ready
local SILENT = math.huge        -- in place of the moment of the failure: no check is later, as checks may be answered alone
local EVERY_S = 0.25
local TIMEOUT_MS = 200          -- under EVERY_S, so that rounds do not overlap; the second silence ends .7 s after a stall
local FAILURES = 2              -- silent checks in a row: one may be a busy machine
local REQUEST = "GET /v2/health/ready HTTP/1.1\r\nHost: replica\r\nConnection: close\r\n\r\n"

function M.is_down(address)
    return dict:get("down|" .. address) ~= nil
end

function M.is_ready(address)
    return not dict:get("out|" .. address) and not M.is_down(address)
end

-- A try on this replica failed: the connection broke, or it was silent.
function M.failed(address, silent)
    dict:set("out|" .. address, silent and SILENT or ngx.now(), OUT_S)
end

-- Forget what was known of an address that now belongs to another replica.
function M.welcome(addresses, known)
    local old = {}
    for _, address in ipairs(known) do
        old[address] = true
    end
    for _, address in ipairs(addresses) do
        if not old[address] then
            for _, kind in ipairs({ "out|", "down|", "silent|" }) do
                dict:delete(kind .. address)
            end
        end
    end
end

-- Requests in flight at an address, counted by worker, so that the count of a worker that crashed can be dropped.
function M.count(address, change)
    dict:incr("flight|" .. address .. "|" .. ngx.worker.id(), change, 0)
end

function M.in_flight(address)
    local sum = 0
    for worker = 0, ngx.worker.count() - 1 do
        sum = sum + (dict:get("flight|" .. address .. "|" .. worker) or 0)
    end
    return sum
end

function M.forget_own_flights()
    local mine = "|" .. ngx.worker.id()
    for _, key in ipairs(dict:get_keys(0)) do
        if key:sub(1, 7) == "flight|" and key:sub(-#mine) == mine then
            dict:delete(key)
        end
    end
end

-- One check: true, or false and whether that is certain.
local function probe(address)
    local socket = ngx.socket.tcp()
    socket:settimeout(TIMEOUT_MS)
    local host, port = address:match("^(.*):(%d+)$")
    local ok, problem = socket:connect(host, tonumber(port))
    if not ok then
        return false, problem ~= "timeout"
    end
    local sent = socket:send(REQUEST)
    local line = sent and socket:receive("*l")
    socket:close()
    if not line then
        return false, false
    end
    return line:match("^HTTP/1%.%d 200") ~= nil, true
end

local function check(address)
    local began = ngx.now()
    local ready, certain = probe(address)
    if ready then
        dict:delete("silent|" .. address)
        dict:delete("down|" .. address)
        if began > (dict:get("out|" .. address) or began) then
            dict:delete("out|" .. address)
        end
    elseif certain or dict:incr("silent|" .. address, 1, 0) >= FAILURES then
        dict:set("down|" .. address, true)
    end
end

local function check_all(premature, get_state)
    if premature then
        return
    end
    local threads = {}
    for _, addresses in pairs(get_state().versions) do
        for _, address in ipairs(addresses) do
            threads[#threads + 1] = ngx.thread.spawn(check, address)
        end
    end
    for _, thread in ipairs(threads) do
        ngx.thread.wait(thread)
    end
end

function M.watch(get_state)
    assert(ngx.timer.every(EVERY_S, check_all, get_state))
end

return M
