"""The Lua scripts: what must be decided and written at once, so that a stale agent can never slip in between.

Every key is in KEYS and shares the endpoint's hash tag. A reply is a list: 'ok' and values, or 'refused', reason, the
fence's epoch, detail. What a tenant can write is compared, never parsed: where a decision needs what stands in a
message, the caller reads it and says which message it has read.
"""

from coserve_contract.message import MESSAGE_BYTES

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
  if fence[1] ~= ARGV[3] then return refused('stale_epoch', fence[1], fence[2]) end
  if fence[2] ~= ARGV[2] then return refused('not_owner', fence[1], fence[2]) end
  local incarnation = redis.call('GET', KEYS[1])
  if incarnation ~= ARGV[1] then return refused('incarnation', fence[1], incarnation) end
  if needs_lease and redis.call('GET', KEYS[3]) ~= mine then return refused('lost_lease', fence[1], fence[2]) end
  return nil
end
"""
)

# Tell the operator to look. By commands that an endpoint's user of the version before has, too: so no INCR.
_MARK = """
local function mark(key)
  local now = redis.call('TIME')
  redis.call('SET', key, now[1] .. '.' .. now[2])
end
"""

# KEYS: 1 incarnation, 2 agents, 3 agent, 4 changed. ARGV: 1 agent, 2 heartbeat, 3 TTL ms, 4 '1' to mark a change.
HEARTBEAT = (
    _MARK
    + """
local now = redis.call('TIME')
redis.call('ZADD', KEYS[2], now[1] * 1000 + math.floor(now[2] / 1000), ARGV[1])
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3])
if ARGV[4] == '1' then mark(KEYS[4]) end
return {'ok', redis.call('GET', KEYS[1]) or ''}
"""
)

# KEYS: 1 agents, 2 agent, 3 changed. ARGV: 1 agent.
LEAVE = (
    _MARK
    + """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
mark(KEYS[3])
return {'ok'}
"""
)

# KEYS: guard's, 4 checkpoint, 5 result, 6 shards. ARGV: guard's, 4 TTL ms, 5 the checkpoint that the caller has read
# ('' is none), 6 the ID of the first shard after it.
TAKE_LEASE = (
    _GUARD
    + """
local no = fenced(false)
if no then return no end
if redis.call('EXISTS', KEYS[5]) == 1 then return refused('finished', ARGV[3]) end
if (redis.call('GET', KEYS[4]) or '') ~= ARGV[5] then return refused('changed', ARGV[3]) end
redis.call('SET', KEYS[3], mine, 'PX', ARGV[4])
redis.call('XTRIM', KEYS[6], 'MINID', '=', ARGV[6])
return {'ok'}
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

# A stream that has lost its last entry goes: its IDs may begin again.
_FIRST = """
local function first(stream)
  local entry = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
  if entry then return entry[1] end
  redis.call('DEL', stream)
end
"""

# KEYS: guard's, 4 progress, 5 eval. ARGV: guard's, 4 progress, 5 the last held-out shard that the agent has in its own
# keeping, 6 the ID of the next; '' where it reads the stream again and again. One that begins anew lowers it, and the
# stream, too.
REPORT_PROGRESS = (
    _GUARD
    + _FIRST
    + """
local no = fenced(true)
if no then return no end
redis.call('SET', KEYS[4], ARGV[4])
if ARGV[5] ~= '' then
  redis.call('XTRIM', KEYS[5], 'MINID', '=', ARGV[6])
  local begin = first(KEYS[5])
  if begin and begin ~= ARGV[6] then redis.call('DEL', KEYS[5]) end
end
return {'ok'}
"""
)

