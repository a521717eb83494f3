#!lua
-- {'ok', token, incarnation, version, ends}
local done = remembered()
if done then return done end
local id = id_of(given.name)
local session = load(id)
if session and leased(session) then return {'busy'} end
if not alive(session) then
  local refusal = full_of_sessions(id)
  if refusal then return refusal end
  session = vacant(id)
end
-- The time is a fencing token that grows even where a fail-over lost the last leases.
local token = now
session.lease = {token = token, owner = given.owner, ends = now + given.duration}
redis.call('ZADD', BY_USE, 'XX', now, id)
save(id, session)
return remember({'ok', token, session.incarnation, session.version, session.lease.ends})
