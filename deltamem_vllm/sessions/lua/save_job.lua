#!lua
-- ARGV[2]: the job
local id = id_of(given.name)
local refusal = lapsed(load(id))
if refusal then return refusal end
local expires = now + given.job_duration
redis.call('HSET', JOBS .. id, given.job, cmsgpack.pack({expires, ARGV[2]}))
redis.call('ZADD', BY_JOB, expires, id .. '\0' .. given.job)
keep_time()
return {'ok'}
