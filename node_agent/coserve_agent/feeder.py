"""`python -m coserve_agent.feeder`: turns a data set into shards, a bounded number ahead of the job.

It stays until the job has a result (or is deleted): should Redis be emptied, it feeds again from the accepted
cursor. Nothing else could, since only this pod has the data. It needs no torch, and holds no state that is not a
function of file, seed and cursor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from types import FrameType
from typing import NoReturn

from coserve_agent.chat.end_tokens import end_tokens
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.chat.variables import TemplateVariableError
from coserve_agent.data.material import Material
from coserve_agent.data.rendering import Renderer
from coserve_agent.errors import DatasetError, StartError
from coserve_agent.main import give_up, log_to_stderr
from coserve_agent.model.vocabulary import vocab_size
from coserve_agent.settings import FeederMode, FeederSettings, read
from coserve_api.errors import MessageError
from coserve_api.job_status import FailedReason
from coserve_contract.away import STORE_AWAY
from coserve_contract.connect import connect
from coserve_contract.keys import Keys
from coserve_contract.local.database import DATABASE, Database
from coserve_contract.local.store import LocalStore
from coserve_contract.messages import Completed, Failed, FeedError, FeedStatus
from coserve_contract.protocols import JobStore
from coserve_contract.store import SHARD_BOUND, WINDOW_BYTES, JobRecord, Push, Store

log = logging.getLogger(__name__)

FULL_WAIT_S = 0.2
EVAL_WAIT_S = 0.05
"""A new agent waits for all held-out samples before its first step."""
IDLE_WAIT_S = 2.0
RETRY_S = 2.0
LOOK_EVERY_S = 2.0
BESIDE_A_SERVER = 10
"""How nice it is to the server that shares its machine."""


class JobDeletedError(Exception):
    """The job's keys were taken away by the operator: there is nothing to feed."""


