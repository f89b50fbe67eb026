"""`python -m coserve_agent.data FILE --model FOLDER`: what a job would make of a data set, before it runs.

It is the feeder's own reading. Exit status: 0 the data set is fit, 1 it is not (a job whose onInvalid is Fail would be
refused), 2 an argument, the file's name or the model's folder is wrong.
"""

from __future__ import annotations

import io
import signal
import sys


def main() -> int:
    """Show it. Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)  # Ctrl-C, and a reader that has seen enough, end it quietly
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding lacks
    # Each takes some time, before which its answer is not needed.
    from coserve_agent.data.arguments import parser  # noqa: PLC0415

    options = parser().parse_args()
    from coserve_agent.data.preview import preview  # noqa: PLC0415

    return preview(options)


if __name__ == "__main__":
    sys.exit(main())
