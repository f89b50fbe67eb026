"""A model's chat template: a Jinja program from its folder that turns messages into text.

The environment is that of transformers' `apply_chat_template` (sandbox, `{% generation %}`, `tojson`, `strftime_now`,
`raise_exception`), with the date as an argument, so that a text can be made again another day, and with bounds: whoever
made the folder may have made a template that never ends.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from coserve_agent.errors import AgentError

Message = Mapping[str, Any]

MAX_CHARS = 16 << 20
MAX_SECONDS = 10.0
_TICKS = 4096
"""Between two looks at the clock: turns of loops, and calls."""
_MAX_POWER = 1024
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OURS = frozenset(("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", *_SPECIAL))
"""What a template is given anyway. Variables of these names, and of its functions, cannot be set."""
_DATE = "strftime_now"
REASONING_FIELDS = ("reasoning_content", "thinking")
"""What templates call that which an assistant thought; a message has it under both names."""


@dataclass(frozen=True)
class Given:
    """What a template gets beside the messages: OpenAI's tools, variables by name, and the date that `strftime_now`
    tells (default: now, UTC).
    """

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    today: date | None = None


NOTHING = Given()


REFUSED = "the chat template does not accept these messages"


class ChatTemplateError(AgentError):
    """The model's chat template refuses these messages; the message is the template's own."""


class _Endless(BaseException):
    """Leaves a template that takes too long or writes too much, past its own handlers."""


class ChatTemplate:
    """The template `source`, with the tokens that it may name (`bos_token` and others)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._environment = _Environment()

    @cached_property
    def _tree(self) -> nodes.Template:
        try:
            return self._environment.parse(self._source)
        except TemplateError:
            return self._environment.parse("")

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that whoever calls it may set: those that it reads, and does not set itself or only where nobody
        else did.
        """
        read = meta.find_undeclared_variables(self._tree)
        own = _stored(self._tree) - _defaults(self._tree)
        return frozenset(read - own - _OURS - self._special_tokens.keys() - self._environment.globals.keys())

    def reads(self, name: str) -> bool:
        """Whether it reads the variable `name`."""
        return any(node.name == name and node.ctx == "load" for node in self._tree.find_all(nodes.Name))

    def reads_field(self, name: str) -> bool:
        """Whether it reads a field `name` of something, or asks for it."""
        written = any(node.attr == name for node in self._tree.find_all(nodes.Getattr))
        return written or any(node.value == name for node in self._tree.find_all(nodes.Const))

    @property
    def asks_for_the_date(self) -> bool:
        return any(node.name == _DATE for node in self._tree.find_all(nodes.Name))

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return self._environment.from_string(self._source)

    def render(self, messages: Sequence[Message], given: Given = NOTHING, *, add_generation_prompt: bool) -> str:
        """The conversation as text.

        Raises:
            ChatTemplateError: the template refuses the messages, is broken, or does not end.
        """
        named: dict[str, Any] = {**self._special_tokens, **given.variables}
        if given.today is not None:
            named[_DATE] = datetime.combine(given.today, datetime.min.time(), UTC).strftime
        try:
            return self._environment.bounded(
                lambda: self._compiled.generate(
                    messages=[_with_reasoning(message) for message in messages],
                    tools=[dict(tool) for tool in given.tools] or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **named,
                )
            )
        except _Endless as error:
            raise ChatTemplateError(f"the chat template {error}; shorten the messages, or mend the template") from None
        except TemplateError as error:
            raise ChatTemplateError(str(error) or type(error).__name__, REFUSED) from None
        except Exception as error:
            # A template is a program over the client's data: whatever it raises is the data's fault, not the server's.
            raise ChatTemplateError(
                f"the chat template does not accept these messages: {type(error).__name__}: {error}", REFUSED
            ) from None


def _stored(tree: nodes.Node) -> set[str]:
    """The names that are set."""
    return {node.name for node in nodes.Output([tree]).find_all(nodes.Name) if node.ctx == "store"}


def _defaults(tree: nodes.Node) -> set[str]:
    """The names that are set where they are not defined: under a question whether they are, or from themselves."""
    found = set[str]()
    for choice in tree.find_all(nodes.If):
        bodies: list[nodes.Node] = [*choice.body, *choice.else_]
        found |= _asked(choice.test) & set().union(*map(_stored, bodies))
    for assignment in tree.find_all(nodes.Assign):
        found |= _asked(assignment.node) & _stored(assignment.target)
    return found


def _asked(expression: nodes.Node) -> set[str]:
    """The names of which an expression asks whether they are defined, or which it replaces where they are not."""
    asked = nodes.Output([expression]).find_all((nodes.Test, nodes.Filter))
    names = {one.node.name: one.name for one in asked if isinstance(one.node, nodes.Name)}
    return {name for name, how in names.items() if how in ("defined", "undefined", "default", "d")}


def _with_reasoning(message: Message) -> dict[str, Any]:
    """Some templates read what the assistant thought as `thinking`; transformers gives it under both names, too."""
    shown = dict(message)
    if "reasoning_content" in shown:
        shown.setdefault("thinking", shown["reasoning_content"])
    return shown


class _Left(threading.local):
    """How far a thread's rendering is, and when it must have ended (time.monotonic())."""

    ticks = 0
    until_s = float("inf")


class _Environment(ImmutableSandboxedEnvironment):
    """Counts the turns of loops, and calls, to end what goes on for too long."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters[_TICKING] = self._ticking
        self.globals.update(
            raise_exception=_raise_exception, dict=_Dict(), namespace=_Namespace, strftime_now=_strftime_now
        )
        self._left = _Left()

    def bounded(self, generate: Callable[[], Iterable[str]]) -> str:
        """All that `generate` yields. Raises _Endless."""
        pieces, chars = [], 0
        self._left.ticks, self._left.until_s = 0, time.monotonic() + MAX_SECONDS
        for piece in generate():
            chars += len(piece)
            if chars > MAX_CHARS:
                raise _Endless(f"writes more than {MAX_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _TICKING, [], [], None, None, lineno=loop.lineno)
        return template

    def _ticking(self, items: Any) -> Any:
        if isinstance(items, jinja2.Undefined):
            return items
        return _Ticking(self, items) if hasattr(items, "__len__") else self._ticked(items)

    def _ticked(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.tick()
            yield item

    def tick(self) -> None:
        left = self._left
        left.ticks += 1
        if left.ticks % _TICKS == 0 and time.monotonic() > left.until_s:
            raise _Endless(f"takes more than {MAX_SECONDS:g} s")

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(one) for one in (left, right) if hasattr(one, "__len__")]
        if sizes and operator == "*":
            count = next((one for one in (left, right) if isinstance(one, int)), 1)
            if sizes[0] * count > MAX_CHARS:
                raise _Endless(f"writes more than {MAX_CHARS} characters")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and abs(right) > _MAX_POWER:
            raise _Endless("calculates with numbers that are too large")
        return super().call_binop(context, operator, left, right)


_TICKING = "_ticking"


class _Ticking:
    """A list that is looped over, with its length (loop.length, loop.last)."""

    def __init__(self, environment: _Environment, items: Any) -> None:
        self._environment, self._items = environment, items

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._environment.tick()
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote for those who train by the template's own word; here it is no
    more than its content.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the type's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace`, in which no name begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the chat template stores {name!r}; a name must not begin with an underscore")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now(UTC).strftime(format)