class Feeder:
    """Keeps the job's streams full until it has a result."""

    def __init__(
        self, store: JobStore, job: str, material: Material, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._store = store
        self._job = job
        self._material = material
        self._sleep = sleep
        self._status = material.status()
        self._said_under: str | None = None
        self._bytes = lru_cache(4 * SHARD_BOUND)(material.shard_bytes)
        self._eval_bytes = lru_cache(4 * SHARD_BOUND)(material.eval_shard_bytes)

    async def run(self) -> None:
        """Until the job has a result. Redis may go away meanwhile.

        Raises:
            DatasetError: the file changed since the job began.
        """
        await self._until(self._round)

    async def check(self) -> None:
        """Say what the data are, for a job whose turn has not come; raises as `run`."""
        await self._until(self._check)

    async def _check(self) -> bool:
        await self._say(await self._store.job(self._job))
        return True

    async def _until(self, done: Callable[[], Awaitable[bool]]) -> None:
        while True:
            try:
                if await done():
                    return
            except JobDeletedError:
                log.info("feeder: the job was deleted")
                return
            except (*STORE_AWAY, MessageError) as error:
                log.warning("feeder: redis cannot be read, tries again in %g s: %s", RETRY_S, error)
                await self._sleep(RETRY_S)

    async def _round(self) -> bool:
        """Look at the job, push what there is room for. True when the job has a result."""
        record = await self._store.job(self._job)
        if isinstance(record.result, Completed | Failed):
            log.info("feeder: the job has a result: %s", record.result.outcome)
            return True
        await self._say(record)
        waits_s = await self._push_eval(record), await self._push_training(record)
        await self._sleep(min(waits_s))
        return False

    async def _say(self, record: JobRecord) -> None:
        """Keep the FeedStatus in Redis as it should be."""
        wanted = self._status.model_copy(update={"finished": record.last_shard >= self._status.total_steps})
        if record.feed == wanted:
            return
        incarnation = await self._store.incarnation()
        if record.feed is None and self._said_under is not None and incarnation in (None, self._said_under):
            if incarnation is None:
                return  # Redis was emptied: what belongs there is the operator's to say first
            raise JobDeletedError
        if record.feed is not None and record.feed.error is None:
            self._check_same(record.feed)
        elif record.checkpoint is None:
            self._material.check_schedule()
        await self._store.set_feed(self._job, wanted)
        self._said_under = incarnation

    def _check_same(self, before: FeedStatus) -> None:
        """That this is the data of which `before` was said; a feeder that is older said less."""
        ours = self._status
        counts = (before.total_steps, before.samples, before.eval_samples, before.digest)
        if counts != (ours.total_steps, ours.samples, ours.eval_samples, ours.digest) or _differ(
            before.content, ours.content
        ):
            raise DatasetError(
                FailedReason.INVALID_DATASET,
                f"the data set or the tokenizer changed since the job began ({before.samples} + {before.eval_samples} "
                f"samples then, {ours.samples} + {ours.eval_samples} now); restore them, or create a new job",
            )
        if _differ(before.rendering, ours.rendering):
            raise DatasetError(
                FailedReason.INVALID_DATASET,
                "what decides how rows become tokens (date, template variables, dataset.format, dataset.learn) changed "
                "since the job began; create a new job",
            )

    async def _push_eval(self, record: JobRecord) -> float:
        """Push held-out shards until there is no room; returns how long to wait before the next look."""
        total, progress = self._material.eval_shards, record.progress
        bound = progress is not None and record.fence is not None and progress.epoch == record.fence.epoch
        kept = (progress.eval_cursor if bound and progress is not None else 0) or 0
        whole = bound and progress is not None and progress.eval_cursor is None  # an agent of the version before
        last = total if whole else room(kept, total, self._eval_bytes)
        number = kept + 1
        while number <= last:
            pushed = await self._store.push_eval(self._job, self._material.eval_shard(number), last - kept)
            if pushed.outcome is Push.FULL or pushed.last < kept:
                return EVAL_WAIT_S
            number = pushed.last + 1
        return IDLE_WAIT_S if last == total else EVAL_WAIT_S

    async def _push_training(self, record: JobRecord) -> float:
        """Push training shards until there is no room; returns as `_push_eval`."""
        loop = asyncio.get_running_loop()
        look_again_s = loop.time() + LOOK_EVERY_S
        cursor = record.checkpoint.cursor if record.checkpoint else 0
        read, total = max(cursor, record.progress.cursor if record.progress else 0), self._status.total_steps
        last, number = room(read, total, self._bytes), record.last_shard + 1
        while number <= last:
            pushed = await self._store.push_shard(self._job, self._material.shard(number))
            if pushed.outcome is Push.FULL:
                return FULL_WAIT_S
            number = pushed.last + 1
            if pushed.outcome is Push.GAP or loop.time() > look_again_s:
                return 0.0
        return IDLE_WAIT_S if last == total else FULL_WAIT_S


def room(read: int, total: int, bytes_of: Callable[[int], int]) -> int:
    """The last shard that may be in Redis when `read` is the last one that was read: SHARD_BOUND further at most, and
    WINDOW_BYTES, but for one shard.
    """
    last, left = read, WINDOW_BYTES
    while last < min(total, read + SHARD_BOUND):
        left -= bytes_of(last + 1)
        if left < 0 and last > read:
            break
        last += 1
    return last


def _differ(before: str | None, now: str | None) -> bool:
    return before is not None and now is not None and before != now


async def say_error(store: JobStore, job: str, error: DatasetError) -> None:
    """Leave the reason for the operator, however long Redis takes."""
    # Whatever a message quotes, it can be sent.
    message = str(error).encode("utf-8", "backslashreplace").decode()[:2048]
    status = FeedStatus(error=FeedError(reason=error.reason, message=message, line=error.line))
    while True:
        try:
            await store.set_feed(job, status)
            return
        except STORE_AWAY as problem:
            log.warning("feeder: redis cannot be reached, tries again in %g s: %s", RETRY_S, problem)
            await asyncio.sleep(RETRY_S)


async def feed(settings: FeederSettings, material: Material | DatasetError) -> None:
    """Push `material` or say what it is, by the mode; or say what is wrong with it."""
    async with _opened(settings) as store:
        try:
            if isinstance(material, DatasetError):
                raise material
            feeder = Feeder(store, settings.job_uid, material)
            await (feeder.check() if settings.mode is FeederMode.CHECK else feeder.run())
        except DatasetError as error:
            log.error("feeder: %s: %s", error.reason, error)
            await say_error(store, settings.job_uid, error)


@asynccontextmanager
async def _opened(settings: FeederSettings) -> AsyncIterator[JobStore]:
    """The store of jobs that the settings name."""
    if settings.state is not None:
        database = Database(settings.state / DATABASE)
        try:
            yield LocalStore(database)
        finally:
            await database.close()
        return
    assert settings.redis_url is not None
    password = settings.redis_password
    redis = connect(
        settings.redis_url,
        settings.redis_username,
        password.get_secret_value() if password else None,
        settings.redis_ca,
    )
    try:
        yield Store(redis, Keys(settings.endpoint_uid))
    finally:
        await redis.aclose()


def _end_with_parent() -> None:
    """A server's feeder lives no longer than the server, whose end of our standard input closes with it."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True, name="parent").start()


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM: everything here can be made again, so nothing is saved or waited for. (Process 1 has no default
    action.)
    """
    logging.shutdown()
    os._exit(128 + number)


def main() -> None:
    """Feed one job. Exit status 0 when it has a result or its data set is refused, 1 if the feeder cannot start."""
    log_to_stderr()
    signal.signal(signal.SIGTERM, _end)
    try:
        settings = read(FeederSettings)
        if settings.state is not None:
            os.nice(BESIDE_A_SERVER)
            _end_with_parent()
        tokenizer = Tokenizer(settings.model_path)
        size = vocab_size(settings.model_path)
        ends = end_tokens(settings.model_path, tokenizer)
    except StartError as error:
        sys.exit(give_up(str(error)))
    material: Material | DatasetError
    try:
        renderer = Renderer(tokenizer, ends, settings.template_variables, settings.date)
        material = Material.prepare(settings, renderer, size)
        for line in material.report():
            log.info("feeder: %s", line)
    except TemplateVariableError as error:
        material = DatasetError(FailedReason.INVALID_DATASET, f"dataset.{error}")
    except DatasetError as error:
        material = error
    asyncio.run(feed(settings, material))


if __name__ == "__main__":
    main()
