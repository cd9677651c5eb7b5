-- Who asks. A client is the name of its bearer token, else its address; the product's own traffic comes over a unix
-- socket and is neither asked for a token nor limited. The tokens in force:
--   {"HASH": {"client": "shop", "created": "2026-01-31"}, ...}      HASH: SHA-256 of the token, hexadecimal
-- They lie as text in a shared dict with a generation beside it, as the state does. Without a document the door is open.
local ffi = require "ffi"
local cjson = require "cjson.safe"
local metrics = require "slipway.metrics"

ffi.cdef [[ unsigned char *SHA256(const unsigned char *text, size_t size, unsigned char *digest); ]]

local dict = ngx.shared.slipway_state
local M = {}
local OWN, ANONYMOUS, DENIED = "slipway", "anonymous", "denied"
local seen, names = nil, nil -- names by hash; nil: nobody needs a token

-- The hash is looked up, never the token compared: what the time of a look-up tells of a hash tells nothing of a token.
local digest = ffi.new("unsigned char[32]")
local function hash(token)
    ffi.C.SHA256(token, #token, digest)
    return (ffi.string(digest, 32):gsub(".", function(byte)
        return ("%02x"):format(byte:byte())
    end))
end

local function compile(document)
    if type(document) ~= "table" then
        return nil, "expected an object of tokens"
    end
    local found = {}
    for key, token in pairs(document) do
        local name = type(token) == "table" and token.client
        if type(key) ~= "string" or #key ~= 64 or type(name) ~= "string" or not name:match("^%l[%l%d-]*$") then
            return nil, "expected names of clients by the SHA-256 of their tokens"
        end
        found[key] = name
    end
    return found
end

-- Put tokens in force: every request that begins after this returns is held against them.
function M.replace(body)
    local document, problem = cjson.decode(body or "")
    local found
    if document then
        found, problem = compile(document)
    end
    if not found then
        return nil, problem
    end
    local stored, why = dict:safe_set("tokens", body)
    if not stored then
        return nil, why
    end
    metrics.keep_clients(found)
    dict:incr("tokens_generation", 1, 0)
    return true
end

-- At the start: the file that the platform keeps, if there is one. One that makes no sense closes the door.
function M.restore(path)
    local file = io.open(path, "rb")
    if file then
        local ok, problem = M.replace(file:read("*a"))
        file:close()
        if not ok then
            ngx.log(ngx.ERR, path, ": ", problem, "; every client is refused")
            M.replace("{}")
        end
    end
end

local function tokens()
    local generation = dict:get("tokens_generation")
    if generation ~= seen then
        names, seen = compile(cjson.decode(dict:get("tokens"))), generation
    end
    return names
end

-- Before the limits, which count by $slipway_limited: empty for our own traffic, which nginx leaves uncounted.
function M.identify()
    local var = ngx.var
    if var.slipway_client ~= "" then
        return -- an error's page of a request that was seen already
    end
    if var.server_addr:sub(1, 5) == "unix:" then
        var.slipway_client = OWN
        return
    end
    local known = tokens()
    local token = known and (var.http_authorization or ""):match("^[Bb]earer +(%S+)$")
    local name = token and known[hash(token)]
    var.slipway_client = name or known and DENIED or ANONYMOUS
    var.slipway_limited = name or var.remote_addr
end

-- Behind the limits, so that guesses are limited by their address, too.
function M.admit()
    if ngx.var.slipway_client ~= DENIED then
        return
    end
    local wrong = ngx.var.http_authorization
    ngx.var.slipway_reason = wrong and "this bearer token is not known here, or was revoked"
        or "a bearer token is needed: Authorization: Bearer TOKEN"
    return ngx.exit(401)
end

function M.log()
    local client = ngx.var.slipway_client
    if client and client ~= "" then
        metrics.client(client, ngx.status)
    end
end

return M
