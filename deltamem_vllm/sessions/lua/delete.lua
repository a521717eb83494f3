#!lua flags=allow-oom
-- {'ok', whether there was one}
--
-- No tombstone is needed: fencing tokens come from the store's clock, so they grow on, and a lease
-- whose session is gone holds no longer.
local done = remembered()
if done then return done end
local id = id_of(given.name)
local session = load(id)
local existed = alive(session)
purge(id, session)
return remember({'ok', existed and 1 or 0})
