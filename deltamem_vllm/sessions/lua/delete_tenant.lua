#!lua flags=allow-oom
-- {'ok', sessions deleted, last member seen or '' at the end}
local done = remembered()
if done then return done end
local low = given.after and '(' .. given.after or '-'
local members = redis.call(
  'ZRANGEBYLEX', NAMES .. given.tenant, low, '+', 'LIMIT', 0, given.batch)
local deleted = 0
for _, member in ipairs(members) do
  local name, fingerprint = string.match(member, '^(%Z*)%z(%Z*)$')
  local id = given.tenant .. '\0' .. fingerprint .. '\0' .. name
  local session = load(id)
  if alive(session) then deleted = deleted + 1 end
  purge(id, session)
end
local last = #members == given.batch and members[#members] or ''
return remember({'ok', deleted, last})
