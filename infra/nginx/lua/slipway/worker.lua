-- What every worker does when it starts.
local batch = require "slipway.batch"
local ffi = require "ffi"
local health = require "slipway.health"
local state = require "slipway.state"
local switch = require "slipway.switch"

ffi.cdef [[
    int chmod(const char *path, unsigned int mode);
    int prctl(int option, unsigned long argument);
]]

local PR_SET_PDEATHSIG, SIGQUIT, OWNER_ONLY = 1, 3, 384 -- 384 is octal 600
local M = {}

function M.start(sockets, batch_in_flight)
    for _, socket in ipairs(sockets) do -- nginx opens them to everybody; these are their owner's
        if ffi.C.chmod(socket, OWNER_ONLY) ~= 0 then
            error("cannot restrict " .. socket)
        end
    end
    -- Workers outlive a master that is killed and keep its port: end with it, so that its successor can start.
    ffi.C.prctl(PR_SET_PDEATHSIG, SIGQUIT)
    health.forget_own_flights()
    batch.start(batch_in_flight)
    if ngx.worker.id() == 0 then
        health.watch(state.get)
        switch.watch(state.get)
    end
end

return M
