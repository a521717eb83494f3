#!lua
-- {'ok', format of the store's keys}. Writes, so it also proves that the store takes writes.
local key = prefix .. 'format'
redis.call('SET', key, given.format, 'NX')
keep_time()
return {'ok', redis.call('GET', key)}
