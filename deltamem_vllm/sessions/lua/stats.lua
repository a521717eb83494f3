#!lua flags=no-writes
-- {'ok', sessions, versions, bytes, leases that run}
local totals = redis.call('HMGET', TOTALS, 'sessions', 'versions', 'bytes')
return {
  'ok', tonumber(totals[1] or 0), tonumber(totals[2] or 0), tonumber(totals[3] or 0),
  redis.call('ZCOUNT', BY_LEASE, '(' .. string.format('%.0f', now), '+inf'),
}
