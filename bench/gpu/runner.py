"""Steps one after another until a limit, with what each found on disk: a run that ends early goes on from there."""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS, SUMMARY = "results.json", "summary.md"
Figures = dict[str, Any]
"""What a step found: `lines` for the summary, `met` where it is held to something, and numbers."""


class OutOfTimeError(Exception):
    """The limit came while a step ran."""


class MissingError(Exception):
    """A step needs what another one did not find."""


class OtherRunError(Exception):
    """The folder holds what another machine or another source found."""


@dataclass(frozen=True, slots=True)
class Step:
    """`run` is told when it should be done, `budget_s` after its start: it begins only where that is left."""

    name: str
    budget_s: float
    run: Callable[[float], Figures]


class Results:
    """What was found so far, in a folder."""

    def __init__(self, folder: Path, of: dict[str, str]) -> None:
        """`of`: machine, triton and source, which may not change from one run to the next.

        Raises:
            OtherRunError: they did.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._of = folder, of
        self.steps: dict[str, Figures] = {}
        path = folder / RESULTS
        if not path.exists():
            return
        found = json.loads(path.read_text())
        for name, value in of.items():
            if found["of"].get(name) != value:
                raise OtherRunError(
                    f"--out is {folder}, whose {name} is {found['of'].get(name)!r}, and here it is {value!r}: figures "
                    "of the two do not belong together; name an empty folder"
                )
        self.steps = found["steps"]

    def done(self, name: str) -> bool:
        """Whether a step came to its end, met or not."""
        return "error" not in self.steps.get(name, {"error": "not run"})

    def found(self, name: str) -> Figures:
        """What a step found.

        Raises:
            MissingError: nothing.
        """
        if not self.done(name):
            raise MissingError(f"needs what {name!r} finds, which failed")
        return self.steps[name]

    def held(self, name: str) -> bool:
        """Whether a step came to its end and nothing that it is held to was missed."""
        return self.done(name) and self.steps[name].get("met", True)

    def add(self, name: str, figures: Figures) -> None:
        self.steps[name] = figures
        self._write(RESULTS, json.dumps({"of": self._of, "steps": self.steps}, indent=1) + "\n")
        self._write(SUMMARY, "\n".join(self._lines()) + "\n")

    def _write(self, name: str, text: str) -> None:
        part = self._folder / f".{name}"
        part.write_text(text)
        part.replace(self._folder / name)

    def _lines(self) -> Iterator[str]:
        yield from (f"{name}: {value}" for name, value in self._of.items())
        for name, figures in self.steps.items():
            verdict = {True: ", met", False: ", NOT MET"}.get(figures.get("met"), "")
            verdict = ", FAILED" if "error" in figures else verdict
            yield f"\n## {name} ({figures['seconds']:.1f} s{verdict})"
            yield from figures.get("lines", [])
            if "error" in figures:
                yield figures["error"]


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError in the block once so many seconds are over."""

    def ring(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_steps(
    steps: Sequence[Step], results: Results, clock: Callable[[], float], end: float, say: Callable[[str], None] = print
) -> str | None:
    """Run what is not done yet, in order, until `end` of `clock`. Returns the step that there was no time for.

    A step that fails is written down with its traceback and the next one begins; another run tries it again.
    """
    for step in steps:
        if results.done(step.name):
            continue
        started = clock()
        if end - started < step.budget_s:
            return step.name
        try:
            with alarm(end - started):
                figures = step.run(started + step.budget_s)
        except OutOfTimeError:
            return step.name
        except Exception as error:  # whatever a device refuses: what other steps find is wanted all the same
            figures = {"error": "".join(traceback.format_exception(error)[-3:])}
        figures["seconds"] = clock() - started
        results.add(step.name, figures)
        say(f"{step.name}: {figures['seconds']:.1f} s{' FAILED' if 'error' in figures else ''}")
    return None
