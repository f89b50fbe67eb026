"""How fast a job goes, from its last finished steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from coserve_agent.jobs.evaluations import EvalLog
from coserve_agent.jobs.trainlog import DriverState
from coserve_contract.messages import Progress

WINDOW_S = 60.0


class ProgressMeter:
    """Tokens a second and the time left, over the last minute of steps."""

    def __init__(self, epoch: int, total_steps: int, now_s: Callable[[], float]) -> None:
        self._epoch = epoch
        self._total_steps = total_steps
        self._now_s = now_s
        self._steps: deque[tuple[float, int, int]] = deque()
        self._learning_rate: float | None = None

    def begin(self, state: DriverState) -> None:
        """Training starts or goes on now."""
        self._steps.clear()
        self._steps.append((self._now_s(), state.step, state.tokens))

    def add(self, state: DriverState, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        now_s = self._now_s()
        self._steps.append((now_s, state.step, state.tokens))
        while len(self._steps) > 2 and self._steps[0][0] < now_s - WINDOW_S:
            self._steps.popleft()

    def report(
        self, state: DriverState, evals: EvalLog, cursor: int, rewound: str = "", eval_cursor: int | None = None
    ) -> Progress:
        """What is said of the job; `rewound` says why it went on from an older checkpoint, if it did."""
        tokens_per_second = eta_s = None
        if len(self._steps) > 1:
            (begin_s, begin_step, begin_tokens), (end_s, end_step, end_tokens) = self._steps[0], self._steps[-1]
            if end_s > begin_s:
                tokens_per_second = (end_tokens - begin_tokens) / (end_s - begin_s)
                eta_s = (self._total_steps - state.step) * (end_s - begin_s) / (end_step - begin_step)
        return Progress(
            epoch=self._epoch,
            step=state.step,
            cursor=max(cursor, state.step),
            eval_cursor=eval_cursor,
            total_steps=self._total_steps,
            tokens=state.tokens,
            loss=state.loss,
            learning_rate=self._learning_rate,
            eval_loss_initial=state.eval_loss_initial,
            eval_loss=state.eval_loss,
            evaluations=evals.last(),
            best=evals.best_message(),
            tokens_per_second=tokens_per_second,
            eta_seconds=eta_s,
            rewound=rewound,
        )
