"""What status and events say of a job's data: what is learned, what it costs, and what is left out."""

from __future__ import annotations

import pytest
from job_situation import Situation

from coserve_api.conditions import find_condition
from coserve_api.job import JobStatus
from coserve_contract.messages import FeedRefusal, FeedStatus
from coserve_contract.store import JobRecord
from coserve_operator.decide import job_status

ALL_READ = "80 samples to train on, 4 held out"


def told(it: Situation) -> tuple[JobStatus, list[tuple[str, str, bool]]]:
    """The status after one pass, and its events about the data."""
    before, decision = it.see(), it.judge()
    status = it.write(decision)
    events = job_status.events(before, decision, status)
    return status, [(one.reason, one.message, one.warning) for one in events if one.reason == "DataReady"]


def test_data_that_is_whole_is_ready_once(it: Situation, make) -> None:
    it.record = JobRecord(feed=make.feed())
    status, events = told(it)
    condition = find_condition(status.conditions, "DataReady")
    assert (condition.status, condition.message) == ("True", ALL_READ)
    assert events == [("DataReady", ALL_READ, False)]
    assert told(it)[1] == [], "an event is of a change"


def test_what_is_left_out_is_in_status_condition_and_a_warning(it: Situation, make) -> None:
    refusals = tuple(
        FeedRefusal(file="/data/data/x.jsonl", line=n, reason="NotJson", message=f"is not JSON ({n})")
        for n in range(1, 11)
    )
    it.record = JobRecord(
        feed=make.feed(
            skipped_lines=14, skipped_turns=2, skipped={"NotJson": 13, "TooManyTokens": 3}, refusals=refusals,
            unknown_fields={"source": 80, "id": 3}, tokens=4000, sequences=80, notes=("eos is appended",),
        )
    )  # fmt: skip
    status, events = told(it)
    data = status.dataset
    assert (data.samples, data.eval_samples, data.sequences, data.tokens) == (80, 4, 80, 4000)
    assert (data.skipped_lines, data.skipped_turns) == (14, 2)
    assert [(one.reason, one.count) for one in data.skipped_by_reason] == [("NotJson", 13), ("TooManyTokens", 3)]
    assert [(one.file, one.line) for one in data.first_skipped] == [("/data/data/x.jsonl", n) for n in range(1, 11)]
    assert {one.name: one.count for one in data.unknown_fields} == {"source": 80, "id": 3}
    message = find_condition(status.conditions, "DataReady").message
    assert message == (
        f"{ALL_READ}, 4000 tokens an epoch; eos is appended; "
        "14 invalid lines and 2 single answers skipped (NotJson 13, TooManyTokens 3); "
        "x.jsonl line 1: is not JSON (1); x.jsonl line 2: is not JSON (2); x.jsonl line 3: is not JSON (3); "
        "fields that mean nothing here: source (80), id (3)"
    )
    assert events == [("DataReady", message, True)]
    assert JobStatus.model_validate(status.to_dict()) == status


def test_several_sequences_of_a_line_are_said_with_their_cost(it: Situation, make) -> None:
    it.record = JobRecord(feed=make.feed(tokens=9000, sequences=200))
    status, _ = told(it)
    message = find_condition(status.conditions, "DataReady").message
    assert message.startswith(f"{ALL_READ}, 9000 tokens an epoch, in 200 sequences, since one cannot serve all answers")


def test_what_redis_lost_is_still_known(it: Situation, make) -> None:
    it.record = JobRecord(feed=make.feed(tokens=9000, skipped_lines=3))
    known = told(it)[0].dataset
    assert known is not None
    for feed in (None, FeedStatus()):
        it.record = JobRecord(feed=feed)
        assert told(it)[0].dataset == known


@pytest.mark.parametrize("length", [2048, 100_000])
def test_a_long_message_is_cut(it: Situation, make, length: int) -> None:
    it.record = JobRecord(feed=make.feed(skipped_lines=1, skipped={"x" * 60: length}, notes=("n" * 2048,) * 3))
    status, _ = told(it)
    assert len(find_condition(status.conditions, "DataReady").message) == 2048
