"""Exit statuses beside 0 (done), 1 (it could not be done) and 2 (what was typed is wrong)."""

INTERRUPTED = 130
"""After Ctrl-C, as shells have it: 128 and the signal's number."""
