"""Three plots: finetuning against load, finetuning against the median gap, and one minute of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from coserve.families import ALONE, FAMILIES, OURS
from coserve.interval import mean
from coserve.minute import Minute
from coserve.study import POINTS, Load, Results, deficit
from coserve_engine.simulate.compare import Row

COLOURS = dict(zip((family.name for family in FAMILIES), mpl.color_sequences["tab10"] * 2, strict=False))
MARKS = dict(zip((family.name for family in FAMILIES), "osD^vXP", strict=False))
NEAR_MS = 8.0
APART = 0.5
"""Percent of load by which marks stand aside, lest intervals lie on each other."""
COMPARED = [family for family in FAMILIES if family.kind != "ablation"]
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.grid": True, "grid.alpha": 0.25}


def rate_against_load(results: Results, path: Path) -> None:
    """Per SLO: what finetuning gets of ours and of the best feasible setting of each family; 0: none is feasible."""
    slos = sorted({load.slo_ms for load in results.loads})
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(slos), figsize=(5.6 * len(slos), 4.8), squeeze=False, layout="constrained")
        for axis, slo_ms in zip(axes[0], slos, strict=True):
            loads = sorted((load for load in results.loads if load.slo_ms == slo_ms), key=lambda load: load.percent)
            at = [load.percent for load in loads]
            axis.plot(at, [load.bound for load in loads], "--", color="grey", label="most that is possible")
            for number, family in enumerate(COMPARED):
                rates = [results.best(load, family).rate for load in loads]
                aside = [percent + APART * (number - len(COMPARED) / 2) for percent in at]
                beyond = {"linestyle": ":"} if family.kind == "beyond" else {}
                _line(axis, aside, rates, family.name, color=COLOURS[family.name], marker=MARKS[family.name], **beyond)
            ours = [mean([row.finetuning for row in results.of(load, OURS)]) for load in loads]
            kept = [
                rate if results.keeps(load, OURS) else rate._replace(value=0.0)
                for load, rate in zip(loads, ours, strict=True)
            ]
            _line(axis, at, kept, "ours", color="black", marker="o", linewidth=2.8, markersize=7, zorder=5)
            axis.set(
                title=f"{slo_ms:.0f} ms a token",
                xlabel="load (% of what serving alone can take)",
                ylabel="finetuning (% of its rate alone)",
                ylim=(-2, 100),
                xticks=at,
            )
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=5, frameon=False)
        _save(figure, path)


def _line(axis: Any, at: list[float], rates: list[Any], name: str, **style: Any) -> None:
    within = [rate.within if rate.within == rate.within else 0.0 for rate in rates]
    shown = {"linewidth": 1.5, "markersize": 5, "elinewidth": 0.8, **style}
    _, _, (bars,) = axis.errorbar(at, [rate.value for rate in rates], within, label=name, **shown)
    bars.set_alpha(0.5)


def rate_against_gap(load: Load, results: Results, limits: list[tuple[float | None, Row]], path: Path) -> None:
    """Every setting of every family at one load, on the sweep's seed: filled where the promise is kept."""
    with mpl.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.6, 5.2), layout="constrained")
        for family in COMPARED:
            for name in family.settings:
                rows = results.of(load, name)[:1]
                if not rows:
                    continue
                (row,), kept = rows, deficit(results.of(load, ALONE), rows) <= POINTS
                colour = COLOURS[family.name]
                axis.plot(
                    row.median_gap_ms,
                    row.finetuning,
                    MARKS[family.name],
                    color=colour,
                    markerfacecolor=colour if kept else "none",
                    markersize=6,
                )
            axis.plot([], [], MARKS[family.name], color=COLOURS[family.name], label=family.name)
        axis.plot([], [], "o", color="grey", markerfacecolor="none", label="breaks the promise")
        axis.plot(
            [row.median_gap_ms for _, row in limits],
            [row.finetuning for _, row in limits],
            "o-",
            color="black",
            linewidth=2.4,
            label="ours, maxSlowdownPercent",
            zorder=5,
        )
        for limit, row in _apart(limits):
            said = "none" if limit is None else f"{100 * limit:.0f} %"
            axis.annotate(
                said,
                (row.median_gap_ms, row.finetuning),
                xytext=(-4, 7),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
        axis.axvline(load.slo_ms, color="tab:red", linewidth=1, linestyle="--")
        axis.set(
            title=f"load {load.percent:.0f} %, {load.slo_ms:.0f} ms a token",
            xlabel="median gap between two tokens (ms)",
            ylabel="finetuning (% of its rate alone)",
            xlim=(0, None),
            ylim=(-2, 100),
        )
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        _save(figure, path)


def _apart(limits: list[tuple[float | None, Row]]) -> list[tuple[float | None, Row]]:
    """Those of the limits whose names would not lie on each other."""
    shown: list[tuple[float | None, Row]] = []
    for limit, row in limits:
        if not shown or row.median_gap_ms - shown[-1][1].median_gap_ms > NEAR_MS:
            shown.append((limit, row))
    return shown


def one_minute(minutes: list[Minute], slo_ms: float, path: Path) -> None:
    """The requests that are served, finetuning second by second, and every gap between two tokens."""
    colours = {OURS: "black", ALONE: "tab:green"}
    with mpl.rc_context(STYLE):
        ratios = [1, 1.3, *([1.1] * len(minutes))]
        figure, axes = plt.subplots(
            2 + len(minutes),
            1,
            figsize=(9, 2.0 * sum(ratios) / 1.3),
            sharex=True,
            layout="constrained",
            height_ratios=ratios,
        )
        first = minutes[0]
        axes[0].fill_between(first.seconds, first.requests, step="mid", color="tab:blue", alpha=0.35)
        axes[0].set(ylabel="requests", ylim=(0, None), title="requests that are served")
        for minute in minutes:
            colour = colours.get(minute.policy, "tab:orange")
            axes[1].plot(minute.seconds, minute.finetuning, color=colour, label=minute.policy, linewidth=1.6)
        most = max(max(minute.finetuning) for minute in minutes)
        axes[1].set(ylabel="tokens/s", ylim=(0, 1.35 * max(most, 1.0)), title="finetuning")
        axes[1].legend(frameon=False, ncols=len(minutes), loc="upper right")
        for axis, minute in zip(axes[2:], minutes, strict=True):
            late = [gap > slo_ms for gap in minute.gaps_ms]
            axis.scatter(
                minute.gap_at_s,
                [min(gap_ms, 1.95 * slo_ms) for gap_ms in minute.gaps_ms],
                s=5,
                c=["tab:red" if is_late else "tab:grey" for is_late in late],
            )
            axis.axhline(slo_ms, color="tab:red", linewidth=1, linestyle="--")
            axis.set(
                ylabel="gap (ms)",
                ylim=(0, 2.0 * slo_ms),
                title=f"{minute.policy}: {sum(late):,} of {len(late):,} gaps are late",
            )
        axes[-1].set(xlabel="seconds", xlim=(0, 60))
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
