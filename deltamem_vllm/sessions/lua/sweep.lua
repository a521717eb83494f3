#!lua flags=allow-oom
-- One batch: {'ok', sessions, replies, jobs, expired ones spared, old ones spared, 1 if all done}
--
-- Leased sessions are spared; how many of them lie before the next batch is the caller's to keep.
local removed = {sessions = 0, replies = 0, jobs = 0}
local more, changed = false, false

local function due(key, before, skipped)
  local ids = redis.call('ZRANGEBYSCORE', key, '-inf', before, 'LIMIT', skipped, given.batch)
  more, changed = more or #ids == given.batch, changed or #ids > 0
  return ids
end

local spared_expired = given.spared_expired
for _, id in ipairs(due(BY_EXPIRY, now, spared_expired)) do
  local session = load(id)
  if alive(session) then
    spared_expired = spared_expired + 1
  else
    purge(id, session)
    removed.sessions = removed.sessions + 1
  end
end

for _, kind in ipairs({{BY_REPLY, REPLIES, 'replies'}, {BY_JOB, JOBS, 'jobs'}}) do
  for _, member in ipairs(due(kind[1], now, 0)) do
    local id, item = string.match(member, '^(%Z*%z%Z*%z%Z*)%z(%Z*)$')
    redis.call('HDEL', kind[2] .. id, item)
    redis.call('ZREM', kind[1], member)
    if redis.call('EXISTS', SESSION .. id, JOBS .. id) == 0 then listed(id, 'ZREM') end
    removed[kind[3]] = removed[kind[3]] + 1
  end
end

-- A lease that ran out may still commit; after so long its holder is taken for dead.
for _, id in ipairs(due(BY_LEASE, now - given.lease_grace, 0)) do
  drop_lease(id, load(id))
end

local spared_old = given.spared_old
if given.max_sessions then
  local over = tonumber(redis.call('HGET', TOTALS, 'sessions') or 0) - given.max_sessions
  local last = spared_old + math.min(over, given.batch) - 1
  local ids = over > 0 and redis.call('ZRANGE', BY_USE, spared_old, last) or {}
  for _, id in ipairs(ids) do
    local session = load(id)
    if leased(session) then
      spared_old = spared_old + 1
    else
      purge(id, session)
      removed.sessions = removed.sessions + 1
      over, changed = over - 1, true
    end
  end
  if over > 0 and #ids > 0 then more = true end
end

if changed then keep_time() end
return {
  'ok', removed.sessions, removed.replies, removed.jobs, spared_expired, spared_old,
  more and 0 or 1,
}
