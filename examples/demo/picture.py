"""A run as one picture (SVG): what the agents computed each second, and the gaps that clients saw, beside the SLO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from demo.replay import Sample, Slo, percentile
from demo.watch import AgentLog

WIDTH, LEFT, RIGHT = 960, 70, 20
TOP_HEIGHT, BOTTOM_HEIGHT, GAP, MARGIN = 220, 140, 50, 46
COLOURS = {"decode": "#2f7d4f", "prefill": "#d8a31a", "finetune": "#5b8bd0", "backward": "#9fc1ee"}
NAMES = {"decode": "decode", "prefill": "prefill", "finetune": "finetune forward", "backward": "finetune backward"}


@dataclass(frozen=True)
class Second:
    """One second: tokens by kind, all agents together, and the P99 of the gaps that ended in it, in ms."""

    tokens: dict[str, float]
    gap_ms: float


def by_second(logs: Sequence[AgentLog], samples: Sequence[Sample], started_s: float, seconds: int) -> list[Second]:
    """Bins from `started_s`; the agents' clocks must be this machine's (the development cluster's are)."""
    tokens = [dict.fromkeys(COLOURS, 0.0) for _ in range(seconds)]
    for log in logs:
        for row in log.iterations:
            second = int(row["started"] - started_s)
            if row["started"] >= started_s and second < seconds:
                for kind in COLOURS:
                    tokens[second][kind] += row[kind]
    gaps: list[list[float]] = [[] for _ in range(seconds)]
    for sample in samples:
        for before, after in zip(sample.token_times_s, sample.token_times_s[1:], strict=False):
            second = int(after - started_s)
            if 0 <= second < seconds:
                gaps[second].append(after - before)
    return [Second(t, percentile(g, 99) * 1e3) for t, g in zip(tokens, gaps, strict=True)]


def draw(seconds: Sequence[Second], slo: Slo, title: str) -> str:
    """The picture as SVG text."""
    span = WIDTH - LEFT - RIGHT
    step = span / max(1, len(seconds))
    top = max(sum(s.tokens.values()) for s in seconds) or 1.0
    height = MARGIN + TOP_HEIGHT + GAP + BOTTOM_HEIGHT + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{title}</text>',
    ]
    base = MARGIN + TOP_HEIGHT
    for index, second in enumerate(seconds):
        y = float(base)
        for kind, colour in COLOURS.items():
            size = second.tokens[kind] / top * TOP_HEIGHT
            y -= size
            if size > 0:
                parts.append(_bar(LEFT + index * step, y, step, size, colour))
    parts += _axis(base, TOP_HEIGHT, top, "tokens/s")
    for place, (kind, colour) in enumerate(COLOURS.items()):
        x = LEFT + 160 * place
        parts += [_bar(x, 28, 10, 10, colour), f'<text x="{x + 14}" y="37">{NAMES[kind]}</text>']
    base += GAP + BOTTOM_HEIGHT
    limit = slo.tpot_s * 1e3
    worst = max([s.gap_ms for s in seconds] + [limit]) * 1.1
    for index, second in enumerate(seconds):
        size = second.gap_ms / worst * BOTTOM_HEIGHT
        colour = "#7d5ba6" if second.gap_ms <= limit else "#c0392b"
        parts.append(_bar(LEFT + index * step, base - size, step, size, colour))
    y = base - limit / worst * BOTTOM_HEIGHT
    parts += _axis(base, BOTTOM_HEIGHT, worst, "P99 gap, ms")
    parts += [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c0392b" stroke-dasharray="6 4"/>',
        f'<text x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end" fill="#c0392b">promise: {limit:.0f} ms</text>',
    ]
    for tick in range(0, len(seconds) + 1, 10):
        parts.append(f'<text x="{LEFT + tick * step:.1f}" y="{base + 18}" text-anchor="middle">{tick} s</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" fill="{colour}"/>'


def _axis(base: float, height: float, top: float, label: str) -> list[str]:
    middle = base - height / 2
    return [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" stroke="#888"/>',
        f'<text x="{LEFT - 8}" y="{base}" text-anchor="end">0</text>',
        f'<text x="{LEFT - 8}" y="{base - height + 10}" text-anchor="end">{top:.0f}</text>',
        f'<text x="16" y="{middle}" transform="rotate(-90 16 {middle})" text-anchor="middle">{label}</text>',
    ]
