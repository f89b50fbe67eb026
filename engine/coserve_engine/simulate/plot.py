"""What the comparison looks like: finetuning against attainment for each policy, and against the median gap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from coserve_engine.simulate.compare import Row

STRICT_FLOOR = 99.0


def draw(rows: Sequence[Row], frontier: Sequence[Row], path: Path) -> None:
    """Write a PNG: one panel for each SLO, and one of the frontier if there is one."""
    slos = sorted({row.slo_ms for row in rows})
    panels = len(slos) + bool(frontier)
    figure, axes = plt.subplots(1, panels, figsize=(6.2 * panels, 5.4), squeeze=False, layout="constrained")
    for axis, slo in zip(axes[0], slos, strict=False):
        _attainment(axis, [row for row in rows if row.slo_ms == slo], slo)
    if frontier:
        _frontier(axes[0][-1], frontier)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _attainment(axis: Any, rows: Sequence[Row], slo_ms: float) -> None:
    colours = cycle(mpl.color_sequences["tab20"])
    loads = sorted({row.load_percent for row in rows})
    for policy in dict.fromkeys(row.policy for row in rows):
        mine = sorted((row for row in rows if row.policy == policy), key=lambda row: row.load_percent)
        ours = policy == "ours"
        axis.plot(
            [row.strict for row in mine],
            [row.finetuning for row in mine],
            marker="o",
            markersize=8 if ours else 5,
            linewidth=2.5 if ours else 1.0,
            color="black" if ours else next(colours),
            label=policy,
            zorder=3 if ours else 2,
        )
        if ours:
            for row in mine:
                axis.annotate(
                    f"{row.load_percent:.0f} %",
                    (row.strict, row.finetuning),
                    xytext=(-10, 4),
                    textcoords="offset points",
                    ha="right",
                    fontsize=9,
                )
    axis.axvspan(STRICT_FLOOR, 102, color="tab:green", alpha=0.08, zorder=0)
    axis.set(
        title=f"{slo_ms:.0f} ms a token, loads {', '.join(f'{load:.0f}' for load in loads)} %",
        xlabel="requests that attain, strictly (%)",
        ylabel="finetuning (% of alone)",
        xlim=(-3, 102),
        ylim=(-2, 100),
    )
    axis.grid(alpha=0.25)


def _frontier(axis: Any, rows: Sequence[Row]) -> None:
    styles = cycle(("-", "--", ":", "-."))
    for slo in sorted({row.slo_ms for row in rows}):
        style = next(styles)
        for load in sorted({row.load_percent for row in rows}):
            mine = [row for row in rows if row.slo_ms == slo and row.load_percent == load]
            axis.plot(
                [row.median_gap_ms for row in mine],
                [row.finetuning for row in mine],
                style,
                marker="o",
                markersize=4,
                label=f"{slo:.0f} ms, load {load:.0f} %",
            )
    axis.set(title="ours, maxSlowdownPercent 0 to none", xlabel="median gap (ms)", ylabel="finetuning (% of alone)")
    axis.set_xlim(left=0)
    axis.set_ylim(-2, 100)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
