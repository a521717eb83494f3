#!lua flags=no-writes
-- {'ok', ..., content, whether its use should be noted}
local id = id_of(given.name)
local session = load(id)
if not alive(session) then return {'missing'} end
local version = given.version or session.version
if version < session.first or version > session.version then return {'missing'} end
local result = with_content(id, record(id, session, version))
local used = tonumber(redis.call('ZSCORE', BY_USE, id))
result[#result + 1] = (now - used > given.touch_after) and 1 or 0
return result
