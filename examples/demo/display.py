"""What a person sees while the demo runs: a live screen on a terminal, a line every five seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo.replay import Sample, Slo, percentile
from demo.watch import Watcher

COLOURS = {"decode": "green", "prefill": "yellow", "finetune": "blue", "backward": "cyan"}
BLOCKS = " ▁▂▃▄▅▆▇█"
HISTORY = 72
LINE_S = 5.0


class Display:
    """A context manager; `update` once a second."""

    def __init__(self, console: Console, watcher: Watcher, slo: Slo, title: str) -> None:
        self._console, self._watcher, self._slo, self._title = console, watcher, slo, title
        self._mixes: deque[dict[str, float]] = deque(maxlen=HISTORY)
        self._gaps: deque[float] = deque(maxlen=HISTORY)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._last_line = 0.0

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, phase: str, samples: Sequence[Sample]) -> None:
        """Draw the state of now."""
        mix = self._watcher.mix(1.0)
        now = time.monotonic()
        recent = [
            b - a
            for sample in samples
            for a, b in zip(sample.token_times_s, sample.token_times_s[1:], strict=False)
            if b > now - 1.0
        ]
        self._mixes.append(mix)
        self._gaps.append(percentile(recent, 99))
        if self._live:
            self._live.update(self._screen(phase, samples), refresh=True)
        elif now - self._last_line >= LINE_S:
            self._last_line = now
            self._console.print(self._line(phase, samples, mix), soft_wrap=True)

    def _serving(self, samples: Sequence[Sample]) -> dict[str, float]:
        ttfts = [s.ttft_s for s in samples if s.ttft_s is not None]
        gaps = [gap for s in samples for gap in s.gaps_s]
        return {
            "sent": len(samples),
            "running": sum(not s.done for s in samples),
            "failed": sum(s.error is not None for s in samples),
            "ttft50": percentile(ttfts, 50) * 1e3,
            "ttft99": percentile(ttfts, 99) * 1e3,
            "gap50": percentile(gaps, 50) * 1e3,
            "gap99": percentile(gaps, 99) * 1e3,
        }

    def _job(self) -> dict[str, str]:
        status = self._watcher.job.get("status", {})
        progress, binding = status.get("progress", {}), status.get("binding", {})
        return {
            "state": status.get("state", "Pending"),
            "step": f"{progress.get('step', 0)}/{progress.get('totalSteps', '?')}",
            "loss": str(progress.get("loss", "-")),
            "eta": str(progress.get("eta", "-")),
            "agent": binding.get("agent", "-"),
            "epoch": str(binding.get("epoch", "-")),
        }

    def _line(self, phase: str, samples: Sequence[Sample], mix: dict[str, float]) -> str:
        job, serving = self._job(), self._serving(samples)
        return (
            f"{phase} | job {job['state']} step {job['step']} loss {job['loss']} eta {job['eta']} "
            f"epoch {job['epoch']} | requests {serving['sent']:.0f} running {serving['running']:.0f} "
            f"failed {serving['failed']:.0f} | TTFT p50 {serving['ttft50']:.0f} p99 {serving['ttft99']:.0f} ms "
            f"(SLO {self._slo.ttft_s * 1e3:.0f}) | gap p50 {serving['gap50']:.0f} p99 {serving['gap99']:.0f} ms "
            f"(SLO {self._slo.tpot_s * 1e3:.0f}) | tokens/s decode {mix['decode']:.0f} "
            f"prefill {mix['prefill']:.0f} finetune {mix['backward']:.0f}"
        )

    def _screen(self, phase: str, samples: Sequence[Sample]) -> Group:
        job, serving = self._job(), self._serving(samples)
        table = Table.grid(padding=(0, 3))
        table.add_row(
            f"[b]{job['state']}[/b] step {job['step']}",
            f"loss {job['loss']}",
            f"eta {job['eta']}",
            f"epoch {job['epoch']}",
            f"agent {job['agent']}",
        )
        latency = Table.grid(padding=(0, 3))
        for name, unit, slo in (("TTFT", "ttft", self._slo.ttft_s), ("gap", "gap", self._slo.tpot_s)):
            latency.add_row(
                name,
                f"P50 {serving[unit + '50']:5.0f} ms",
                f"P99 {serving[unit + '99']:5.0f} ms",
                _meter(serving[unit + "99"], slo * 1e3),
            )
        counts = (
            f"requests {serving['sent']:.0f}   running {serving['running']:.0f}   failed {serving['failed']:.0f}   "
            f"P99 gap of each second, against the SLO of {self._slo.tpot_s * 1e3:.0f} ms:"
        )
        return Group(
            Panel(table, title=self._title, subtitle=phase),
            Panel(
                Group(latency, counts, self._history(list(self._gaps), "magenta", self._slo.tpot_s)), title="serving"
            ),
            Panel(self._mix_rows(), title="tokens a second"),
        )

    def _mix_rows(self) -> Table:
        rows = Table.grid(padding=(0, 2))
        for kind, colour in COLOURS.items():
            values = [mix[kind] for mix in self._mixes]
            name = {"finetune": "finetune forward", "backward": "finetune backward"}.get(kind, kind)
            rows.add_row(name, f"{values[-1]:6.0f}", self._history(values, colour, max([*values, 1.0])))
        return rows

    def _history(self, values: list[float], colour: str, top: float) -> Text:
        text = Text()
        for value in values:
            level = min(len(BLOCKS) - 1, round(value / top * (len(BLOCKS) - 1)))
            text.append(BLOCKS[level], style="red" if value > top else colour)
        return text


def _meter(value: float, limit: float, width: int = 40) -> Text:
    """A bar whose end is the SLO."""
    filled = min(width, round(value / limit * width))
    bar = Text("█" * filled, style="green" if value <= limit else "red")
    return bar.append("·" * (width - filled) + f"| SLO {limit:.0f} ms", style="dim")
