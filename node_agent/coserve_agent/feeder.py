"""`python -m coserve_agent.feeder`: turns a data set into shards in Redis, a bounded number ahead of the job.

It stays until the job has a result (or is deleted): should Redis be emptied, it feeds again from the accepted
cursor. Nothing else could, since only this pod has the data. It needs no torch, and holds no state that is not a
function of file, seed and cursor.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from redis.exceptions import RedisError

from coserve_agent.dataset import Dataset
from coserve_agent.errors import DatasetError, StartError
from coserve_agent.main import give_up, log_to_stderr
from coserve_agent.order import StepOrder, capped, split
from coserve_agent.settings import FeederSettings, read
from coserve_agent.tokenizer import Tokenizer
from coserve_api.connect import connect
from coserve_api.job import FailedReason
from coserve_api.keys import Keys
from coserve_api.messages import Completed, Failed, FeedError, FeedStatus
from coserve_api.shards import Shard
from coserve_api.store import JobRecord, Push, Store

log = logging.getLogger(__name__)

FULL_WAIT_S = 0.2
IDLE_WAIT_S = 2.0
RETRY_S = 2.0
LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class Material:
    """A data set cut into shards: training shard n is optimizer step n, whatever was made before it. `held_out` has the
    samples that are evaluated, `eval_ids` are their ids: it is the same data set, or a file of its own.
    """

    dataset: Dataset
    train: StepOrder
    held_out: Dataset
    eval_ids: tuple[int, ...]
    digest: str

    @classmethod
    def prepare(cls, settings: FeederSettings, tokenizer: Tokenizer) -> Material:
        """Read and check the files. Raises DatasetError."""

        def read_file(path: Path) -> Dataset:
            return Dataset(path, tokenizer, settings.format, settings.max_sequence_length, settings.on_invalid)

        dataset = read_file(settings.dataset_path)
        held_out = dataset if settings.eval_path is None else read_file(settings.eval_path)
        parts = split(dataset.ids, settings.eval_percent, settings.seed)
        if settings.eval_percent and not parts.eval:
            raise DatasetError(
                FailedReason.INVALID_DATASET,
                f"{settings.dataset_path}: of {len(dataset.ids)} usable lines none is left to hold out, and "
                f"dataset.evalPercent is {settings.eval_percent}; add lines, or set dataset.evalPercent to 0",
            )
        order = StepOrder(parts.train, settings.batch_size, settings.seed, settings.epochs, settings.max_steps)
        eval_ids = parts.eval if held_out is dataset else held_out.ids
        eval_ids = capped(eval_ids, settings.eval_max_samples, settings.seed)
        return cls(dataset, order, held_out, eval_ids, tokenizer.digest)

    @property
    def eval_shards(self) -> int:
        return math.ceil(len(self.eval_ids) / self.train.batch_size)

    def status(self) -> FeedStatus:
        return FeedStatus(
            total_steps=self.train.total_steps,
            samples=len(self.train.ids),
            eval_samples=len(self.eval_ids),
            eval_shards=self.eval_shards,
            skipped_lines=sum(one.skipped for one in {self.dataset, self.held_out}),
            digest=self.digest,
        )

    def shard(self, number: int) -> Shard:
        """Training shard `number`, from 1."""
        samples = self.dataset.samples(self.train.batch(number))
        return Shard(number, self.train.epoch_of(number), self.digest, tuple(samples))

    def eval_shard(self, number: int) -> Shard:
        """Held-out shard `number`, from 1."""
        size = self.train.batch_size
        ids = self.eval_ids[(number - 1) * size : number * size]
        return Shard(number, 0, self.digest, tuple(self.held_out.samples(ids)))


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
        await self._store.set_feed(self._job, wanted)
        self._said_under = incarnation

    def _check_same(self, before: FeedStatus) -> None:
        ours = self._status
        if (before.total_steps, before.samples, before.eval_samples, before.digest) != (
            ours.total_steps,
            ours.samples,
            ours.eval_samples,
            ours.digest,
        ):
            raise DatasetError(
                FailedReason.INVALID_DATASET,
                f"the data set or the tokenizer changed since the job began ({before.samples} + {before.eval_samples} "
                f"samples then, {ours.samples} + {ours.eval_samples} now); restore them, or create a new job",
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


async def say_error(store: Store, job: str, error: DatasetError) -> None:
    """Leave the reason for the operator, however long Redis takes."""
    status = FeedStatus(error=FeedError(reason=error.reason, message=str(error)[:2048], line=error.line))
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
    except StartError as error:
        sys.exit(give_up(str(error)))
    material: Material | DatasetError
    try:
        material = Material.prepare(settings, tokenizer)
        status = material.status()
        log.info(
            "feeder: %s: %d samples to train on, %d held out, %d lines skipped, %d steps",
            settings.dataset_path, status.samples, status.eval_samples, status.skipped_lines, status.total_steps,
        )  # fmt: skip
    except DatasetError as error:
        material = error
    asyncio.run(feed(settings, material))


if __name__ == "__main__":
    main()