# Shards up to the cursor are never read again; without them the stream is exactly cursor+1, cursor+2, ... KEYS:
# guard's, 4 checkpoint, 5 shards. ARGV: guard's, 4 the checkpoint that the caller has read ('' is none), 5 its step
# where it covers more than the new one, else '', 6 the new one, 7 the ID of the first shard after that.
ACCEPT_CHECKPOINT = (
    _GUARD
    + """
local no = fenced(true)
if no then return no end
if (redis.call('GET', KEYS[4]) or '') ~= ARGV[4] then return refused('changed', ARGV[3]) end
if ARGV[5] ~= '' then return refused('behind', ARGV[3], ARGV[5]) end
redis.call('SET', KEYS[4], ARGV[6])
redis.call('XTRIM', KEYS[5], 'MINID', '=', ARGV[7])
return {'ok'}
"""
)

# An accepted checkpoint turned out to be unreadable. KEYS: guard's, 4 checkpoint, 5 shards, 6 progress, 7 eval, 8
# changed. ARGV: guard's, 4 the checkpoint that the caller has read, 5 its step where it is no later than the new one,
# else '', 6 the new one or ''.
REWIND = (
    _GUARD
    + _MARK
    + """
local no = fenced(true)
if no then return no end
if (redis.call('GET', KEYS[4]) or '') ~= ARGV[4] then return refused('changed', ARGV[3]) end
if ARGV[5] ~= '' then return refused('behind', ARGV[3], ARGV[5]) end
redis.call('DEL', KEYS[4], KEYS[5], KEYS[6], KEYS[7])
if ARGV[6] ~= '' then redis.call('SET', KEYS[4], ARGV[6]) end
mark(KEYS[8])
return {'ok'}
"""
)

# KEYS: guard's, 4 result, 5 shards, 6 eval, 7 changed. ARGV: guard's, 4 result, 5 '1' when the job ends with it.
FINISH = (
    _GUARD
    + _MARK
    + """
if redis.call('GET', KEYS[4]) == ARGV[4] then return {'ok'} end
local no = fenced(true)
if no then return no end
redis.call('SET', KEYS[4], ARGV[4])
redis.call('DEL', KEYS[3])
if ARGV[5] == '1' then redis.call('DEL', KEYS[5], KEYS[6]) end
mark(KEYS[7])
return {'ok'}
"""
)

# ---- the operator's: each begins with KEYS: 1 token. ARGV: 1 token ----

# The greatest token of an operator that wrote here stands in Redis; one with a smaller token leads no more.
_LED = (
    _REFUSE
    + """
local token = tonumber(redis.call('GET', KEYS[1]) or 0)
if token > tonumber(ARGV[1]) then return refused('stale_token', '', string.format('%d', token)) end
if token < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
"""
)

LED = _LED + "return {'ok'}"

# The first write of a leader: its token must be greater than any that was here.
CLAIM = (
    _REFUSE
    + """
local token = tonumber(redis.call('GET', KEYS[1]) or 0)
if token >= tonumber(ARGV[1]) then return refused('stale_token', '', string.format('%d', token)) end
redis.call('SET', KEYS[1], ARGV[1])
return {'ok'}
"""
)

# KEYS: 2 jobs, 3 fence, 4 owner, 5 checkpoint, 6 result, 7 shards, 8 bindings of the old agent, 9 bindings of the new,
# 10 eval: the agent before may have let go of its first shards, and an older one begins with them.
# ARGV: 2 job; as the caller has read them: 3 epoch, 4 agent, 5 checkpoint, 6 result, of which the first bytes count;
# 7 agent, 8 epoch, 9 binding, 10 checkpoint to put in the place of that, 11 the ID of the first shard after it; '' is
# none.
BIND = (
    _LED
    + f"""
local function read(key) return redis.call('GETRANGE', key, 0, {MESSAGE_BYTES}) end
"""
    + """
local fence = redis.call('HMGET', KEYS[3], 'epoch', 'agent')
local epoch, agent = fence[1] or '', fence[2] or ''
if epoch ~= ARGV[3] or agent ~= ARGV[4] or read(KEYS[5]) ~= ARGV[5] or read(KEYS[6]) ~= ARGV[6] then
  return refused('changed', epoch, agent)
end
if ARGV[10] ~= '' then
  redis.call('SET', KEYS[5], ARGV[10])
  redis.call('XTRIM', KEYS[7], 'MINID', '=', ARGV[11])
end
if epoch ~= '' then redis.call('DEL', KEYS[10]) end
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('HSET', KEYS[3], 'epoch', ARGV[8], 'agent', ARGV[7])
redis.call('DEL', KEYS[4], KEYS[6])
redis.call('HDEL', KEYS[8], ARGV[2])
redis.call('HSET', KEYS[9], ARGV[2], ARGV[9])
return {'ok'}
"""
)

