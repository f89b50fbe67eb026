"""Requests that wait for their grammars: they take no place meanwhile, and others go before them."""

from __future__ import annotations

from dataclasses import dataclass

from coserve_engine.errors import RequestError
from coserve_engine.grammar.compiler import Compilation, Compiler
from coserve_engine.grammar.matching import Matching
from coserve_engine.messages import AddRequest, Grammar
from coserve_engine.tensors.lora import LoraWeights


@dataclass(frozen=True, slots=True)
class Compiling:
    """A request, with the weights that it had when it came."""

    command: AddRequest
    weights: LoraWeights | None
    finetune_s: float
    compilation: Compilation

    def matching(self, compiler: Compiler) -> Matching:
        """Its own place in the grammar, once that is compiled.

        Raises:
            RequestError: it cannot be.
        """
        made = self.compilation.made
        assert made is not None  # or it waits
        if isinstance(made, RequestError):
            raise made
        ends = {*self.command.params.stop_token_ids, *compiler.end_tokens}
        return Matching(made.deep_copy(), compiler.end_tokens[0], ends)


class CompilingRequests:
    """Of one engine: `waiting` by their ids, in the order in which they came."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.waiting: dict[str, Compiling] = {}

    def add(self, command: AddRequest, weights: LoraWeights | None, finetune_s: float, grammar: Grammar) -> None:
        """Have its grammar compiled.

        Raises:
            RequestError: too many are.
        """
        asked = self.compiler.ask(grammar)
        self.waiting[command.request_id] = Compiling(command, weights, finetune_s, asked)

    def cancel(self, request_id: str) -> None:
        """Forget one, if it is here."""
        request = self.waiting.pop(request_id, None)
        if request is not None:
            self.compiler.withdraw(request.compilation)

    def collect(self) -> list[Compiling]:
        """Those that need wait no longer."""
        self.compiler.collect()
        done = [request for request in self.waiting.values() if request.compilation.made is not None]
        for request in done:
            self.cancel(request.command.request_id)
        return done
