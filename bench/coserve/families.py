"""Who is compared: ours, its ablations, and what others do, each with the settings among which its best is taken."""

from __future__ import annotations

from dataclasses import dataclass

OURS, ALONE = "ours", "serving alone"


@dataclass(frozen=True, slots=True)
class Family:
    """One way to decide. `settings` are names of the simulator's policies, from mild to rough, the
    published one among them.

    `kind`: "other" is what a system runs; "beyond" goes beyond what any published code does, on parts of ours;
    "ablation" is ours without one of its parts.
    """

    name: str
    kind: str
    settings: tuple[str, ...]
    source: str


def _named(form: str, *values: object) -> tuple[str, ...]:
    return tuple(form.replace("N", str(value)) for value in values)


FAMILIES = (
    Family(
        "static split",
        "other",
        tuple(f"split {share}/{100 - share}" for share in (95, 90, 85, 80, 75, 70, 65, 60, 50)),
        "two parts of the machine, each as fast as its share, without any interference",
    ),
    Family(
        "temporal sharing",
        "other",
        ("training when idle", *_named("temporal 1:N", 16384, 2048, 512, 64)),
        "a whole training step after so many iterations, and whenever nobody is served",
    ),
    Family(
        "FlexLLM's code",
        "other",
        _named("fixed N rows", 32, 64, 80, 96, 128, 192, 256),
        "forward in windows up to so many rows, backward by whole layers; 256 as published",
    ),
    Family(
        "Loquetier",
        "other",
        _named("N steps, 1 training", 16384, 4096, 512, 64, 5),
        "a whole training step in and after every so many-th forward; 5 as published",
    ),
    Family(
        "LLMStation",
        "other",
        _named("a layer in N", 1024, 128, 32, 16, 8, 6, 4, 3, 2, 1),
        "a layer of training every so many iterations",
    ),
    Family(
        "fixed tokens",
        "beyond",
        _named("fixed N tokens", 64, 72, 80, 88, 96, 112, 128, 144, 160, 192, 256),
        "FlexLLM's paper: what serving leaves of so many rows goes to windows of forward or backward",
    ),
    Family(
        "latency budget",
        "beyond",
        _named("N % of the gap", 30, 40, 45, 50, 55, 60, 65, 70, 80),
        "FlexLLM's f(c, s) <= SLO, with our latency model's predictions and a margin that is swept",
    ),
    *(
        Family(name, "ablation", (name,), what)
        for name, what in (
            ("ours, no fusion", "forward windows in forwards of their own"),
            ("ours, no stop", "an arrival ends neither units nor a forward"),
            ("ours, window 128", "windows and units of 128 rows only"),
            ("ours, no model", "a fixed budget instead of predictions"),
        )
    ),
)
