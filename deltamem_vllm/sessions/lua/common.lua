-- Put between a script's first line and its body: the keys, the clock, and what one session is.
--
-- KEYS[1] is the store's prefix; it carries the hash tag. ARGV[1] is a msgpack map of small
-- arguments, further ARGVs are blobs. An id is tenant NUL fingerprint NUL name; no part has a NUL.
--
--   session:<id>          hash: head, and per version n its meta (m<n>) and its content (d<n>)
--   replies:<id>          hash: turn -> {expires, version, request hash, reply}
--   jobs:<id>             hash: job -> {expires, content}
--   names:<tenant>        sorted set of name NUL fingerprint, in order of bytes; and the same for
--   names:<tenant>NUL<fingerprint>      one fingerprint. Lists sessions, leased names and jobs.
--   tenant:<tenant>       hash: sessions, bytes
--   by_use, by_expiry, by_lease, by_reply, by_job    sorted sets of ids (NUL turn or job) by time
--   totals                hash: sessions, versions, bytes
--   done:<call>           the result of a write, for a client that lost the answer
--   clock                 the latest time that was given out
--
-- Times are microseconds since the epoch.

local prefix = KEYS[1]
local given = cmsgpack.unpack(ARGV[1])

local SESSION, REPLIES, JOBS = prefix .. 'session:', prefix .. 'replies:', prefix .. 'jobs:'
local NAMES, TENANT, DONE = prefix .. 'names:', prefix .. 'tenant:', prefix .. 'done:'
local BY_USE, BY_EXPIRY = prefix .. 'by_use', prefix .. 'by_expiry'
local BY_LEASE, BY_REPLY, BY_JOB = prefix .. 'by_lease', prefix .. 'by_reply', prefix .. 'by_job'
local TOTALS, CLOCK = prefix .. 'totals', prefix .. 'clock'

-- Never goes back, and no two writes share a time: then an unchanged clock proves that nothing
-- was written in between.
local now
do
  local time = redis.call('TIME')
  local latest = tonumber(redis.call('GET', CLOCK) or 0)
  now = math.max(time[1] * 1000000 + time[2], latest + 1)
end

local function keep_time()
  redis.call('SET', CLOCK, now)
end

-- A client that lost the answer asks again under the same call id. The clock is written even
-- then: WAITAOF waits for writes of its own connection only.
local function remembered()
  local result = redis.call('GET', DONE .. given.call)
  if result then
    keep_time()
    return cmsgpack.unpack(result)
  end
end

local function remember(result)
  redis.call('SET', DONE .. given.call, cmsgpack.pack(result), 'PX', given.call_ms)
  keep_time()
  return result
end

local function id_of(name)
  return given.tenant .. '\0' .. given.fingerprint .. '\0' .. name
end

local function parts(id)
  return string.match(id, '^(%Z*)%z(%Z*)%z(%Z*)')
end

local function load(id)
  local head = redis.call('HGET', SESSION .. id, 'head')
  return head and cmsgpack.unpack(head) or nil
end

local function leased(session)
  return session.lease ~= nil and session.lease.ends > now
end

-- A turn keeps its session from expiring under it.
local function alive(session)
  return session ~= nil and session.version > 0
    and (session.expires == nil or session.expires > now or leased(session))
end

local function listed(id, command)
  local tenant, fingerprint, name = parts(id)
  local member = name .. '\0' .. fingerprint
  for _, key in ipairs({NAMES .. tenant, NAMES .. tenant .. '\0' .. fingerprint}) do
    if command == 'ZADD' then
      redis.call('ZADD', key, 0, member)
    else
      redis.call('ZREM', key, member)
    end
  end
end

local function save(id, session)
  if redis.call('HSET', SESSION .. id, 'head', cmsgpack.pack(session)) == 1 then
    listed(id, 'ZADD')
  end
  if session.lease then
    redis.call('ZADD', BY_LEASE, session.lease.ends, id)
  else
    redis.call('ZREM', BY_LEASE, id)
  end
end

-- Take the lease away, and with it a name that has no session.
local function drop_lease(id, session)
  session.lease = nil
  if session.version > 0 then
    save(id, session)
    return
  end
  redis.call('DEL', SESSION .. id)
  redis.call('ZREM', BY_LEASE, id)
  if redis.call('EXISTS', JOBS .. id) == 0 then listed(id, 'ZREM') end
end

local function count(id, sessions, versions, bytes)
  local tenant = TENANT .. parts(id)
  if redis.call('HINCRBY', tenant, 'sessions', sessions) == 0 then
    redis.call('DEL', tenant)
  else
    redis.call('HINCRBY', tenant, 'bytes', bytes)
  end
  redis.call('HINCRBY', TOTALS, 'sessions', sessions)
  redis.call('HINCRBY', TOTALS, 'versions', versions)
  redis.call('HINCRBY', TOTALS, 'bytes', bytes)
