#!lua flags=no-writes
-- {'ok', sessions, versions, bytes, expiring, leased, replies, jobs, content or job, ...}, or
-- {'wrong', what}. ARGV[2]: the id.
local id = ARGV[2]
if redis.call('EXISTS', SESSION .. id, REPLIES .. id, JOBS .. id) == 0 then
  return {'ok', 0, 0, 0, 0, 0, 0, 0}
end
local tenant, fingerprint, name = parts(id)
local member = name .. '\0' .. fingerprint
for _, key in ipairs({NAMES .. tenant, NAMES .. tenant .. '\0' .. fingerprint}) do
  if not redis.call('ZSCORE', key, member) then return {'wrong', 'is not listed'} end
end

local session = load(id)
local result = {'ok', 0, 0, 0, 0, 0, 0, 0}

local function agrees(key, time)
  local score = redis.call('ZSCORE', key, id)
  return (score and tonumber(score)) == (time or false)
end

if session then
  if not agrees(BY_LEASE, session.lease and session.lease.ends) then
    return {'wrong', 'has a lease that is not in by_lease as it should be'}
  end
  if not agrees(BY_EXPIRY, session.expires) then
    return {'wrong', 'expires at another time than by_expiry says'}
  end
  if (session.version > 0) ~= (redis.call('ZSCORE', BY_USE, id) ~= false) then
    return {'wrong', 'is not in by_use as it should be'}
  end
  if session.version == 0 and not session.lease then
    return {'wrong', 'has neither a version nor a lease'}
  end
  result[5], result[6] = session.expires and 1 or 0, session.lease and 1 or 0
end

if session and session.version > 0 then
  local bytes, kept = 0, session.version - session.first + 1
  for version = session.first, session.version do
    local fields = redis.call('HMGET', SESSION .. id, 'm' .. version, 'd' .. version)
    if not (fields[1] and fields[2]) then return {'wrong', 'misses version ' .. version} end
    bytes = bytes + cmsgpack.unpack(fields[1]).bytes
    result[#result + 1] = fields[2]
  end
  if redis.call('HLEN', SESSION .. id) ~= 1 + 2 * kept then
    return {'wrong', 'holds versions that should be pruned'}
  end
  if bytes ~= session.bytes then return {'wrong', 'counts its bytes wrongly'} end
  result[2], result[3], result[4] = 1, kept, bytes
end

local function kept_items(key, order, field)
  local items = redis.call('HGETALL', key .. id)
  for i = 1, #items, 2 do
    local score = redis.call('ZSCORE', order, id .. '\0' .. items[i])
    local item = cmsgpack.unpack(items[i + 1])
    if not score or tonumber(score) ~= item[1] then return false end
    if key == JOBS then result[#result + 1] = item[2] end
  end
  result[field] = #items / 2
  return true
end

if not kept_items(REPLIES, BY_REPLY, 7) then
  return {'wrong', 'has a reply that is not in by_reply as it should be'}
end
if not kept_items(JOBS, BY_JOB, 8) then
  return {'wrong', 'has a job that is not in by_job as it should be'}
end
return result
