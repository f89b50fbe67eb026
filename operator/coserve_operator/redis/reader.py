"""What Redis holds of many endpoints, in two round trips. Tenants write it: none of it is trusted.

Strings are read by range, sets and hashes by count; a reply and a round trip have a bound of bytes. What does not read
is what is not known of that endpoint, and is said in its status; no endpoint's content keeps another from being read.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from coserve_api.errors import InvalidValueError, MessageError
from coserve_contract import lua
from coserve_contract.connect import command_time
from coserve_contract.keys import Keys
from coserve_contract.message import MESSAGE_BYTES, Message
from coserve_contract.messages import AdapterRecord, Binding, Heartbeat
from coserve_contract.store import MOST_AGENTS, JobRecord, job_record
from coserve_operator.decide.observed import RedisView, Unreadable
from coserve_operator.redis.bounded import REPLY_BYTES, ReplyTooLargeError, round_trip

logger = logging.getLogger(__name__)

MOST_ADAPTERS, MOST_JOBS = 1024, 20_000
MOST_BYTES, MOST_BROKEN_BYTES = 4 << 20, 256 << 10
"""Of an endpoint's messages together, and of those that do not read: parsing them takes the others' time."""
JOBS_AT_ONCE = REPLY_BYTES // (6 * MESSAGE_BYTES)
"""Read by one command: five messages each, and no more than a reply may have."""
TURN_BYTES = MESSAGE_BYTES
"""Parsed at a stretch, before others of the loop have their turn."""
KEPT_BYTES = 4 << 10
"""A message up to this size is kept with what it said: those of jobs are, by far, and rubbish takes no memory."""
INVALID_CONTENT = "InvalidContent"
_DELETE = "delete the key, and its writer writes it anew"


class _TooMuchError(Exception):
    """An endpoint whose messages are not looked at further."""


T = TypeVar("T")
M = TypeVar("M", bound=Message)
Wants = Mapping[str, Sequence[str]]
"""Job uids by endpoint uid."""
Found = dict[str, RedisView | Unreadable]
Parsed = dict[str, tuple[Any, Any]]
"""Of what stood under a key what it said."""
Settled = Callable[[str, bool], bool]
"""Of an endpoint, and whether it has no incarnation: whether a missing heartbeat proves something."""


class Reader:
    """Reads again and again: a message that is as it was is not parsed anew."""

    def __init__(self) -> None:
        self._parsed: dict[str, Parsed] = {}
        """By endpoint."""

    async def read(self, redis: Redis, wants: Wants, settled: Settled) -> Found:
        """Return what Redis holds of each endpoint and of the jobs given for it.

        RedisError, OSError: Redis could not be asked.
        """
        try:
            return await _read(redis, wants, settled, self._parsed)
        except ReplyTooLargeError as error:
            if len(wants) == 1:
                return {uid: _foreign(uid, str(error)) for uid in wants}
        each, middle = list(wants.items()), len(wants) // 2  # it is one of them, or all of them together
        found = await self.read(redis, dict(each[:middle]), settled)
        return found | await self.read(redis, dict(each[middle:]), settled)

    def forget(self, uid: str) -> None:
        """Drop what is remembered of an endpoint that is gone."""
        self._parsed.pop(uid, None)


async def _read(redis: Redis, wants: Wants, settled: Settled, parsed: dict[str, Parsed]) -> Found:
    first = redis.pipeline(transaction=False)
    for uid, jobs in wants.items():
        keys = Keys(uid)
        first.getrange(keys.incarnation(), 0, 255)
        first.zrange(keys.agents(), 0, MOST_AGENTS)
        first.srandmember(keys.jobs(), MOST_JOBS + 1)
        first.hrandfield(keys.adapters(), MOST_ADAPTERS + 1, withvalues=True)
        for start in range(0, len(jobs), JOBS_AT_ONCE):
            names = [name for job in jobs[start : start + JOBS_AT_ONCE] for name in keys.all_of_job(job)]
            first.eval(lua.JOBS, len(names), *names, MESSAGE_BYTES)
    answers = iter(await _execute(first))
    replies = {uid: _Replies.of(Keys(uid), jobs, answers, parsed.get(uid, {})) for uid, jobs in wants.items()}
    second = redis.pipeline(transaction=False)
    for each in replies.values():
        for agent in each.agents:
            second.getrange(each.keys.agent(agent), 0, MESSAGE_BYTES)
        for job, agent in each.bound:
            second.hget(each.keys.bindings(agent), job)
    answers = iter(await _execute(second))
    found = {uid: await each.finish(answers, settled) for uid, each in replies.items()}
    parsed |= {uid: each.parsed for uid, each in replies.items()}
    return found


async def _execute(pipeline: Pipeline) -> list[Any]:
    """Return an answer for each command, an exception where its key is of another type."""
    if not len(pipeline):
        return []
    async with command_time():
        with round_trip():
            answers = list(await pipeline.execute(raise_on_error=False))
    for answer in answers:
        for each in _each(answer):
            if isinstance(each, Exception) and not str(each).startswith("WRONGTYPE"):
                raise each  # Redis is busy, or has no memory left
    return answers


def _each(answer: Any) -> Iterator[Any]:
    """An answer and, of a script's, its parts."""
    yield answer
    if isinstance(answer, list) and answer and isinstance(answer[0], list):
        yield from itertools.chain.from_iterable(answer)


