"""What a FinetuneJob's status says of its data, from what the feeder says."""

from coserve_api.job_status import DatasetStatus, FieldCount, ReasonCount, SkippedLine
from coserve_contract.messages import FeedStatus

_LINES_SHOWN = 3
_FIELDS_SHOWN = 10


def dataset_of(feed: FeedStatus | None, old: DatasetStatus | None) -> DatasetStatus | None:
    """Return what was found in the data; where Redis lost it, what was known."""
    if feed is None or feed.error is not None or feed.total_steps == 0:
        return old
    return DatasetStatus(
        samples=feed.samples,
        eval_samples=feed.eval_samples,
        sequences=feed.sequences,
        tokens=feed.tokens,
        skipped_lines=feed.skipped_lines,
        skipped_turns=feed.skipped_turns,
        skipped_by_reason=tuple(ReasonCount(reason=name[:64], count=count) for name, count in feed.skipped.items()),
        first_skipped=tuple(
            SkippedLine(file=one.file, line=one.line, reason=one.reason, message=one.message) for one in feed.refusals
        ),
        unknown_fields=tuple(FieldCount(name=name[:64], count=count) for name, count in feed.unknown_fields.items()),
    )


def sentence(feed: FeedStatus) -> str:
    """Return what the condition DataReady says of data that can be used."""
    said = [f"{feed.samples} samples to train on, {feed.eval_samples} held out"]
    if feed.tokens:
        said.append(f"{feed.tokens} tokens an epoch")
    if feed.sequences > feed.samples:
        said.append(f"in {feed.sequences} sequences, since one cannot serve all answers of a conversation")
    text = ", ".join(said)
    return "; ".join([text, *feed.notes, *left_out(feed)])


def left_out(feed: FeedStatus) -> list[str]:
    """Return what is not learned of the data, and why; nothing where all of it is."""
    said = []
    if feed.skipped_lines or feed.skipped_turns:
        turns = f" and {feed.skipped_turns} single answers" if feed.skipped_turns else ""
        reasons = ", ".join(f"{name} {count}" for name, count in feed.skipped.items())
        said.append(f"{feed.skipped_lines} invalid lines{turns} skipped" + (f" ({reasons})" if reasons else ""))
        shown = feed.refusals[:_LINES_SHOWN]
        said += [f"{one.file.rpartition('/')[2]} line {one.line}: {one.message}".lstrip() for one in shown]
    if feed.unknown_fields:
        names = list(feed.unknown_fields.items())[:_FIELDS_SHOWN]
        said.append("fields that mean nothing here: " + ", ".join(f"{name} ({count})" for name, count in names))
    return said
