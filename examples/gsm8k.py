"""GSM8K as the examples use it: one fixed split, plain documents for the base model, JSON targets for the job.

The base model must not have seen what the job trains on or what the demo asks, so every script takes its
questions from :func:`load_split` and from nowhere else.
"""

import gzip
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

DATA_FILE = Path(__file__).parent / "data" / "gsm8k_train.jsonl.gz"
JOB_COUNT = 500
HELD_OUT_COUNT = 473
SPLIT_SEED = 0

_MARK = re.compile(r"<<(.*?)>>")
_FINAL = re.compile(r"\n####\s*(-?[\d,]+)\s*$")


class DataError(ValueError):
    """A data file is missing or does not read as GSM8K; the message names the file, the line and the remedy."""


@dataclass(frozen=True)
class Problem:
    """One problem: the question, the worked answer without marks, the calculations in it, the final number."""

    question: str
    worked: str
    steps: tuple[str, ...]
    answer: int

    def json_target(self) -> str:
        """The job's target, e.g. ``{"steps": ["48/2=24"], "answer": 24}``."""
        return json.dumps({"steps": list(self.steps), "answer": self.answer})

    def messages(self) -> dict[str, list[dict[str, str]]]:
        """One line of the job's dataset in the ``messages`` format."""
        turns = [("user", self.question), ("assistant", self.json_target())]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


@dataclass(frozen=True)
class Split:
    """Three parts that share no question."""

    base: tuple[Problem, ...]
    job: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


def parse_problem(question: str, answer: str) -> Problem:
    """Read one line's two fields; raises :class:`DataError` where the line with the final number is missing."""
    final = _FINAL.search(answer)
    if final is None:
        raise DataError(f"answer: no line '#### <number>' at the end of {answer[-60:]!r}")
    worked = _MARK.sub("", answer[: final.start()]).strip()
    steps = tuple(_MARK.findall(answer[: final.start()]))
    return Problem(question.strip(), worked, steps, int(final.group(1).replace(",", "")))


def read_problems(path: Path = DATA_FILE) -> list[Problem]:
    """Read the gzipped JSON lines; a question that occurs twice is kept once, so that no split can share it."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; it is part of the repository, restore it with git checkout")
    problems: dict[str, Problem] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                problem = parse_problem(row["question"], row["answer"])
            except (KeyError, ValueError) as error:
                raise DataError(f"{path}, line {number}: not a GSM8K problem: {error}") from error
            problems.setdefault(" ".join(problem.question.lower().split()), problem)
    return list(problems.values())


def split_problems(problems: list[Problem]) -> Split:
    """Shuffle with a fixed seed, then take the job's and the held-out problems; the base gets all others.

    A problem without marks has no steps for a JSON target, so only the base uses it.
    """
    order = list(problems)
    random.Random(SPLIT_SEED).shuffle(order)
    marked = [problem for problem in order if problem.steps]
    if len(marked) < JOB_COUNT + HELD_OUT_COUNT:
        raise DataError(f"{len(marked)} problems with marks; the split needs {JOB_COUNT + HELD_OUT_COUNT} and a base")
    reserved = marked[: JOB_COUNT + HELD_OUT_COUNT]
    taken = set(reserved)
    base = tuple(problem for problem in order if problem not in taken)
    return Split(base=base, job=tuple(reserved[:JOB_COUNT]), held_out=tuple(reserved[JOB_COUNT:]))


def load_split(path: Path = DATA_FILE) -> Split:
    """The split that the shipped base model was trained with: 6,500 base, 500 job, 473 held out."""
    return split_problems(read_problems(path))
