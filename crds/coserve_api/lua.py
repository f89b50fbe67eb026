"""The Lua scripts: what must be decided and written at once, so that a stale agent can never slip in between.

Every key is in KEYS and shares the endpoint's hash tag. A reply is a list: 'ok' and values, or 'refused', reason, the
fence's epoch, detail.
"""

_REFUSE = """
local function refused(reason, epoch, detail)
  return {'refused', reason, tostring(epoch or ''), tostring(detail or '')}
end
"""

# KEYS: 1 incarnation, 2 fence, 3 owner. ARGV: 1 incarnation, 2 agent, 3 epoch. Answers nil, or why the caller may not
# write.
_GUARD = (
    _REFUSE
    + """
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
"""
)

# Shards up to the cursor are never read again; without them the stream is exactly cursor+1, cursor+2, ...
_TRIM = """
local function trim(stream, cursor)
  redis.call('XTRIM', stream, 'MINID', '=', string.format('%d-0', cursor + 1))
end
"""

# KEYS: 1 incarnation, 2 agents, 3 agent. ARGV: 1 agent, 2 heartbeat, 3 TTL ms.
HEARTBEAT = """
local now = redis.call('TIME')
redis.call('ZADD', KEYS[2], now[1] * 1000 + math.floor(now[2] / 1000), ARGV[1])
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3])
return {'ok', redis.call('GET', KEYS[1]) or ''}
"""

