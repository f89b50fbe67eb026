"""`python -m coserve_agent.feeder`: turns a data set into shards in Redis, a bounded number ahead of the job.

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
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import NoReturn

from redis.exceptions import RedisError

from coserve_agent.data.material import Material
from coserve_agent.data.vocabulary import vocab_size
from coserve_agent.end_tokens import end_tokens
from coserve_agent.errors import DatasetError, StartError
from coserve_agent.main import give_up, log_to_stderr
from coserve_agent.rendering import Renderer
from coserve_agent.settings import FeederSettings, read
from coserve_agent.template_variables import TemplateVariableError
from coserve_agent.tokenizer import Tokenizer
from coserve_api.connect import connect
from coserve_api.job import FailedReason
from coserve_api.keys import Keys
from coserve_api.messages import Completed, Failed, FeedError, FeedStatus
from coserve_api.store import JobRecord, Push, Store

log = logging.getLogger(__name__)

FULL_WAIT_S = 0.2
IDLE_WAIT_S = 2.0
RETRY_S = 2.0
LOOK_EVERY_S = 2.0


class JobDeletedError(Exception):
    """The job's keys were taken away by the operator: there is nothing to feed."""


class Feeder:
    """Keeps the job's streams full until it has a result."""

    def __init__(
        self, store: Store, job: str, material: Material, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._store = store
        self._job = job
        self._material = material
        self._sleep = sleep
        self._status = material.status()
        self._said_under: str | None = None

    async def run(self) -> None:
        """Until the job has a result. Redis may go away meanwhile.

        Raises:
            DatasetError: the file changed since the job began.
        """
        while True:
            try:
                if await self._round():
                    return
            except JobDeletedError:
                log.info("feeder: the job was deleted")
                return
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("feeder: redis cannot be reached, tries again in %g s: %s", RETRY_S, error)
                await self._sleep(RETRY_S)

    async def _round(self) -> bool:
        """Look at the job, push what there is room for. True when the job has a result."""
        record = await self._store.job(self._job)
        if isinstance(record.result, Completed | Failed):
            log.info("feeder: the job has a result: %s", record.result.outcome)
            return True
        await self._say(record)
        await self._push_eval()
        await self._sleep(await self._push_training(record.last_shard + 1))
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

    async def _push_eval(self) -> None:
        number = 1
        while number <= self._material.eval_shards:
            pushed = await self._store.push_eval(self._job, self._material.eval_shard(number))
            number = pushed.last + 1

    async def _push_training(self, number: int) -> float:
        """Push from `number` on until there is no room; returns how long to wait before the next look."""
        loop = asyncio.get_running_loop()
        look_again_s = loop.time() + LOOK_EVERY_S
        while number <= self._status.total_steps:
            pushed = await self._store.push_shard(self._job, self._material.shard(number))
            if pushed.outcome is Push.FULL:
                return FULL_WAIT_S
            number = pushed.last + 1
            if loop.time() > look_again_s:
                return 0.0
        return IDLE_WAIT_S


def _differ(before: str | None, now: str | None) -> bool:
    return before is not None and now is not None and before != now


async def say_error(store: Store, job: str, error: DatasetError) -> None:
    """Leave the reason for the operator, however long Redis takes."""
    # Whatever a message quotes, it can be sent.
    message = str(error).encode("utf-8", "backslashreplace").decode()[:2048]
    status = FeedStatus(error=FeedError(reason=error.reason, message=message, line=error.line))
    while True:
        try:
            await store.set_feed(job, status)
            return
        except (RedisError, OSError, TimeoutError) as problem:
            log.warning("feeder: redis cannot be reached, tries again in %g s: %s", RETRY_S, problem)
            await asyncio.sleep(RETRY_S)


async def feed(settings: FeederSettings, material: Material | DatasetError) -> None:
    """Push `material`, or say what is wrong with it."""
    password = settings.redis_password
    redis = connect(settings.redis_url, settings.redis_username, password.get_secret_value() if password else None)
    store = Store(redis, Keys(settings.endpoint_uid))
    try:
        if isinstance(material, DatasetError):
            raise material
        await Feeder(store, settings.job_uid, material).run()
    except DatasetError as error:
        log.error("feeder: %s: %s", error.reason, error)
        await say_error(store, settings.job_uid, error)
    finally:
        await redis.aclose()


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
