"""Arguments of `python -m coserve_agent.data`: those of the job have its names, defaults and bounds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field, TypeAdapter, ValidationError

from coserve_agent import strict_json
from coserve_api.common import BatchSize, Day, Epochs, SequenceLength, TemplateVariables
from coserve_api.job import DatasetFormat, Learn

_Number = Annotated[int, Field(ge=0)]
_LineNumber = Annotated[int, Field(ge=1)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help says more\n")


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="python -m coserve_agent.data",
        description="Show what a job would make of a data set: its tokens, which of them are learned, what they cost, "
        "and each line that cannot be used.",
        epilog="exit status: 0 the data set is fit, 1 a job with dataset.onInvalid Fail would be refused, "
        "2 an argument, the file's name or the model's folder is wrong",
        allow_abbrev=False,
    )
    made.add_argument("files", nargs="+", type=_path, metavar="FILE", help="a file, a folder, or a pattern in quotes")
    made.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the base model's folder")
    job = made.add_argument_group("as in the job (the defaults are the job's)")
    job.add_argument("--format", type=_choice(DatasetFormat), default=DatasetFormat.AUTO, help=_names(DatasetFormat))
    job.add_argument("--learn", type=_choice(Learn), default=Learn.ALL, help=_names(Learn))
    job.add_argument(
        "--max-length", type=_of(SequenceLength), default=1024, metavar="N", help="dataset.maxSequenceLength, in tokens"
    )
    job.add_argument(
        "--template-variables", type=_variables, default={}, metavar="JSON", help="dataset.templateVariables"
    )
    job.add_argument("--date", type=_day, metavar="YYYY-MM-DD", help="dataset.date; default: today (UTC)")
    job.add_argument("--batch-size", type=_of(BatchSize), default=8, metavar="N", help="lines of an optimizer step")
    job.add_argument("--epochs", type=_of(Epochs), default=1, metavar="N", help="times through the data")
    look = made.add_argument_group("what to show")
    look.add_argument("--lines", type=_of(_Number), metavar="N", help="the first N usable lines (default 3)")
    look.add_argument(
        "--line",
        type=_of(_LineNumber),
        action="append",
        default=[],
        metavar="K",
        help="line K instead; may be repeated",
    )
    look.add_argument("--ids", action="store_true", help="each token on a line of its own, with its id")
    return made


def _path(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is a URI; give the path that the file has here")
    return Path(text)


def _of(kind: Any) -> Callable[[object], Any]:
    """Values within the bounds of the custom resource."""
    adapter = TypeAdapter(kind)

    def convert(given: object) -> Any:
        try:
            return adapter.validate_python(given)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise argparse.ArgumentTypeError(f"{given!r}: {message[:1].lower()}{message[1:]}") from None

    return convert


def _day(text: str) -> date:
    return date.fromisoformat(_of(Day)(text))


def _choice(kind: type[DatasetFormat] | type[Learn]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {_names(kind)}") from None

    return convert


def _names(kind: type[DatasetFormat] | type[Learn]) -> str:
    *names, last = kind
    return f"{', '.join(names)} or {last}"


def _variables(text: str) -> dict[str, Any]:
    try:
        value = strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON ({error}); write {{"enable_thinking": false}}') from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} must be an object such as {{"enable_thinking": false}}')
    variables: dict[str, Any] = _of(TemplateVariables)(value)
    return variables
