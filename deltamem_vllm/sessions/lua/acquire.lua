#!lua
-- {'ok', token, incarnation, version, ends}
local done = remembered()
if done then return done end
local id = id_of(given.name)
local session = load(id)
if session and leased(session) then return {'busy', session.lease.owner} end
if not alive(session) then
  local refusal = full_of_sessions(id)
  if refusal then return refusal end
  session = vacant(id)
end
local token = redis.call('HINCRBY', TOTALS, 'token', 1)
session.lease = {token = token, owner = given.owner, ends = now + given.duration}
redis.call('ZADD', BY_USE, 'XX', now, id)
save(id, session)
return remember({'ok', token, session.incarnation, session.version, session.lease.ends})