# KEYS: guard's, 4 checkpoint, 5 result, 6 shards. ARGV: guard's, 4 TTL ms.
TAKE_LEASE = (
    _GUARD
    + _TRIM
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

# KEYS: guard's. ARGV: guard's, 4 TTL ms.
RENEW_LEASE = (
    _GUARD
    + """
local no = fenced(true)
if no then return no end
redis.call('PEXPIRE', KEYS[3], ARGV[4])
return {'ok'}
"""
)

# KEYS: guard's. ARGV: guard's.
RELEASE_LEASE = (
    _GUARD
    + """
local no = fenced(true)
if no then return no end
redis.call('DEL', KEYS[3])
return {'ok'}
"""
)

# KEYS: guard's, 4 progress. ARGV: guard's, 4 progress.
REPORT_PROGRESS = (
    _GUARD
    + """
local no = fenced(true)
if no then return no end
redis.call('SET', KEYS[4], ARGV[4])
return {'ok'}
"""
)

# KEYS: guard's, 4 checkpoint, 5 shards. ARGV: guard's, 4 checkpoint.
ACCEPT_CHECKPOINT = (
    _GUARD
    + _TRIM
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

# An accepted checkpoint turned out to be unreadable. KEYS: guard's, 4 checkpoint, 5 shards, 6 progress. ARGV: guard's,
# 4 checkpoint or ''.
REWIND = (
    _GUARD
    + """
local no = fenced(true)
if no then return no end
local old = redis.call('GET', KEYS[4])
if not old then return refused('behind', ARGV[3], 0) end
if ARGV[4] == '' then
  redis.call('DEL', KEYS[4])
else
  if cjson.decode(ARGV[4]).step >= cjson.decode(old).step then return refused('behind', ARGV[3], cjson.decode(old).step)
  end
  redis.call('SET', KEYS[4], ARGV[4])
end
redis.call('DEL', KEYS[5], KEYS[6])
return {'ok'}
"""
)

# KEYS: guard's, 4 result, 5 shards, 6 eval. ARGV: guard's, 4 result, 5 '1' when the job ends with it.
FINISH = (
    _GUARD
    + """
if redis.call('GET', KEYS[4]) == ARGV[4] then return {'ok'} end
local no = fenced(true)
if no then return no end
redis.call('SET', KEYS[4], ARGV[4])
redis.call('DEL', KEYS[3])
if ARGV[5] == '1' then redis.call('DEL', KEYS[5], KEYS[6]) end
return {'ok'}
"""
)

# KEYS: 1 jobs, 2 fence, 3 owner, 4 checkpoint, 5 result, 6 shards, 7 bindings of the old agent, 8 bindings of the new.
# ARGV: 1 job, 2 old agent as the caller saw it, 3 agent, 4 epoch, 5 binding, 6 checkpoint to resume from or ''.
BIND = (
    _REFUSE
    + _TRIM
    + """
local fence = redis.call('HMGET', KEYS[2], 'epoch', 'agent')
if (fence[2] or '') ~= ARGV[2] then return refused('changed', fence[1], fence[2]) end
if fence[1] and tonumber(fence[1]) >= tonumber(ARGV[4]) then return refused('stale_epoch', fence[1], fence[2]) end
local result = redis.call('GET', KEYS[5])
if result and cjson.decode(result).outcome ~= 'Released' then return refused('finished', fence[1], fence[2]) end
if ARGV[6] ~= '' then
  local resume, held = cjson.decode(ARGV[6]), redis.call('GET', KEYS[4])
  if not held or cjson.decode(held).step < resume.step then
    redis.call('SET', KEYS[4], ARGV[6])
    trim(KEYS[6], resume.cursor)
  end
end
redis.call('SADD', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[2], 'epoch', ARGV[4], 'agent', ARGV[3])
redis.call('DEL', KEYS[3], KEYS[5])
redis.call('HDEL', KEYS[7], ARGV[1])
redis.call('HSET', KEYS[8], ARGV[1], ARGV[5])
return {'ok'}
"""
)

# Change what the bound agent should do. KEYS: 1 fence, 2 bindings of the agent. ARGV: 1 job, 2 agent, 3 epoch, 4
# binding.
REBRIEF = (
    _REFUSE
    + """
local fence = redis.call('HMGET', KEYS[1], 'epoch', 'agent')
if not fence[1] then return refused('no_fence') end
if tonumber(fence[1]) ~= tonumber(ARGV[3]) then return refused('stale_epoch', fence[1], fence[2]) end
if fence[2] ~= ARGV[2] then return refused('not_owner', fence[1], fence[2]) end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[4])
return {'ok'}
"""
)

# Bind to nobody. KEYS: 1 fence, 2 owner, 3 bindings of the agent. ARGV: 1 job, 2 agent, 3 epoch.
UNBIND = (
    _REFUSE
    + """
local fence = redis.call('HMGET', KEYS[1], 'epoch', 'agent')
if not fence[1] then return refused('no_fence') end
if tonumber(fence[1]) ~= tonumber(ARGV[3]) then return refused('stale_epoch', fence[1], fence[2]) end
if fence[2] ~= ARGV[2] and fence[2] ~= '' then return refused('not_owner', fence[1], fence[2]) end
redis.call('HSET', KEYS[1], 'agent', '')
redis.call('DEL', KEYS[2])
redis.call('HDEL', KEYS[3], ARGV[1])
return {'ok'}
"""
)

# KEYS: 1 agents. ARGV: 1 age ms. Answers the agents without a heartbeat for that long, and forgets them.
SWEEP = """
local now = redis.call('TIME')
local limit = now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[1]
local lost = redis.call('ZRANGE', KEYS[1], '-inf', limit, 'BYSCORE')
if #lost > 0 then redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', limit) end
return lost
"""

# All of a job at one moment. KEYS: 1 fence, 2 shards, 3 owner, 4 checkpoint, 5 progress, 6 result, 7 feed.
JOB = """
local fence = redis.call('HMGET', KEYS[1], 'epoch', 'agent')
local messages = redis.call('MGET', KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7])
return {fence, redis.call('XLEN', KEYS[2]), messages}
"""

# KEYS: 1 shards, 2 checkpoint, 3 progress. ARGV: 1 number, 2 bound, 3... fields. The stream holds cursor+1, cursor+2,
# ... without a gap.
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

# KEYS: 1 eval. ARGV: 1 number, 2... fields.
PUSH_EVAL = """
local number, last = tonumber(ARGV[1]), redis.call('XLEN', KEYS[1])
if number <= last then return {'present', last} end
if number > last + 1 then return {'gap', last} end
redis.call('XADD', KEYS[1], string.format('%d-0', number), unpack(ARGV, 2))
return {'ok', number}
"""
