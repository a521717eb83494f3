#!lua
local id = id_of(given.name)
local done = recalled(id)
if done then return done end
local source_id = id_of(given.source)
local source = load(source_id)
if not alive(source) then return {'missing'} end
local version = given.version or source.version
if version < source.first or version > source.version then return {'missing'} end
local session, refusal = vacant(id)
if refusal then return refusal end
session.ttl = source.ttl
session.fork_name, session.fork_version = given.source, version
local meta = meta_of(source_id, version)
refusal = grow(id, session, {
  parent = 0, bytes = meta.bytes, tokens = meta.tokens,
  content = redis.call('HGET', SESSION .. source_id, 'd' .. version),
})
if refusal then return refusal end
save(id, session)
return with_content(id, remember(record(id, session, 1)))
