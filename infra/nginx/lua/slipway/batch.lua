-- Batch requests wait here for one of a few places, so that however many come, realtime ones find the replicas free.
local semaphore = require "ngx.semaphore"

local M = {}
local places

local WAIT_S = 10

-- Share `limit` places out among the workers.
function M.start(limit)
    places = semaphore.new(math.max(1, math.floor(limit / ngx.worker.count())))
end

-- Wait for a place; false: none became free in time.
function M.enter()
    return places:wait(WAIT_S)
end

function M.leave()
    places:post(1)
end

return M
