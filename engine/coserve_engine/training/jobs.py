"""A finetuning job inside the engine: an ordered stream of commands, the passes they made live, and the training state.

Gradients are transactional: each pass has its own buffer, added to the step's sum when the pass is done, in order of
the commands. A dropped pass leaves no trace, so replaying it is exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from coserve_engine.device.protocol import Pending
from coserve_engine.errors import OutOfPagesError
from coserve_engine.formats.artifacts import peft_files, write_folder
from coserve_engine.job_messages import (
    AdapterExported,
    BestKept,
    CheckpointDone,
    ExportAdapter,
    ForwardBackward,
    JobEvent,
    JobStopped,
    KeepBest,
    OptimStep,
    PassDone,
    PassMode,
    SaveCheckpoint,
    StartJob,
    StepDone,
    StopJob,
    StreamCommand,
)
from coserve_engine.layout.passes import pages_of_pass
from coserve_engine.model.executor import Executor
from coserve_engine.model.passes import PassState
from coserve_engine.tensors.adam import AdamW
from coserve_engine.tensors.lora import Factors, LoraWeights
from coserve_engine.training.beginning import Beginning
from coserve_engine.training.checkpoint import Best, TrainingState, save_checkpoint
from coserve_engine.training.job_limits import check_pass, check_step, refused

Defer = Callable[[str, Callable[[], JobEvent]], None]
"""Run a function that touches only files in another thread, on behalf of a job; its event is emitted when
it is done.
"""

MAX_LIVE = 2
"""Live passes of a job: one in backward, one in forward."""


class Job:
    """One finetuning job. `live` passes are in command order; only the first may be committed."""

    def __init__(self, command: StartJob, executor: Executor, beginning: Beginning) -> None:
        self.id, self._seed, self._executor = command.job, command.seed, executor
        self.layout, self._state = beginning.layout, beginning.state
        self.weights = executor.trained(self.layout, self._state.param)
        self._grad = torch.zeros_like(self._state.param)
        self._summed = False
        """Whether a pass of the running step is in `_grad`, which no checkpoint holds."""
        self._finite = True
        """Whether every loss of the running step is; a gradient may be finite where its loss is not."""
        self._queue: deque[StreamCommand] = deque()
        self._stepped: Pending | None = None
        """What comes of the step that heads the queue, once that was enqueued."""
        self._seen = self._state.seq_no
        self._keeps_best = self._state.best is not None
        """Whether weights are kept once all that is queued is done."""
        self.live: dict[int, tuple[ForwardBackward, PassState]] = {}

    @property
    def step(self) -> int:
        return self._state.step

    @property
    def seq_no(self) -> int:
        """The last command that a checkpoint covers: the passes of a step count once the step is done."""
        return self._state.seq_no

    @property
    def idle(self) -> bool:
        return not self._queue and not self.live

    @property
    def pages_wanted(self) -> int:
        """Pages that the next pass needs and does not have, 0 where none waits for pages alone."""
        if not self._queue or not isinstance(self._queue[0], ForwardBackward) or len(self.live) >= MAX_LIVE:
            return 0
        return self._pages(self._queue[0])

    def submit(self, command: StreamCommand) -> None:
        """Queue a command; one that was seen before is ignored.

        Raises:
            JobError: it cannot be obeyed (`job_limits`), or a pass needs more pages than there are.
        """
        if command.seq_no <= self._seen:
            return
        if isinstance(command, OptimStep):
            check_step(command)
        if isinstance(command, ExportAdapter) and command.best and not self._keeps_best:
            raise refused("ExportAdapter asks for the best weights, and none were kept; send KeepBest before it")
        self._keeps_best |= isinstance(command, KeepBest)
        if isinstance(command, ForwardBackward):
            e = self._executor
            check_pass(command, e.config.max_model_length, e.model.vocab_size)
            pages, total = self._pages(command), e.ledger.total
            if pages > total:
                raise refused(
                    f"pass {command.work.id} needs {pages} KV pages for {len(command.work.seqs)} samples, and the pool "
                    f"has {total}; split it, or raise engine.kvCacheMemory of the endpoint"
                )
            work = replace(command.work, id=next(e.pass_ids), job=self.id)  # drivers may count alike
            command = replace(command, work=work)
        self._seen = command.seq_no
        self._queue.append(command)

    def _pages(self, command: ForwardBackward) -> int:
        return pages_of_pass(tuple(len(seq.tokens) for seq in command.work.seqs), self._executor.numerics)

    def advance(self, defer: Defer, *, may_open: bool) -> list[JobEvent]:
        """Commit finished passes, then start what can start. `may_open`: pages may be taken for new passes."""
        events: list[JobEvent] = []
        for pass_id, (finished, state) in list(self.live.items()):
            if not (state.done and state.fetched):
                break
            events.append(self._commit(finished, state))
            del self.live[pass_id]
        while self._queue:
            command = self._queue[0]
            if isinstance(command, ForwardBackward):
                if not may_open or len(self.live) >= MAX_LIVE or not self._open(command):
                    break
            elif self.live:
                break
            elif isinstance(command, OptimStep):
                if self._stepped is None:
                    self._stepped = self._optimize(command)
                if not self._stepped.ready():
                    break
                events.append(self._step_done(command))
            elif isinstance(command, KeepBest):
                events.append(self._keep(command))
            else:
                self._done(command)
                defer(self.id, self._write(command))
            self._queue.popleft()
        return events

    def served(self, load: int) -> LoraWeights:
        """A copy of the adapter as it is after the last step, made as of one that is loaded from its export."""
        e, spec = self._executor, self.layout.spec
        layers = self.layout.views(self._state.param.to(e.dtype))
        rank, scale = spec.rank, spec.scale
        factors = ({name: Factors(a[:rank], b[:, :rank], scale) for name, (a, b) in layer.items()} for layer in layers)
        return LoraWeights.served(factors, load, turned=e.kernels.turned)

    def _open(self, command: ForwardBackward) -> bool:
        work = command.work
        try:
            pages = self._executor.ledger.reserve(f"pass:{work.id}", self._pages(command))
        except OutOfPagesError:
            return False
        state = self._executor.open_pass(
            work,
            self.weights,
            self.layout,
            pages,
            self._seed,
            command.loss,
            want_logprobs=command.want_logprobs,
        )
        self.live[work.id] = (command, state)
        return True

    def drop_youngest(self) -> bool:
        """Give up the youngest live pass and its pages; its command runs again later. False where none is live."""
        if not self.live:
            return False
        pass_id, (command, _) = self.live.popitem()
        self._executor.close_pass(pass_id)
        self._queue.appendleft(command)
        return True

    def _commit(self, command: ForwardBackward, state: PassState) -> JobEvent:
        loss = state.loss_sum()
        if state.training:
            self._grad += state.grads
            self._summed = True
            self._finite &= math.isfinite(loss)
        logprobs = state.terms.logprobs()
        self._executor.close_pass(command.work.id)
        self._done(command)
        mode = PassMode.TRAIN if state.training else PassMode.EVAL
        tokens = sum(len(seq.tokens) for seq in command.work.seqs)
        return PassDone(self.id, command.seq_no, mode, loss, state.weight_sum(), tokens, logprobs)

    def _optimize(self, c: OptimStep) -> Pending:
        """Enqueue a step, which counts from now on; whether it changed anything is for its event alone."""
        e = self._executor
        if self._finite:
            how = AdamW(c.lr, c.beta1, c.beta2, c.eps, c.weight_decay, c.max_grad_norm)
            outcome = e.kernels.optimize(self._state.param, self._grad, self._state.adam, how)
            self.weights.renew()
        else:
            outcome = e.copies.stage([math.nan, 0.0], torch.float64)
        self._grad.zero_()
        self._summed, self._finite = False, True
        self._done(c, steps=1)
        return e.copies.fetch(outcome)

    def _step_done(self, command: OptimStep) -> JobEvent:
        assert self._stepped is not None  # it was enqueued
        norm, changed = self._stepped.get()
        self._stepped = None
        return StepDone(self.id, command.seq_no, self.step, norm, not changed)

    @property
    def settled(self) -> bool:
        """Whether `settle` would not wait."""
        return self._stepped is None or self._stepped.ready()

    def settle(self) -> list[JobEvent]:
        """The event of a step that was enqueued, if one is not told."""
        if self._stepped is None:
            return []
        command = self._queue.popleft()
        assert isinstance(command, OptimStep)
        return [self._step_done(command)]

    def _keep(self, command: KeepBest) -> JobEvent:
        self._state = replace(self._state, best=Best(self.step, self._state.param.clone()))
        self._done(command)
        return BestKept(self.id, command.seq_no, self.step)

    def _done(self, command: StreamCommand, steps: int = 0) -> None:
        state = self._state
        seq_no = state.seq_no if self._summed else command.seq_no
        self._state = replace(state, step=state.step + steps, seq_no=seq_no)

    def _write(self, command: SaveCheckpoint | ExportAdapter) -> Callable[[], JobEvent]:
        state, path, layout, bring = self._state.copy(), Path(command.path), self.layout, self._executor.copies.bring
        if isinstance(command, SaveCheckpoint):
            return self._saver(command.path, state, command.files, command.seq_no)

        def export() -> JobEvent:
            param = state.best.param if command.best and state.best is not None else state.param
            texts, tensors = peft_files(layout, bring(param), command.base_model_name)
            sha256 = write_folder(path, {**texts, **command.files}, tensors)
            return AdapterExported(command.job, command.seq_no, command.path, sha256)

        return export

    def _saver(self, path: str, state: TrainingState, files: dict[str, str], seq_no: int) -> Callable[[], JobEvent]:
        layout, config, job, bring = self.layout, self._executor.config, self.id, self._executor.copies.bring

        def save() -> JobEvent:
            sha256 = save_checkpoint(Path(path), layout, state.moved(bring), config, files)
            return CheckpointDone(job, seq_no, state.step, path, sha256)

        return save

    def stop(self, command: StopJob) -> Callable[[], JobEvent]:
        """Drop what is live and waiting; returns what is to be written, if anything, as a function that ends in
        JobStopped.
        """
        while self.drop_youngest():
            pass
        self._queue.clear()
        step, checkpoint = self.step, command.checkpoint
        if checkpoint is None:
            return lambda: JobStopped(command.job, step, None)
        save = self._saver(checkpoint, self._state.copy(), command.files, self.seq_no)

        def finish() -> JobEvent:
            done = save()
            assert isinstance(done, CheckpointDone)
            return JobStopped(command.job, step, done.sha256)

        return finish
