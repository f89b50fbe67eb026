"""`coserve data FILE --model FOLDER`: those options that a job has, too, have its names, defaults and bounds."""

from __future__ import annotations

import io
import signal
import sys
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import Field

from coserve_agent import strict_json
from coserve_agent.data.preview import Looked, preview
from coserve_api.common import BatchSize, Day, Epochs, SequenceLength, TemplateVariables
from coserve_api.job import DatasetFormat, Learn
from coserve_cli.options import Checked, names

_LINE_NUMBER = Checked("K", Annotated[int, Field(ge=1)])
_COUNT = Checked("N", Annotated[int, Field(ge=0)])


class _File(click.ParamType[Path]):
    name = "FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if "://" in str(value):
            self.fail(f"{value!r} is a URI; give the path that the file has here", param, ctx)
        return Path(value)


class _Day(Checked):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> date:
        return value if isinstance(value, date) else date.fromisoformat(super().convert(value, param, ctx))


class _Variables(Checked):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, dict):
            return value
        try:
            read = strict_json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f'{value!r} is no JSON ({error}); write {{"enable_thinking": false}}', param, ctx)
        if not isinstance(read, dict):
            self.fail(f'{value!r} must be an object such as {{"enable_thinking": false}}', param, ctx)
        return self.checked(read, param, ctx)


@click.command(
    epilog="Exit status: 0 the data set is fit, 1 a job with dataset.onInvalid Fail would be refused, 2 an option, the "
    "file's name or the model's folder is wrong."
)
@click.argument("files", nargs=-1, required=True, type=_File(), metavar="FILE...")
@click.option("--model", type=click.Path(path_type=Path), required=True, help="The base model's folder.")
@click.option("--format", "format_", type=names(DatasetFormat), default="auto", help="As in the job, as all below.")
@click.option("--learn", type=names(Learn), default="All", help="All answers, or the last of each row.")
@click.option(
    "--max-length", type=Checked("N", SequenceLength), default=1024, help="dataset.maxSequenceLength, tokens."
)
@click.option("--template-variables", type=_Variables("JSON", TemplateVariables), default="{}", help="An object.")
@click.option("--date", "day", type=_Day("YYYY-MM-DD", Day), help="dataset.date; default: today (UTC).")
@click.option("--batch-size", type=Checked("N", BatchSize), default=8, help="Lines of an optimizer step.")
@click.option("--epochs", type=Checked("N", Epochs), default=1, help="Times through the data.")
@click.option("--lines", type=_COUNT, help="Show the first N usable lines (default 3).")
@click.option("--line", "line", type=_LINE_NUMBER, multiple=True, help="Show line K instead; may be repeated.")
@click.option("--ids", is_flag=True, help="Each token on a line of its own, with its id.")
def data(format_: str, learn: str, day: date | None, **chosen: Any) -> None:
    """Show what a job would make of a data set: its tokens, which of them are learned, what they cost, and each line
    that cannot be used. FILE is a file, a folder, or a pattern in quotes.
    """
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)  # Ctrl-C, and a reader that has seen enough, end it quietly
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding lacks
    sys.exit(preview(Looked(format=DatasetFormat(format_), learn=Learn(learn), date=day, **chosen)))