end

-- Remove all that belongs to an id; `session` may be nil.
local function purge(id, session)
  if session and session.version > 0 then
    -- Not -session.bytes: that of 0 is written "-0", which Redis takes for no integer.
    count(id, -1, session.first - session.version - 1, 0 - session.bytes)
    redis.call('ZREM', BY_USE, id)
    redis.call('ZREM', BY_EXPIRY, id)
  end
  redis.call('ZREM', BY_LEASE, id)
  for _, turn in ipairs(redis.call('HKEYS', REPLIES .. id)) do
    redis.call('ZREM', BY_REPLY, id .. '\0' .. turn)
  end
  for _, job in ipairs(redis.call('HKEYS', JOBS .. id)) do
    redis.call('ZREM', BY_JOB, id .. '\0' .. job)
  end
  redis.call('DEL', SESSION .. id, REPLIES .. id, JOBS .. id)
  listed(id, 'ZREM')
  keep_time()
end

local function full_of_sessions(id)
  local used = tonumber(redis.call('HGET', TENANT .. parts(id), 'sessions') or 0)
  if given.tenant_sessions and used >= given.tenant_sessions then
    return {'quota', 'sessions', used}
  end
end

local function meta_of(id, version)
  return cmsgpack.unpack(redis.call('HGET', SESSION .. id, 'm' .. version))
end

-- Make the next version and prune the oldest; returns a refusal, or nil.
local function grow(id, session, version)
  if session.version == 0 then
    local refusal = full_of_sessions(id)
    if refusal then return refusal end
  end
  local number = session.version + 1
  local first, freed, fields = session.first, 0, {}
  while first <= number - given.versions_kept and first < number do
    freed = freed + meta_of(id, first).bytes
    fields[#fields + 1] = 'm' .. first
    fields[#fields + 1] = 'd' .. first
    first = first + 1
  end
  if given.tenant_bytes and version.bytes > freed then
    local used = tonumber(redis.call('HGET', TENANT .. parts(id), 'bytes') or 0)
    if used + version.bytes - freed > given.tenant_bytes then
      return {'quota', 'bytes', used}
    end
  end
  local meta = {
    parent = version.parent, created = now, bytes = version.bytes, tokens = version.tokens,
  }
  redis.call('HSET', SESSION .. id,
    'm' .. number, cmsgpack.pack(meta), 'd' .. number, version.content)
  if #fields > 0 then
    redis.call('HDEL', SESSION .. id, unpack(fields))
  end
  count(id, number == 1 and 1 or 0, 1 - (first - session.first), version.bytes - freed)
  session.version, session.first = number, first
  session.bytes = session.bytes + version.bytes - freed
  session.tokens = version.tokens
  session.created, session.updated = session.created or now, now
  redis.call('ZADD', BY_USE, now, id)
  if session.ttl then
    session.expires = now + session.ttl
    redis.call('ZADD', BY_EXPIRY, session.expires, id)
  end
end

-- A head for a new session, where none lives and no first turn runs; or nil and why not.
local function vacant(id)
  local session = load(id)
  if alive(session) then return nil, {'exists'} end
  if session and leased(session) then return nil, {'busy'} end
  if session and session.version > 0 then purge(id, session) end
  return {incarnation = given.incarnation, version = 0, first = 1, bytes = 0, tokens = 0}
end

local function record(id, session, version)
  local meta = meta_of(id, version)
  return {
    'ok', version, session.incarnation, meta.parent, meta.created, session.expires or '',
    session.fork_name or '', session.fork_version or 0,
  }
end

-- Append the content, which results that are remembered must not keep alive.
local function with_content(id, result)
  local content = redis.call('HGET', SESSION .. id, 'd' .. result[2])
  if not content then return {'missing'} end
  result[#result + 1] = content
  return result
end

-- The remembered result of a write that returns content, if that is still there.
local function recalled(id)
  local result = remembered()
  if not result then return nil end
  local session = load(id)
  if session == nil or session.incarnation ~= result[3] then return {'missing'} end
  return with_content(id, result)
end

-- Why a lease holds no longer, or nil.
local function lapsed(session)
  if session == nil then return {'deleted'} end
  if session.lease == nil or session.lease.token ~= given.token then
    if session.version > 0 and session.incarnation ~= given.incarnation then
      return {'deleted'}
    end
    return {'taken'}
  end
  if session.version > 0 and not alive(session) then return {'deleted'} end
end
