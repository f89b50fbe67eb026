"""Models whose templates write more than those of the other tests: tools, calls, reasoning, other roles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coserve_agent.chat.tokenizer import Tokenizer

RICH_TEMPLATE = (
    "{% if tools %}<|user|>[{% for tool in tools %}{{ tool.function.name }} {% endfor %}]<|end|>{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
    "{% elif m.role == 'system' %}<|user|>({{ m.content }})<|end|>"
    "{% elif m.role == 'tool' %}<|user|>={{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}<|assistant|>"
    "{% if m.reasoning_content %}~{{ m.reasoning_content }}~{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}!{{ call.function.name }}{{ call.function.arguments.x }}{% endfor %}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""It skips a role that it does not know, as most do."""


@pytest.fixture
def with_template(tmp_path: Path, model_folder: Path) -> Callable[[str], Tokenizer]:
    def make(template: str) -> Tokenizer:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        config = json.loads((model_folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
        return Tokenizer(folder)

    return make


@pytest.fixture(scope="session")
def rich(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Tokenizer:
    folder = tmp_path_factory.mktemp("rich")
    config = json.loads((model_folder / "tokenizer_config.json").read_text()) | {"chat_template": RICH_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    return Tokenizer(folder)
