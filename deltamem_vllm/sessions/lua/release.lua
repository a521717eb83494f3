#!lua flags=allow-oom
local id = id_of(given.name)
local session = load(id)
if session and session.lease and session.lease.token == given.token then
  drop_lease(id, session)
  keep_time()
end
return {'ok'}
