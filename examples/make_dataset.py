"""Write what the demo's finetuning job needs: its dataset, and the held-out questions that show its effect.

    python examples/make_dataset.py --out /tmp/demo

The job learns to answer in JSON. `job.jsonl` holds its 500 lines in the `messages` format; `held_out.jsonl` holds 24
lines of the same form that neither the base model nor the job has seen: ask the user's turn, compare with the
assistant's.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from gsm8k import HELD_OUT_COUNT, JOB_COUNT, DataError, Problem, load_split


def write_lines(path: Path, problems: Iterable[Problem]) -> int:
    """Write one JSON line a problem; returns how many."""
    lines = [json.dumps(problem.messages(), ensure_ascii=False) for problem in problems]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the demo's job dataset and held-out questions.")
    parser.add_argument("--out", type=Path, required=True, help="folder for job.jsonl and held_out.jsonl")
    parser.add_argument("--job", type=int, default=JOB_COUNT, help=f"lines for the job, 1 to {JOB_COUNT} (default all)")
    parser.add_argument("--held-out", type=int, default=24, help=f"questions, 1 to {HELD_OUT_COUNT} (default 24)")
    args = parser.parse_args()
    for option, value, most in (("--job", args.job, JOB_COUNT), ("--held-out", args.held_out, HELD_OUT_COUNT)):
        if not 1 <= value <= most:
            parser.error(f"{option} is {value}; it must lie between 1 and {most}")
    return args


def main() -> int:
    args = arguments()
    try:
        split = load_split()
        args.out.mkdir(parents=True, exist_ok=True)
        for name, problems in (("job", split.job[: args.job]), ("held_out", split.held_out[: args.held_out])):
            path = args.out / f"{name}.jsonl"
            print(f"{path}: {write_lines(path, problems)} lines")
    except (DataError, OSError) as error:
        print(f"make_dataset: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
