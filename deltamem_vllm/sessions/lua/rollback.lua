#!lua
local id = id_of(given.name)
local done = recalled(id)
if done then return done end
local session = load(id)
if not alive(session) then return {'missing'} end
if given.version < session.first or given.version > session.version then return {'missing'} end
if leased(session) then return {'busy'} end
local meta = meta_of(id, given.version)
local refusal = grow(id, session, {
  parent = given.version, bytes = meta.bytes, tokens = meta.tokens,
  content = redis.call('HGET', SESSION .. id, 'd' .. given.version),
})
if refusal then return refusal end
session.lease = nil
save(id, session)
return with_content(id, remember(record(id, session, session.version)))
