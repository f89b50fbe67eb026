"""A data set cut into shards: training shard n is optimizer step n, whatever was made before it."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from coserve_agent.data.dataset import Dataset, LineSize
from coserve_agent.data.files import find
from coserve_agent.data.order import StepOrder, capped, split
from coserve_agent.data.problems import OTHER_NAMES, Problems, Refusal, is_name
from coserve_agent.data.reader import NAME as UNWRITTEN_NAME
from coserve_agent.data.reader import Reader
from coserve_agent.data.rendering import Renderer
from coserve_agent.errors import DatasetError
from coserve_agent.settings import FeederSettings
from coserve_api.job_status import FailedReason
from coserve_contract.messages import FeedRefusal, FeedStatus
from coserve_contract.shards import MAX_SHARD_BYTES, Shard, shard_bytes

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Material:
    """All that a job's shards are made of. `digest` is that of tokenizer and chat template; `held_out` has the samples
    that are evaluated, `eval_ids` are their lines: it is the same data set, or files of its own.
    """

    dataset: Dataset
    train: StepOrder
    held_out: Dataset
    eval_ids: tuple[int, ...]
    digest: str
    warmup_steps: int = 0
    left: tuple[str, ...] = ()
    """Files of the folder that are not read."""

    @classmethod
    def prepare(cls, settings: FeederSettings, renderer: Renderer, vocab_size: int) -> Material:
        """Read and check the files. Raises DatasetError."""
        files, left = find(settings.dataset_path, settings.dataset_root)
        reader = Reader(renderer, settings.format, settings.learn, settings.max_sequence_length, vocab_size)
        dataset = Dataset(files, reader, settings.on_invalid)
        held_out = dataset
        if settings.eval_path is not None:
            eval_files, eval_left = find(settings.eval_path, settings.eval_root)
            held_out, left = Dataset(eval_files, reader, settings.on_invalid), [*left, *eval_left]
        parts = split(dataset.ids, settings.eval_percent, settings.seed)
        if settings.eval_percent and not parts.eval:
            raise DatasetError(
                FailedReason.INVALID_DATASET,
                f"{settings.dataset_path}: of {len(dataset.ids)} usable lines none is left to hold out, and "
                f"dataset.evalPercent is {settings.eval_percent}; add lines, or set dataset.evalPercent to 0",
            )
        order = StepOrder(parts.train, settings.batch_size, settings.seed, settings.epochs, settings.max_steps)
        eval_ids = capped(parts.eval if held_out is dataset else held_out.ids, settings.eval_max_samples, settings.seed)
        made = cls(dataset, order, held_out, eval_ids, renderer.tokenizer.digest, settings.warmup_steps, tuple(left))
        made.check_sizes()
        return made

    @cached_property
    def _sizes(self) -> list[LineSize]:
        """Of the lines to train on."""
        return [self.dataset.size(id) for id in self.train.ids]

    @property
    def _problems(self) -> Problems:
        if self.held_out is self.dataset:
            return self.dataset.problems
        return self.dataset.problems + self.held_out.problems

    @property
    def _content(self) -> str:
        """Digest of the lines."""
        if self.held_out is self.dataset:
            return self.dataset.digest
        return hashlib.sha256(f"{self.dataset.digest}{self.held_out.digest}".encode()).hexdigest()

    @property
    def eval_shards(self) -> int:
        return math.ceil(len(self.eval_ids) / self.train.batch_size)

    def status(self) -> FeedStatus:
        problems = self._problems
        sizes = self._sizes
        return FeedStatus(
            total_steps=self.train.total_steps,
            samples=len(self.train.ids),
            eval_samples=len(self.eval_ids),
            eval_shards=self.eval_shards,
            sequences=sum(size.samples for size in sizes),
            tokens=sum(size.tokens for size in sizes),
            skipped_lines=problems.lines,
            skipped_turns=problems.turns,
            skipped={reason.value: count for reason, count in problems.by_reason.most_common()},
            refusals=tuple(map(_refusal, problems.first)),
            unknown_fields=_names(problems.unknown_fields),
            notes=self._notes(),
            digest=self.digest,
            rendering=self.dataset.reader.digest,
            content=self._content,
            windowed=True,
        )

    def report(self) -> Iterator[str]:
        """What a log should say of it."""
        status = self.status()
        yield (
            f"{status.samples} samples to train on, {status.eval_samples} held out, {status.skipped_lines} lines and "
            f"{status.skipped_turns} answers skipped, {status.total_steps} steps, format {self.dataset.reader.format}"
        )
        if len(self.dataset.files) > 1:
            for file, first, last in self.dataset.spans():
                yield f"lines {first} to {last} are {file.path}"
        for problem in self._problems.first:
            yield f"skipped: {problem}"
        yield from status.notes

    def check_schedule(self) -> None:
        """Raises DatasetError for a warm-up that would never end; of a new job, since older ones may have one."""
        total = self.train.total_steps
        if 0 < total <= self.warmup_steps:
            length = f"{self.train.epochs} epochs of {len(self.train.ids)} samples" if self.train.epochs else "maxSteps"
            raise DatasetError(
                FailedReason.INVALID_DATASET,
                f"training.warmupSteps is {self.warmup_steps}, and the job has {total} steps ({length}), so the "
                "learning rate would never reach its peak; set warmupSteps below that, or train longer",
            )

    def shard(self, number: int) -> Shard:
        """Training shard `number`, from 1."""
        samples = self.dataset.samples(self.train.batch(number))
        return Shard(number, self.train.epoch_of(number), self.digest, tuple(samples))

    def shard_bytes(self, number: int) -> int:
        """What training shard `number` takes in Redis, at most."""
        return self._bytes(self.dataset, self.train.batch(number))

    def eval_shard_bytes(self, number: int) -> int:
        """What held-out shard `number` takes."""
        return self._bytes(self.held_out, self._eval_batch(number))

    def _bytes(self, dataset: Dataset, ids: Sequence[int]) -> int:
        sizes = [dataset.size(id) for id in ids]
        return shard_bytes(sum(one.samples for one in sizes), sum(one.tokens for one in sizes))

    def eval_shard(self, number: int) -> Shard:
        """Held-out shard `number`, from 1."""
        return Shard(number, 0, self.digest, tuple(self.held_out.samples(self._eval_batch(number))))

    def _eval_batch(self, number: int) -> tuple[int, ...]:
        size = self.train.batch_size
        return self.eval_ids[(number - 1) * size : number * size]

    def _notes(self) -> tuple[str, ...]:
        """What whoever starts the job should know."""
        notes = [*self.dataset.reader.renderer.notes]
        if unended := self._problems.unended:
            notes.append(
                f"{unended} samples end with a token at which no answer stops when it is served; name it in "
                "generation_config.json's eos_token_id"
            )
        sizes = self._sizes
        if several := sum(size.samples for size in sizes) - len(sizes):
            tokens, once = sum(size.tokens for size in sizes), sum(size.longest for size in sizes)
            notes.append(
                f"the chat template writes earlier turns differently later, so {several} more sequences are learned: "
                f"{tokens} tokens an epoch instead of {once}"
            )
        if self.left:
            more = len(self.left) - _NAMES_SHOWN
            names = ", ".join(self.left[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
            notes.append(_sendable(f"files of the folder that were not read: {names}")[:2048])
        return tuple(notes)

    def check_sizes(self) -> None:
        """That every shard fits Redis. Where the longest lines together fit, all do; else each step is looked at.

        Raises:
            DatasetError: one does not.
        """
        sizes = [*self._sizes, *(self.held_out.size(id) for id in self.eval_ids)]
        longest = heapq.nlargest(self.train.batch_size, (size.tokens for size in sizes))
        samples = heapq.nlargest(self.train.batch_size, (size.samples for size in sizes))
        if shard_bytes(sum(samples), sum(longest)) <= MAX_SHARD_BYTES:
            return
        for step in range(1, self.train.total_steps + 1):
            self._check_size(f"the shard of step {step}", self.dataset, self.train.batch(step))
        for number in range(1, self.eval_shards + 1):
            self._check_size(f"held-out shard {number}", self.held_out, self._eval_batch(number))

    def _check_size(self, name: str, dataset: Dataset, ids: Sequence[int]) -> None:
        size = self._bytes(dataset, ids)
        if size > MAX_SHARD_BYTES:
            tokens = sum(dataset.size(id).tokens for id in ids)
            raise DatasetError(
                FailedReason.INVALID_DATASET,
                f"{name} would take {size} bytes ({len(ids)} lines, {tokens} tokens), and {MAX_SHARD_BYTES} are "
                "allowed; lower training.batchSize or dataset.maxSequenceLength",
            )


def _refusal(one: Refusal) -> FeedRefusal:
    file, message = _sendable(one.file)[-1024:], _sendable(one.message)[:512]
    return FeedRefusal(file=file, line=one.line, reason=one.reason.value, message=message)


def _names(counts: Counter[str]) -> dict[str, int]:
    """Fields by name, the most frequent first; what looks like no name may be content."""
    shown: Counter[str] = Counter()
    for name, count in counts.items():
        shown[name if is_name(name) or name == UNWRITTEN_NAME else OTHER_NAMES] += count
    return dict(shown.most_common())


def _sendable(text: str) -> str:
    """Whatever a message quotes, it can be sent."""
    return text.encode("utf-8", "backslashreplace").decode()
