"""Scripts as agents and feeders of the version before send them."""

GUARD = """
local function refused(reason, epoch, detail)
  return {'refused', reason, tostring(epoch or ''), tostring(detail or '')}
end

local mine = ARGV[2] .. ':' .. ARGV[3]
local function fenced(needs_lease)
  local fence = redis.call('HMGET', KEYS[2], 'epoch', 'agent')
  if not fence[1] then return refused('no_fence') end
  if tonumber(fence[1]) ~= tonumber(ARGV[3]) then return refused('stale_epoch', fence[1], fence[2]) end
  if fence[2] ~= ARGV[2] then return refused('not_owner', fence[1], fence[2]) end
  local incarnation = redis.call('GET', KEYS[1])
  if incarnation ~= ARGV[1] then return refused('incarnation', fence[1], incarnation) end
  if needs_lease and redis.call('GET', KEYS[3]) ~= mine then return refused('lost_lease', fence[1], fence[2]) end
  return nil
end

local function trim(stream, cursor)
  redis.call('XTRIM', stream, 'MINID', '=', string.format('%d-0', cursor + 1))
end
"""

TAKE_LEASE = (
    GUARD
    + """
local no = fenced(false)
if no then return no end
if redis.call('EXISTS', KEYS[5]) == 1 then return refused('finished', ARGV[3]) end
redis.call('SET', KEYS[3], mine, 'PX', ARGV[4])
local checkpoint = redis.call('GET', KEYS[4])
if checkpoint then trim(KEYS[6], cjson.decode(checkpoint).cursor) end
return {'ok', checkpoint or ''}
"""
)

ACCEPT_CHECKPOINT = (
    GUARD
    + """
local no = fenced(true)
if no then return no end
local old, new = redis.call('GET', KEYS[4]), cjson.decode(ARGV[4])
if old then
  old = cjson.decode(old)
  if old.step > new.step or old.cursor > new.cursor then return refused('behind', ARGV[3], old.step) end
end
redis.call('SET', KEYS[4], ARGV[4])
trim(KEYS[5], new.cursor)
return {'ok'}
"""
)

PUSH_SHARD = """
local number, checkpoint, progress = tonumber(ARGV[1]), redis.call('GET', KEYS[2]), redis.call('GET', KEYS[3])
local cursor = checkpoint and cjson.decode(checkpoint).cursor or 0
local read = math.max(cursor, progress and cjson.decode(progress).cursor or 0)
local last = cursor + redis.call('XLEN', KEYS[1])
if number <= last then return {'present', last} end
if number > last + 1 then return {'gap', last} end
if number > read + tonumber(ARGV[2]) then return {'full', last} end
redis.call('XADD', KEYS[1], string.format('%d-0', number), unpack(ARGV, 3))
return {'ok', number}
"""
