"""The formats of rows, and which fields decide between them.

| format | fields | from |
|---|---|---|
| messages | messages; tools | OpenAI's fine-tuning files, TRL's conversational language modelling |
| sharegpt | conversations (from/value or role/content); system, tools | ShareGPT, as LLaMA-Factory reads it |
| prompt-completion | prompt and completion: two strings, or two lists of messages; tools | TRL, both of its forms |
| alpaca | instruction, input, output; system, history, tools | Stanford Alpaca, as LLaMA-Factory reads it |
| text | text | TRL's language modelling |

`auto` takes the first of these, in this order, that the first usable line fills: so a row of Alpaca that also carries
the text made of it is alpaca, one of UltraChat, which has a prompt beside its messages, is messages, and one with the
columns of several formats is of that which is not empty.
Alpaca's instruction and input become one message, joined by a line end; the answers in its history are learned too,
as in LLaMA-Factory.

A field that is null, or empty, is a field that is not there. Others that are not in the table are counted by name,
and refused where OpenAI or TRL give them a meaning which is missing here: see REFUSED. (TRL: docs/source/
dataset_formats.md, and `input_ids` and the masks, which its SFTTrainer takes instead of rendering; OpenAI:
FineTuneChatRequestInput, and FineTunePreferenceRequestInput.) `parallel_tool_calls` is OpenAI's, too, and says how to
sample, not what to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from coserve_agent import strict_json
from coserve_agent.data.problems import LineError, Reason, is_name
from coserve_agent.data.rows import (
    Completion,
    Fields,
    Row,
    Text,
    conversation,
    kind_of,
    list_field,
    read_messages,
    show,
    text_field,
    wrong,
)
from coserve_api.job import DatasetFormat, Learn

_PREFERENCE = "belongs to a preference row (DPO, KTO), and preferences are not learned here"
_MEDIA = "brings what is no text, and only text is learned here"
_TOKENS = "is of a row that is tokenised already, and rows are tokenised here"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("chosen", "rejected", "preferred_output", "non_preferred_output", "kto_tag"), _PREFERENCE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("input_ids", "completion_mask", "assistant_masks"), _TOKENS),
    **dict.fromkeys(("functions", "function_call"), "is OpenAI's older way to give tools; write tools and tool_calls"),
    "completions": "belongs to TRL's stepwise supervision, which is not learned here",
    "chat_template_kwargs": "would give this row variables of its own; give all rows dataset.templateVariables",
}
_HARMLESS = frozenset(("parallel_tool_calls",))

_MESSAGE_FIELDS = "{role, content} objects"
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}


@dataclass(frozen=True)
class Rules:
    """How rows become conversations: what the model's chat template writes, and which answers are learned."""

    written: Container[str]
    learn: Learn


def detect(row: Fields) -> DatasetFormat:
    """The format of a row: the first whose fields it has, of those that hold something to learn if there are any.

    Raises:
        LineError: it is of none; it names the fields that the row has.
    """
    having = [format for format, (needed, _) in _FORMATS.items() if all(field in row for field in needed)]
    if having:
        return next((format for format in having if _fills(format, row)), having[0])
    _refuse(row, frozenset())
    fields = ", ".join(sorted(row)[:10])[:200] or "no field"
    public = ", ".join([name for name in sorted(row)[:10] if is_name(name)])[:200] or "no such field"
    rest = "it must have messages, conversations, prompt and completion, instruction and output, or text"
    raise LineError(Reason.NO_FORMAT, f"has {fields}; {rest}", f"has {public}; {rest}")


