#!lua flags=no-writes
-- {'ok', request hash, reply, version}
local id = id_of(given.name)
local kept = alive(load(id)) and redis.call('HGET', REPLIES .. id, given.turn)
if not kept then return {'missing'} end
local expires, version, request_hash, reply = unpack(cmsgpack.unpack(kept))
if expires <= now then return {'missing'} end
return {'ok', request_hash, reply, version}
