"""Chat templates as models have them, those of TRL's wheel and a few more, with tokenizers that make them hard: pieces
that join the end of a prompt with the beginning of an answer.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

from pypi_wheel import Wheel
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TRL = Wheel(
    "trl==1.16.0",
    "trl-1.16.0-py3-none-any.whl",
    "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
    "1 MB",
)

BEGIN, END, UNKNOWN = "<begin>", "<eos>", "<unk>"
_MARKER = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>|</?s>|<(?:start|end)_of_\w+>|<turn\||<\|turn>|\[/?[A-Z_]{3,}\]")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?<>/|[]{}()'\"_-+*=#@&%\\$^~`\n"

# Mistral's, as its models behave: the system message stands in the last user message, an answer behind a space.
MISTRAL = (
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set rest = messages -%}{%- endif -%}{{- bos_token -}}{%- for m in rest -%}"
    "{%- if m.role == 'user' -%}"
    "{%- if loop.last and system is defined -%}{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' -}}"
    "{%- else -%}{{- '[INST] ' + m.content + '[/INST]' -}}{%- endif -%}"
    "{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + eos_token -}}"
    "{%- else -%}{{- raise_exception('no ' + m.role) -}}{%- endif -%}{%- endfor -%}"
)
ENDLESS = (
    "{% for m in messages %}{{ '### ' + m.role + ':\\n' + m.content + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
OWN = {"mistral": MISTRAL, "endless": ENDLESS}


def trl_templates() -> dict[str, str]:
    """The templates of TRL's wheel by name; it is downloaded once."""
    cache = Path(os.environ.get("COSERVE_CACHE", Path.home() / ".cache" / "coserve")) / "tests"
    with zipfile.ZipFile(TRL.download(cache)) as archive:
        found = [name for name in archive.namelist() if re.fullmatch(r"trl/chat_templates/\w+\.jinja", name)]
        return {Path(name).stem: archive.read(name).decode() for name in found}


def all_templates() -> dict[str, str]:
    return trl_templates() | OWN


def _joined(space: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of letters, and of pairs that span what stands at the end of prompts and any first letter."""
    letters = dict.fromkeys([*_LETTERS, space])
    ends = ["\n", "]", ">", ":", space]
    pairs = [(end, letter) for end in ends for letter in [*"abyn", "\n", space]]
    names = [UNKNOWN, BEGIN, END, *letters, *dict.fromkeys(a + b for a, b in pairs)]
    return {name: n for n, name in enumerate(names)}, pairs


def _bytes() -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = ["Ċ", "]", ">", ":", "Ġ"]
    pairs = [(end, letter) for end in ends for letter in [*"abyn", "Ċ", "Ġ"]]
    names = [UNKNOWN, BEGIN, END, *alphabet, *dict.fromkeys(a + b for a, b in pairs)]
    backend = Backend(models.BPE({name: n for n, name in enumerate(names)}, pairs, unk_token=UNKNOWN))
    # No pattern: pieces may reach across words and lines.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _bpe_with_bytes() -> models.BPE:
    vocab, pairs = _joined("▁")
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    return models.BPE(vocab, pairs, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)


def _prepending() -> Backend:
    """As Llama 2's: the normalizer puts a space before every text between special tokens."""
    backend = Backend(_bpe_with_bytes())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _metaspace() -> Backend:
    """As newer conversions: only a text's own beginning gets one."""
    backend = Backend(_bpe_with_bytes())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


KINDS = {"bytes": _bytes, "prepending": _prepending, "metaspace": _metaspace}


def write_folder(folder: Path, template: str, kind: str, vocab_size: int = 4096) -> None:
    """A folder with this template, its markers special tokens of a tokenizer of that kind."""
    markers = sorted(set(_MARKER.findall(template)) - {BEGIN, END})
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN,
        additional_special_tokens=markers, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    loaded.chat_template = template
    folder.mkdir(parents=True, exist_ok=True)
    loaded.save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
