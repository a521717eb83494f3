#!lua flags=no-writes
-- {'ok', last member seen or '', row, row, ...}
--
-- Names without a live session are passed over, but only so many per call: the server waits.
local PATIENCE = 10000
local key = NAMES .. given.tenant
if given.fingerprint then key = key .. '\0' .. given.fingerprint end
local low, high = '[' .. given.prefix, '+'
if given.prefix ~= '' then high = '(' .. given.prefix .. '\255' end
if given.after and given.after >= given.prefix then low = '(' .. given.after end

local result, last, seen = {'ok', ''}, '', 0
while seen < PATIENCE do
  local members = redis.call('ZRANGEBYLEX', key, low, high, 'LIMIT', 0, given.limit + 1)
  if #members == 0 then return result end
  for _, member in ipairs(members) do
    local name, fingerprint = string.match(member, '^(%Z*)%z(%Z*)$')
    local id = given.tenant .. '\0' .. fingerprint .. '\0' .. name
    local session = load(id)
    if alive(session) then
      if #result == given.limit + 2 then
        result[2] = last
        return result
      end
      result[#result + 1] = {
        name, fingerprint, session.version, session.incarnation, session.tokens, session.bytes,
        session.created, session.updated, session.expires or '', leased(session) and 1 or 0,
        session.fork_name or '', session.fork_version or 0,
      }
    end
    last = member
  end
  seen = seen + #members
  low = '(' .. last
end
result[2] = last
return result
