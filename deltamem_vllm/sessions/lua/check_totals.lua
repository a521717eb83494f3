#!lua flags=no-writes
-- {'ok', clock, sessions, versions, bytes, sizes of by_use, by_expiry, by_lease, by_reply, by_job}
local result = {'ok', tonumber(redis.call('GET', CLOCK))}
for i, total in ipairs(redis.call('HMGET', TOTALS, 'sessions', 'versions', 'bytes')) do
  result[2 + i] = tonumber(total or 0)
end
for _, key in ipairs({BY_USE, BY_EXPIRY, BY_LEASE, BY_REPLY, BY_JOB}) do
  result[#result + 1] = redis.call('ZCARD', key)
end
return result
