#!lua flags=no-writes
-- {'ok', job}
local id = id_of(given.name)
local session = load(id)
if session and session.version > 0 and not alive(session) then return {'missing'} end
local kept = redis.call('HGET', JOBS .. id, given.job)
if not kept then return {'missing'} end
local expires, job = unpack(cmsgpack.unpack(kept))
if expires <= now then return {'missing'} end
return {'ok', job}
