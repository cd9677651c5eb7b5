-- Which pool serves a request. Pure: the clock, the rate and what is ready are given, the state goes in and comes out.
--
-- Realtime requests go to the first realtime pool at a low rate and to the second at a high one. The second is wanted as
-- soon as the rate reaches `high_rps`; the first again when it has been under `low_rps` for `dwell_s` without a break. So
-- there are at most two switches in `dwell_s`, whatever the rate does. The users move in `RAMP_S`, both pools running, and
-- only while the wanted pool has a ready replica: until then, all stays as it is.
local M = {}

local RAMP_S = 5

-- state: wanted (1 or 2), weight (share of the second pool, 0..1), at (when it was decided), calm (since when the rate is low).
function M.start(now)
    return { wanted = 1, weight = 0, at = now }
end

-- What holds from `now` on. limits: low_rps, high_rps, dwell_s; ready: whether each pool has a ready replica.
function M.decide(state, limits, now, rate, ready)
    local wanted, calm = state.wanted, nil
    if rate >= limits.high_rps then
        wanted = 2
    elseif rate < limits.low_rps and wanted == 2 then
        calm = state.calm or now
        if now - calm >= limits.dwell_s then
            wanted, calm = 1, nil
        end
    end
    local weight, step = state.weight, (now - state.at) / RAMP_S
    if ready[wanted] then
        weight = wanted == 2 and math.min(1, weight + step) or math.max(0, weight - step)
    end
    return { wanted = wanted, weight = weight, at = now, calm = calm }
end

-- Names of the pools that a request should go to, the best first. pools: realtime (names), batch (a name, or nil);
-- weight: share of the second realtime pool; coin: a random number, 0..1.
function M.order(pools, class, weight, coin)
    if class == "batch" and pools.batch then
        return { pools.batch }
    end
    local first, second = pools.realtime[1], pools.realtime[2]
    if second and coin < weight then
        return { second, first }
    end
    return { first, second }
end

return M
