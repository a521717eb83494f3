#!lua
-- Note that a session was read, for the order in which sweeps remove.
local id = id_of(given.name)
if redis.call('ZADD', BY_USE, 'XX', 'CH', now, id) == 1 then keep_time() end
return {'ok'}
