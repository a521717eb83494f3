#!lua flags=no-writes
-- {'ok', record, record, ...}, newest first
local id = id_of(given.name)
local session = load(id)
local result = {'ok'}
if alive(session) then
  for version = session.version, session.first, -1 do
    result[#result + 1] = with_content(id, record(id, session, version))
  end
end
return result
