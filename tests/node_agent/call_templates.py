"""Chat templates that write tools and calls: those of TRL's wheel in the forms that are read, and Mistral's two, as its
models behave. Beside them what their models are sent and say.
"""

from __future__ import annotations

import re
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from chat_templates import trl_templates, write_folder

from coserve_agent.chat.template import Given
from coserve_agent.chat.tokenizer import Tokenizer
from coserve_agent.chat.turns import answer

# The system message and tools stand before the last user message; an answer ends with </s>.
_MISTRAL = (
    "{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- if tools is not none and tools -%}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}"
    "{%- endif -%}{{- '[INST]' + m.content + '[/INST]' -}}"
    "{%- elif m.role == 'assistant' and m.tool_calls is defined and m.tool_calls -%}"
    "%s{{- eos_token -}}"
    "{%- elif m.role == 'assistant' -%}{{- m.content + eos_token -}}"
    "{%- elif m.role == 'tool' -%}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' -}}"
    "{%- else -%}{{- raise_exception('no ' + m.role) -}}{%- endif -%}{%- endfor -%}"
)
_CHECKED = (
    "{%- if c.id is not defined or c.id | length != 9 -%}{{- raise_exception('ids have nine letters') -}}{%- endif -%}"
)
ARRAY = _MISTRAL.replace(
    "%s",
    "{{- '[TOOL_CALLS] [' -}}{%- for c in m.tool_calls -%}" + _CHECKED + '{{- \'{"name": "\' + c.function.name '
    '+ \'", "arguments": \' + c.function.arguments | tojson + \', "id": "\' + c.id + \'"}\' -}}'
    "{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}{%- endfor -%}{{- ']' -}}",
)
NAMED = _MISTRAL.replace(
    "%s",
    "{{- m.content -}}{%- for c in m.tool_calls -%}" + _CHECKED + "{{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' "
    "+ c.function.arguments | tojson -}}{%- endfor -%}",
)
MISTRAL = {"mistral_array": ARRAY, "mistral_named": NAMED}
FORMATS = {
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"), "hermes"),
    **dict.fromkeys(("llama3_1", "llama3_2"), "llama3_json"),
    **dict.fromkeys(MISTRAL, "mistral"),
}
"""The form that each template writes."""
USER = {"role": "user", "content": "hi"}


@cache
def templates() -> dict[str, str]:
    return trl_templates() | MISTRAL


@cache
def tokenizer(name: str, kind: str = "bytes") -> Tokenizer:
    folder = Path(mkdtemp()) / name
    write_folder(folder, templates()[name], kind)
    return Tokenizer(folder)


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    given = {"type": "object", "properties": {}} if parameters is None else parameters
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": given}}


def written(name: str, *calls: tuple[str, dict[str, Any]], content: str = "") -> str:
    """What the model of template `name` says to call these functions."""
    of = tokenizer(name)
    tools = [tool(called) for called in dict.fromkeys(called for called, _ in calls)]
    made = [
        {"type": "function", "id": f"abcdefgh{n}", "function": {"name": called, "arguments": arguments}}
        for n, (called, arguments) in enumerate(calls)
    ]
    render = partial(of.render, given=Given(tools=tools))
    message = {"role": "assistant", "content": content, "tool_calls": made}
    return answer(render, [USER], message, render([USER], add_generation_prompt=True), "")


def ids(name: str, text: str, kind: str = "bytes", spelt: str = "") -> list[int]:
    """The tokens of `text`; special tokens in its part `spelt` are spelt in letters there, as models do it."""
    encode = partial(tokenizer(name, kind).encode, add_special_tokens=False)
    before, _, behind = text.partition(spelt) if spelt else (text, "", "")
    special = "|".join(map(re.escape, tokenizer(name, kind).pieces.special.values()))
    inside = [
        encode(one)
        for part in re.split(f"({special})", spelt)
        for one in (part if re.fullmatch(special, part) else [part])
    ]
    return [*encode(before), *(token for tokens in inside for token in tokens), *encode(behind)]
