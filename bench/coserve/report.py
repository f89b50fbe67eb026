"""What came out, as JSON for programs and as Markdown for people."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from coserve.families import ALONE, FAMILIES, OURS
from coserve.interval import Mean, mean
from coserve.real import Measured
from coserve.study import POINTS, Load, Outcome, Results

ASKED = {30.0: 1.3, 70.0: 2.5}
"""How many times the best feasible other policy's rate is asked for, by load."""


def machine_name() -> str:
    """The processor as Linux names it, and how many cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {name.strip(): value.strip() for name, value in fields.items()}
    cores = sum(line.startswith("processor") for line in lines)
    flags = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in named.get("flags", "").split()]
    model = f"{named.get('model name', platform.processor())} (model {named.get('model', '?')})"
    return f"{cores} cores of {model}, {', '.join(flags)}"


def markdown(results: Results, measured: Measured, machine: str) -> str:
    """All tables."""
    parts = [_measured(measured, machine), *(made(results) for made in (_ratios, _rates, _steady, _settings))]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _table(head: Sequence[str], rows: Iterator[Sequence[object]] | Sequence[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows)]


def _measured(m: Measured, machine: str) -> list[str]:
    f, unit, head = m.machine.forward, m.machine.unit, m.machine.head
    longest_ms = max(m.pauses.ms, default=0.0)
    lines = [
        "## Measured on this machine",
        f"{machine}. A forward takes {f.fixed_ms:.1f} ms and {f.decode_ms:.2f}, {f.prefill_ms:.2f}, "
        f"{f.finetune_ms:.2f} ms a row of decode, prompts, finetuning (noise {100 * m.noise:.1f} %);",
        f"backward of a layer {unit.fixed_ms:.1f} ms and {unit.row_ms:.3f} ms a row, of the head {head.row_ms:.3f} ms; "
        f"{m.machine.turnaround_ms:.1f} ms pass between two iterations;",
        f"{m.pauses.per_s:.2f} pauses a second, {longest_ms:.0f} ms at most. Finetuning alone: {m.alone:.0f} tokens/s, "
        f"simulated {m.simulated_alone:.0f}.",
        "",
        f"Replayed at {m.load_percent:.0f} % load ({m.rate:.2f} requests/s), {m.tpot_ms:.0f} ms, in turns, "
        "real / simulated:",
        "",
    ]
    rows = [
        (
            real.policy,
            real.requests,
            f"{real.strict:.1f} ({real.quiet_strict:.1f} but for pauses) / {simulated.strict:.1f}",
            f"{real.tokens_per_s:.0f} / {simulated.tokens_per_s:.0f}",
            f"{real.finetuning:.1f} / {simulated.finetuning:.1f}",
            f"{real.median_gap_ms:.0f} / {simulated.median_gap_ms:.0f}",
            f"{real.p99_gap_ms:.0f} / {simulated.p99_gap_ms:.0f}",
            f"{real.reserve_ms:.0f}",
        )
        for real, simulated in zip(m.real, m.simulated, strict=True)
    ]
    lines += _table(
        ("policy", "requests", "strict %", "tokens/s", "% of alone", "gap P50 ms", "gap P99 ms", "reserve ms"), rows
    )
    trained = [name for name in dict.fromkeys(block.policy for block in m.real) if name != ALONE]
    errors = ", ".join(f"{name} {m.error_percent(name):+.1f} %" for name in trained)
    return [*lines, "", f"The simulator's finetuning rate beside the real one: {errors}."]


def _ratios(results: Results) -> list[str]:
    rows = []
    for load in results.loads:
        published, beyond = (results.best_other(load, kinds) for kinds in (("other",), ("other", "beyond")))
        lenient = results.best_other(load, ("other",), strict=False)
        asked = ASKED.get(load.percent)
        rows.append(
            (
                f"{load.slo_ms:.0f}",
                f"{load.percent:.0f}",
                *_ours(results, load),
                _said(results, load, published),
                _verdict(results.ratio(load, published), asked),
                _said(results, load, beyond),
                _verdict(results.ratio(load, beyond), asked),
                _said(results, load, lenient),
            )
        )
    head = (
        "SLO ms",
        "load %",
        "ours, % of alone",
        "% of the bound",
        "best system as published",
        "asked for",
        "best of any, with parts of ours",
        "asked for",
        "best by P99 TTFT and mean gaps",
    )
    return ["## Ours beside the best feasible other", "", *_table(head, rows)]


def _ours(results: Results, load: Load) -> tuple[str, str]:
    rate = mean([row.finetuning for row in results.of(load, OURS)])
    said = f"{rate}" if results.keeps(load, OURS) else f"infeasible ({rate})"
    return said, f"{100 * rate.value / load.bound:.0f}" if load.bound > 0 else "-"


def _said(results: Results, load: Load, other: Outcome) -> str:
    ratio = results.ratio(load, other)
    if ratio is None:
        return "none is feasible"
    return f"{other.setting}: {other.rate}; ours **{ratio.value:.2f} x**{_within(ratio)}"


def _within(ratio: Mean) -> str:
    return f" (± {ratio.within:.2f})" if ratio.within == ratio.within else ""


def _verdict(ratio: Mean | None, asked: float | None) -> str:
    if asked is None:
        return ""
    met = ratio is None or ratio.value >= asked
    return f"{asked} x: {'met' if met else 'not met'}"


def _rates(results: Results) -> list[str]:
    """What each family's best feasible setting gets."""
    lines = [
        "## Finetuning, % of its rate alone, at the best setting that keeps the promise",
        f"Strictly: at most {POINTS:.0f} point of attainment below serving alone; 0: no setting does.",
        "",
    ]
    head = ("", *(f"{load.slo_ms:.0f} ms, {load.percent:.0f} %" for load in results.loads))
    attained = [f"{mean([row.strict for row in results.of(load, ALONE)]).value:.1f}" for load in results.loads]
    rows = [
        ("serving alone attains, %", *attained),
        ("most that is possible", *(f"{load.bound:.1f}" for load in results.loads)),
    ]
    rows.append(("**ours**", *(_ours(results, load)[0] for load in results.loads)))
    for family in FAMILIES:
        best = [results.best(load, family) for load in results.loads]
        cells = [f"{outcome.rate}<br>{outcome.setting}" if outcome.setting else "0" for outcome in best]
        if family.kind == "ablation":
            cells = [str(outcome.rate) if outcome.setting else "0" for outcome in best]
        rows.append((family.name, *cells))
    return [*lines, *_table(head, rows)]