def read(format: DatasetFormat, row: Fields, rules: Rules) -> tuple[Row, tuple[str, ...]]:
    """The row in `format`, and the names of its fields that mean nothing here. Raises LineError."""
    if not _fills(format, row):
        other = next((one for one in _FORMATS if _fills(one, row)), None)
        if other is not None:
            raise LineError(
                Reason.FIELD,
                f"is of format {other}, and this data set is read as {format} (dataset.format, or its first usable "
                "line); all lines must be of one format: set the other one, or leave this line out",
            )
    taken = _Taken(row)
    made = _FORMATS[format][1](taken, rules)
    _refuse(row, taken.names)
    return made, tuple(name for name in row if name not in taken.names | _HARMLESS and not _empty(row[name]))


def _refuse(row: Fields, known: Container[str]) -> None:
    for field, why in REFUSED.items():
        if field not in known and not _empty(row.get(field)):
            raise LineError(Reason.UNSUPPORTED, f"{field} {why}; remove the field")


def _fills(format: DatasetFormat, row: Fields) -> bool:
    """Whether the row has the format's fields, and something to learn in the last of them."""
    needed = _FORMATS[format][0]
    return all(field in row for field in needed) and not _blank(row[needed[-1]])


def _empty(value: object) -> bool:
    return value is None or value in ("", [], {})


def _blank(value: object) -> bool:
    return _empty(value) or (isinstance(value, str) and not value.strip())


class _Taken(dict[str, Any]):
    """A row that notes which of its fields are looked at."""

    def __init__(self, row: Fields) -> None:
        super().__init__(row)
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)


def _messages(row: Fields, rules: Rules) -> Row:
    messages = read_messages(list_field(row, "messages", _MESSAGE_FIELDS), "messages")
    return conversation(messages, field="messages", tools=_tools(row), written=rules.written, learn=rules.learn)


def _prompt_completion(row: Fields, rules: Rules) -> Row:
    if "label" in row and isinstance(row["label"], bool):
        raise LineError(Reason.UNSUPPORTED, f"label {_PREFERENCE}; remove the field, and the rows where it is false")
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        parts = [read_messages(list_field(row, name, _MESSAGE_FIELDS), name) for name in ("prompt", "completion")]
        messages, prompt = [*parts[0], *parts[1]], len(parts[0])
        return conversation(
            messages,
            field="completion",
            tools=_tools(row),
            written=rules.written,
            learn=rules.learn,
            prompt=prompt,
        )
    kinds = [type(row.get(field)) for field in ("prompt", "completion")]
    if list in kinds and str in kinds:
        raise LineError(
            Reason.FIELD, "prompt and completion are a string and a list; both must be strings, or lists of messages"
        )
    prompt_text, answer = text_field(row, "prompt"), text_field(row, "completion")
    if not answer.strip():
        raise LineError(Reason.EMPTY_ANSWER, "completion is empty, so there is nothing to learn; give it text")
    _no_tools(row)
    return Completion(prompt_text, answer)


def _text(row: Fields, rules: Rules) -> Row:
    text = text_field(row, "text")
    if not text.strip():
        raise LineError(Reason.EMPTY_ANSWER, "text is empty; give it content or delete the line")
    _no_tools(row)
    return Text(text)


def _sharegpt(row: Fields, rules: Rules) -> Row:
    turns = list_field(row, "conversations", "{from, value} objects")
    given = [_turn(turn, f"conversations[{n}]") for n, turn in enumerate(turns)]
    system = row.get("system")
    if system:
        if isinstance(given[0], dict) and given[0].get("role") == "system":
            raise LineError(Reason.FIELD, "has a system message in conversations and another in system; keep one")
        given.insert(0, {"role": "system", "content": text_field(row, "system")})
    messages = read_messages(given, "conversations")
    return conversation(messages, field="conversations", tools=_tools(row), written=rules.written, learn=rules.learn)


