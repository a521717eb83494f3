#!lua
-- ARGV[2]: the content; ARGV[3], ARGV[4]: the turn's request hash and reply
local done = remembered()
if done then return done end
local id = id_of(given.name)
local session = load(id)
local refusal = lapsed(session)
if refusal then return refusal end
if session.version ~= given.version then return {'moved', session.version} end
if given.ttl then session.ttl = given.ttl end
refusal = grow(id, session, {
  parent = given.parent, bytes = given.bytes, tokens = given.tokens, content = ARGV[2],
})
if refusal then return refusal end
if given.release then session.lease = nil end
save(id, session)
if given.turn then
  local expires = now + given.reply_duration
  redis.call('HSET', REPLIES .. id, given.turn,
    cmsgpack.pack({expires, session.version, ARGV[3], ARGV[4]}))
  redis.call('ZADD', BY_REPLY, expires, id .. '\0' .. given.turn)
end
if given.job and redis.call('HDEL', JOBS .. id, given.job) == 1 then
  redis.call('ZREM', BY_JOB, id .. '\0' .. given.job)
end
return remember(record(id, session, session.version))