# Change what the bound agent should do. KEYS: 2 fence, 3 bindings of the agent. ARGV: 2 job, 3 agent, 4 epoch, 5
# binding.
REBRIEF = (
    _LED
    + """
local fence = redis.call('HMGET', KEYS[2], 'epoch', 'agent')
if not fence[1] then return refused('no_fence') end
if fence[1] ~= ARGV[4] then return refused('stale_epoch', fence[1], fence[2]) end
if fence[2] ~= ARGV[3] then return refused('not_owner', fence[1], fence[2]) end
redis.call('HSET', KEYS[3], ARGV[2], ARGV[5])
return {'ok'}
"""
)

# Bind to nobody. KEYS: 2 fence, 3 owner, 4 bindings of the agent. ARGV: 2 job, 3 agent, 4 epoch.
UNBIND = (
    _LED
    + """
local fence = redis.call('HMGET', KEYS[2], 'epoch', 'agent')
if not fence[1] then return refused('no_fence') end
if fence[1] ~= ARGV[4] then return refused('stale_epoch', fence[1], fence[2]) end
if fence[2] ~= ARGV[3] and fence[2] ~= '' then return refused('not_owner', fence[1], fence[2]) end
redis.call('HSET', KEYS[2], 'agent', '')
redis.call('DEL', KEYS[3])
redis.call('HDEL', KEYS[4], ARGV[2])
return {'ok'}
"""
)

# KEYS: 2 jobs. ARGV: 2... jobs.
REGISTER = (
    _LED
    + """
redis.call('SADD', KEYS[2], unpack(ARGV, 2))
return {'ok'}
"""
)

# KEYS: 2 jobs, 3 bindings of the job's agent, or any of the following, 4... the job's. ARGV: 2 job.
FORGET = (
    _LED
    + """
redis.call('UNLINK', unpack(KEYS, 4))
redis.call('SREM', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
return {'ok'}
"""
)

# KEYS: 2 adapters. ARGV: 2... names and records.
SET_ADAPTERS = (
    _LED
    + """
redis.call('UNLINK', KEYS[2])
if #ARGV > 1 then redis.call('HSET', KEYS[2], unpack(ARGV, 2)) end
return {'ok'}
"""
)

# KEYS: 2 incarnation. ARGV: 2 incarnation.
SET_INCARNATION = (
    _LED
    + """
redis.call('SET', KEYS[2], ARGV[2])
return {'ok'}
"""
)

# KEYS: 2... what is deleted.
DROP = (
    _LED
    + """
for n = 2, #KEYS do redis.call('UNLINK', KEYS[n]) end
return {'ok'}
"""
)

# KEYS: 2 agents. ARGV: 2 age ms. Answers the agents without a heartbeat for that long, and forgets them.
SWEEP = (
    _LED
    + """
local now = redis.call('TIME')
local limit = now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[2]
local lost = redis.call('ZRANGE', KEYS[2], '-inf', limit, 'BYSCORE')
if #lost > 0 then redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', limit) end
return {'ok', lost}
"""
)

# ---- what is read, and the feeder's ----

