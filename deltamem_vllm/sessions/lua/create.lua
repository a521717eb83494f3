#!lua
-- ARGV[2]: the content
local done = remembered()
if done then return done end
local id = id_of(given.name)
local session, refusal = vacant(id)
if refusal then return refusal end
session.ttl = given.ttl
session.fork_name, session.fork_version = given.fork_name, given.fork_version
refusal = grow(id, session, {
  parent = 0, bytes = given.bytes, tokens = given.tokens, content = ARGV[2],
})
if refusal then return refusal end
save(id, session)
return remember(record(id, session, 1))