def _foreign(uid: str, problem: str) -> Unreadable:
    return Unreadable(INVALID_CONTENT, f"keys {Keys(uid).prefix}*: {problem}; delete what is not coserve's")


@dataclass
class _Replies:
    """Of one endpoint. Messages that do not read are `broken`; `unreadable` is why nothing is known at all."""

    keys: Keys
    incarnation: str = ""
    agents: list[str] = field(default_factory=list)
    known: frozenset[str] = frozenset()
    adapters: dict[bytes, bytes] = field(default_factory=dict)
    jobs: dict[str, list[Any]] = field(default_factory=dict)
    bound: list[tuple[str, str]] = field(default_factory=list)
    before: Parsed = field(default_factory=dict)
    parsed: Parsed = field(default_factory=dict)
    broken: list[MessageError] = field(default_factory=list)
    unreadable: str = ""
    parsed_bytes: int = 0
    parsed_in_turn: int = 0
    broken_bytes: int = 0

    @classmethod
    def of(cls, keys: Keys, jobs: Sequence[str], answers: Iterator[Any], before: Parsed) -> "_Replies":
        """The answers of the first round trip."""
        made = cls(keys, before=before)
        incarnation, agents, known, adapters = (next(answers) for _ in range(4))
        for start in range(0, len(jobs), JOBS_AT_ONCE):
            made.jobs |= zip(jobs[start : start + JOBS_AT_ONCE], next(answers), strict=True)
        made.incarnation = _text(made._needed(keys.incarnation(), incarnation, b""))
        made.agents = made._ids(keys.agents(), made._counted(keys.agents(), agents, MOST_AGENTS), keys.agent)
        members = made._counted(keys.jobs(), known, MOST_JOBS)
        made.known = frozenset(made._ids(keys.jobs(), members, keys.fence))
        flat = made._counted(keys.adapters(), adapters, 2 * MOST_ADAPTERS)
        made.adapters = dict(zip(flat[::2], flat[1::2], strict=False))
        for job, (fence, *_) in made.jobs.items():
            holder = [fence[1]] if isinstance(fence, list) and fence[1] else []
            made.bound += [(job, agent) for agent in made._ids(keys.fence(job), holder, keys.agent)]
        return made

    async def finish(self, answers: Iterator[Any], settled: Settled) -> RedisView | Unreadable:
        """With the answers of the second."""
        beats = {agent: next(answers) for agent in self.agents}
        told = {bound: next(answers) for bound in self.bound}
        if self.unreadable:
            return Unreadable(INVALID_CONTENT, self.unreadable)
        try:
            return await self._view(beats, told, settled)
        except _TooMuchError as error:
            return _foreign(self.keys.endpoint_uid, str(error))
        except Exception as error:  # whatever a tenant has thought of: the loop goes on
            logger.exception("endpoint %s: what Redis holds cannot be read", self.keys.endpoint_uid)
            return _foreign(self.keys.endpoint_uid, type(error).__name__)

    async def _view(self, beats: Mapping[str, Any], told: Mapping[tuple[str, str], Any], settled: Settled) -> RedisView:
        keys, agents, bindings = self.keys, dict[str, Heartbeat](), dict[str, Binding]()
        for agent, answer in beats.items():
            beat = self._message(Heartbeat.loads, keys.agent(agent), answer)
            if beat is not None:
                agents[agent] = beat
            await self._let_others()
        for (job, agent), answer in told.items():
            binding = self._message(Binding.loads, f"{keys.bindings(agent)}[{job}]", answer)
            if binding is not None:
                bindings[job] = binding
            await self._let_others()
        jobs: dict[str, JobRecord] = {}
        for job, answer in self.jobs.items():
            jobs[job] = job_record(self._message, keys.all_of_job(job), answer)
            await self._let_others()
        adapters: dict[str, AdapterRecord] = {}
        for name, value in self.adapters.items():
            record = self._message(AdapterRecord.loads, f"{keys.adapters()}[{_text(name)}]", value)
            if record is not None:
                adapters[record.name] = record
        return RedisView(
            incarnation=self.incarnation or None,
            agents=agents,
            jobs=jobs,
            bindings=bindings,
            known_jobs=self.known,
            adapters=adapters,
            broken=tuple(self.broken),
            settled=settled(keys.endpoint_uid, not self.incarnation),
            lost_agents=len(self.agents) - len(agents),
        )

    async def _let_others(self) -> None:
        if self.parsed_in_turn >= TURN_BYTES:
            self.parsed_in_turn = 0
            await asyncio.sleep(0)

    def _needed(self, key: str, answer: Any, nothing: T) -> T:
        """An answer without which nothing is known."""
        if isinstance(answer, Exception):
            self.unreadable = self.unreadable or f"key {key}: {answer}; {_DELETE}"
        return nothing if answer is None or isinstance(answer, Exception) else answer

    def _counted(self, key: str, answer: Any, most: int) -> list[bytes]:
        found: list[bytes] = list(self._needed(key, answer, []))
        if len(found) > most:
            self.unreadable = self.unreadable or f"key {key} has more than {most} entries; {_DELETE}"
        return found[:most]

    def _ids(self, key: str, found: list[bytes], key_of: Callable[[str], str]) -> list[str]:
        """Those that may stand in a key."""
        names: list[str] = []
        for name in map(_text, found):
            try:
                key_of(name)
            except InvalidValueError as error:
                self.broken.append(MessageError(key, "", repr(name), f"{error}; {_DELETE}"))
            else:
                names.append(name)
        return names

    def _message(self, load: Callable[[str, Any], T | None], key: str, raw: Any) -> T | None:
        """What an answer says; None where there is nothing, or what does not read."""
        size = len(raw) if isinstance(raw, bytes) else 0
        try:
            if isinstance(raw, Exception):
                raise MessageError(key, "", str(raw), _DELETE)
            if isinstance(raw, bytes) and len(raw) > MESSAGE_BYTES:
                raise MessageError(key, "", f"longer than {MESSAGE_BYTES} bytes", _DELETE)
            self._count(size)
            if not raw:
                return None
            known = self.before.get(key)
            found: T | None = known[1] if known is not None and known[0] == raw else load(key, raw)
            if size <= KEPT_BYTES:
                self.parsed[key] = raw, found
            return found
        except MessageError as error:
            self.broken.append(error)
            self.broken_bytes += size
            if self.broken_bytes > MOST_BROKEN_BYTES:
                problem = f"more than {MOST_BROKEN_BYTES} bytes do not read, the last of them {error}"
                raise _TooMuchError(problem) from None
            return None

    def _count(self, size: int) -> None:
        self.parsed_bytes, self.parsed_in_turn = self.parsed_bytes + size, self.parsed_in_turn + size
        if self.parsed_bytes > MOST_BYTES:
            raise _TooMuchError(f"messages of more than {MOST_BYTES} bytes together")


def _text(raw: bytes) -> str:
    """At most 200 characters of what should be a name."""
    return raw[:200].decode(errors="replace")
