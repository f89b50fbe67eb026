"""JSON that is read while it grows is that which Python reads: the same is taken, and ends where it ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coserve_agent.tools.json_text import MOST_DEPTH, value
from coserve_agent.tools.reader import Malformed, Reader

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


def end(text: str, at_once: int = 1) -> int | None:
    """Where the value at the start of `text` ends, read so many characters at once; None if there is none."""
    reader = Reader("")
    steps = value(reader)
    cuts = [text[at : at + at_once] for at in range(0, len(text), at_once)]
    try:
        for cut in cuts:
            next(steps)
            reader.text += cut
        reader.ended = True
        next(steps)
    except StopIteration:
        return reader.at
    except Malformed:
        return None
    raise AssertionError("it waits for more behind the end")


@given(values, st.booleans(), st.sampled_from([None, 1]), st.integers(1, 9))
def test_a_value_ends_where_it_ends(data: Any, ascii: bool, indent: int | None, at_once: int) -> None:
    text = json.dumps(data, ensure_ascii=ascii, indent=indent)
    assert end(text, at_once) == len(text)
    assert end(text + " }", at_once) == len(text)


@given(values, st.data())
@example({"a": [1]}, None)
def test_what_was_changed_is_taken_where_python_takes_it(data: Any, draw: Any) -> None:
    text = json.dumps(data)
    at = draw.draw(st.integers(0, len(text) - 1)) if draw else 0
    text = text[:at] + (draw.draw(st.sampled_from('{}[]",:\\ue1.-x \n')) if draw else "x") + text[at + 1 :]
    try:
        _, expected = json.JSONDecoder(parse_constant=_refuse).raw_decode(text)
    except ValueError:
        expected = None
    found = end(text)
    # Python reads 1 of 1x, and of 1.x: a number ends where no letter of one follows.
    assert found == expected or (found is None and expected is not None and _goes_on(text, expected))


def _refuse(name: str) -> float:
    raise ValueError(name)


def _goes_on(text: str, at: int) -> bool:
    return text[at : at + 1].isalnum() or text[at : at + 1] in "+-."


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "01", "1.", '"\n"', '"\\x"', '"\\u12g4"', "[1,]", '{"a" 1}', "{1: 2}"]
)
def test_what_is_no_json_is_not_taken(text: str) -> None:
    assert end(text) is None


def test_what_is_too_deep_is_not_taken() -> None:
    assert end("[" * MOST_DEPTH + "]" * MOST_DEPTH) == 2 * MOST_DEPTH
    assert end("[" * 100_000) is None
