#!lua
-- {'ok', ends}
local id = id_of(given.name)
local session = load(id)
local refusal = lapsed(session)
if refusal then return refusal end
session.lease.ends = now + given.duration
save(id, session)
keep_time()
return {'ok', session.lease.ends}