# What may have changed of many endpoints. KEYS: changed and agents, of each. ARGV: 1 age ms. Answers the beginning of
# the mark and the number of agents without a heartbeat for that long, of each; of what is of another type an error.
CHANGES = """
local now = redis.call('TIME')
local limit = now[1] * 1000 + math.floor(now[2] / 1000) - ARGV[1]
local found = {}
for n = 1, #KEYS, 2 do
  found[n] = redis.pcall('GETRANGE', KEYS[n], 0, 63)
  found[n + 1] = redis.pcall('ZCOUNT', KEYS[n + 1], '-inf', limit)
end
return found
"""

# All of a job at one moment. KEYS: 1 fence, 2 owner, 3 checkpoint, 4 progress, 5 result, 6 shards, 7 eval, 8 feed.
JOB = """
local said = redis.call('MGET', KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[8])
return {
  redis.call('HMGET', KEYS[1], 'epoch', 'agent'),
  said[1], said[2], said[3], said[4],
  redis.call('XLEN', KEYS[6]), redis.call('XLEN', KEYS[7]), said[5],
}
"""

# The same of many jobs, as far as it may be read. KEYS: as for JOB, of each. ARGV: 1 the index of the last byte that is
# read of a string. Of what is of another type it answers an error.
JOBS = """
local found = {}
local function text(key) return redis.pcall('GETRANGE', key, 0, ARGV[1]) end
for n = 1, #KEYS, 8 do
  found[#found + 1] = {
    redis.pcall('HMGET', KEYS[n], 'epoch', 'agent'),
    text(KEYS[n + 1]), text(KEYS[n + 2]), text(KEYS[n + 3]), text(KEYS[n + 4]),
    redis.pcall('XLEN', KEYS[n + 5]), redis.pcall('XLEN', KEYS[n + 6]), text(KEYS[n + 7]),
  }
end
return found
"""

# KEYS: 1 feed, 2 changed. ARGV: 1 feed.
SET_FEED = (
    _MARK
    + """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[1])
  mark(KEYS[2])
end
return {'ok'}
"""
)

# KEYS: 1 shards, 2 checkpoint. ARGV: 1 number, 2 the checkpoint that the caller has read ('' is none), 3 its cursor, 4
# the greatest number that there is room for, 5... fields. The stream holds cursor+1, cursor+2, ... without a gap.
PUSH_SHARD = """
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[2] then return {'changed', 0} end
local number, last = tonumber(ARGV[1]), tonumber(ARGV[3]) + redis.call('XLEN', KEYS[1])
if number <= last then return {'present', last} end
if number > last + 1 then return {'gap', last} end
if number > tonumber(ARGV[4]) then return {'full', last} end
redis.call('XADD', KEYS[1], string.format('%d-0', number), unpack(ARGV, 5))
return {'ok', number}
"""

# KEYS: 1 eval, 2 fence, 3 progress. ARGV: 1 number, what the caller has read of 2 the fence's epoch and 3 the progress
# ('' is none), 4 the cursor in that, 5 the greatest number that there is room for, 6... fields. The stream holds
# cursor+1, cursor+2, ...
PUSH_EVAL = (
    _FIRST
    + """
local epoch = redis.call('HMGET', KEYS[2], 'epoch')[1] or ''
if epoch ~= ARGV[2] or (redis.call('GET', KEYS[3]) or '') ~= ARGV[3] then return {'changed', 0} end
local number, cursor = tonumber(ARGV[1]), tonumber(ARGV[4])
local begin = first(KEYS[1])
if begin and begin ~= string.format('%d-0', cursor + 1) then redis.call('DEL', KEYS[1]) end
local last = cursor + redis.call('XLEN', KEYS[1])
if number <= last then return {'present', last} end
if number > last + 1 then return {'gap', last} end
if number > tonumber(ARGV[5]) then return {'full', last} end
redis.call('XADD', KEYS[1], string.format('%d-0', number), unpack(ARGV, 6))
return {'ok', number}
"""
)