def _steady(results: Results) -> list[str]:
    """What a budget gets that is set once: nobody knows the load of the next hour."""
    lines = ["## One setting for all loads", "That of each family which keeps the promise at every load above.", ""]
    rows = []
    for slo_ms in sorted({load.slo_ms for load in results.loads}):
        loads = [load for load in results.loads if load.slo_ms == slo_ms]
        ours = [mean([row.finetuning for row in results.of(load, OURS)]).value for load in loads]
        rows.append((f"{slo_ms:.0f} ms", "**ours**", "", *(f"{rate:.1f}" for rate in ours)))
        for family in FAMILIES:
            if family.kind == "ablation":
                continue
            name = results.steady(loads, family)
            cells = ["-"] * len(loads)
            if name:
                rates = [mean([row.finetuning for row in results.of(load, name)]).value for load in loads]
                cells = [
                    f"{rate:.1f} ({mine / rate:.2f} x)" if rate > 0 else "0"
                    for rate, mine in zip(rates, ours, strict=True)
                ]
            rows.append((f"{slo_ms:.0f} ms", family.name, name or "none", *cells))
    percents = dict.fromkeys(load.percent for load in results.loads)
    return [*lines, *_table(("SLO", "", "setting", *(f"{percent:.0f} %" for percent in percents)), rows)]


def _settings(results: Results) -> list[str]:
    """Every setting that was run on the first seed, for who wants to look closer."""
    lines = ["## Every setting, first seed", "Finetuning % of alone / strict attainment %", ""]
    head = ("", *(f"{load.slo_ms:.0f} ms, {load.percent:.0f} %" for load in results.loads))
    names = [OURS, ALONE, *(name for family in FAMILIES for name in family.settings)]
    rows = [
        (
            name,
            *(
                f"{row.finetuning:.1f} / {row.strict:.1f}"
                for load in results.loads
                for row in results.of(load, name)[:1]
            ),
        )
        for name in names
    ]
    return [*lines, *_table(head, rows)]


def as_json(results: Results, measured: Measured, machine: str) -> str:
    """Everything that was run."""
    runs = [{"seed": seed, **asdict(row)} for rows in results.rows.values() for seed, row in enumerate(rows)]
    summary = [
        {
            "slo_ms": load.slo_ms,
            "load_percent": load.percent,
            "bound_percent": load.bound,
            "capacity_requests_per_s": load.seeds[0].capacity,
            "feasible": {name: results.keeps(load, name) for name in (OURS, ALONE)},
            "best": {
                family.name: {
                    measure: {"setting": outcome.setting, "rate": outcome.rate._asdict()}
                    for measure, outcome in (
                        ("strict", results.best(load, family)),
                        ("p99", results.best(load, family, strict=False)),
                    )
                }
                for family in FAMILIES
            },
        }
        for load in results.loads
    ]
    return json.dumps({"machine": machine, "measured": _plain(measured), "loads": summary, "runs": runs}, indent=1)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