def _turn(turn: Any, where: str) -> Any:
    """A turn of ShareGPT as a message is written; what is none of both is left for the message's own check."""
    if not isinstance(turn, dict) or not ("from" in turn or "value" in turn):
        return turn
    for ours, theirs in (("role", "from"), ("content", "value")):
        if turn.get(ours) is not None:
            raise LineError(Reason.FIELD, f"{where} has {ours} beside from and value; write {theirs} alone")
    speaker, said = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise wrong(f"{where}.from", speaker, f"it must be one of {', '.join(_SHAREGPT_ROLES)}")
    if not isinstance(said, str):
        raise wrong(f"{where}.value", said, "it must be a string")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value", "role", "content")}
    words = {"tool_calls": _calls(said, where)} if speaker == "function_call" else {"content": said}
    return {**rest, "role": _SHAREGPT_ROLES[speaker], **words}


def _calls(said: str, where: str) -> list[dict[str, Any]]:
    """The calls in the value of a function_call: {name, arguments}, or a list of such, as JSON."""
    try:
        calls = strict_json.loads(said)
    except (ValueError, RecursionError) as error:
        raise LineError(
            Reason.FIELD,
            f"{where}.value is {show(said)}, no JSON ({error}); a function_call is {{name, arguments}}",
            f"{where}.value is no JSON; a function_call is {{name, arguments}}",
        ) from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(one, dict) and one.keys() <= {"name", "arguments"} for one in calls):
        raise wrong(f"{where}.value", said, "a function_call is {name, arguments} as JSON")
    return [{"type": "function", "function": one} for one in calls]


def _alpaca(row: Fields, rules: Rules) -> Row:
    asked = [text_field(row, name) for name in ("instruction", "input") if row.get(name) is not None]
    question = "\n".join(filter(None, asked))
    if not question:
        raise LineError(Reason.FIELD, "instruction is empty, and input too; say what output answers")
    given: list[dict[str, Any]] = []
    if row.get("system"):
        given.append({"role": "system", "content": text_field(row, "system")})
    for pair in list_field(row, "history", "pairs of strings") if row.get("history") else ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            remedy = "it must hold pairs of strings"
            raise LineError(
                Reason.FIELD, f"history has {show(pair)}; {remedy}", f"history has {kind_of(pair)}; {remedy}"
            )
        given += ({"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]})
    given += ({"role": "user", "content": question}, {"role": "assistant", "content": text_field(row, "output")})
    messages = read_messages(given, "messages")
    if not given[-1]["content"].strip():
        raise LineError(Reason.EMPTY_ANSWER, "output is empty, so there is nothing to learn; give it text")
    return conversation(messages, field="history", tools=_tools(row), written=rules.written, learn=rules.learn)


def _tools(row: Fields) -> tuple[dict[str, Any], ...]:
    """OpenAI's list of tools; as JSON text too, which Parquet files need (LLaMA-Factory, TRL)."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = strict_json.loads(tools or "[]")
        except (ValueError, RecursionError) as error:
            public = "tools is a string that is no JSON; write OpenAI's list"
            message = f"tools is {show(tools)}, no JSON ({error}); write OpenAI's list"
            raise LineError(Reason.FIELD, message, public) from None
    if not isinstance(tools, list | None):
        raise wrong("tools", tools, "it must be OpenAI's list of tools")
    for n, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong(f"tools[{n}]", tool, "it must be {type: function, function: {name, ...}}")
    return tuple(tools or ())


def _no_tools(row: Fields) -> None:
    if row.get("tools"):
        raise LineError(Reason.UNSUPPORTED, "tools goes with messages, and this row is text; remove the field")


_FORMATS: Mapping[DatasetFormat, tuple[tuple[str, ...], Callable[[Fields, Rules], Row]]] = {
    DatasetFormat.MESSAGES: (("messages",), _messages),
    DatasetFormat.SHAREGPT: (("conversations",), _sharegpt),
    DatasetFormat.PROMPT_COMPLETION: (("prompt", "completion"), _prompt_completion),
    DatasetFormat.ALPACA: (("instruction", "output"), _alpaca),
    DatasetFormat.TEXT: (("text",), _text),
}
"""The fields that each needs, the last of which holds what is learned, in the order of detection."""
