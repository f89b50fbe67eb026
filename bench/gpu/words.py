"""Seconds of a device by the words of a table of kernels, each apart from those it calls."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

PARTS = {
    "linear": "products",
    "linear_again": "products",
    "linear_backward": "products",
    "logits": "head",
    "logits_backward": "head",
    "attend": "attention",
    "attend_backward": "attention",
    "embed": "element-wise",
    "norm": "element-wise",
    "norm_backward": "element-wise",
    "add": "element-wise",
    "encode": "element-wise",
    "encode_again": "element-wise",
    "encode_backward": "element-wise",
    "gate": "element-wise",
    "gate_again": "element-wise",
    "gate_backward": "element-wise",
    "keep": "keep",
    "keep_final": "keep",
}
ADAPTERS = (
    ("torch.table", "add_adapters"),
    ("torch.table", "adapter_backward"),
    ("triton.lora", "shrink"),
    ("triton.lora", "expand"),
    ("triton.table", "lora_gradient"),
)
"""Functions that tables call inside products, in the modules that are there."""


class Words:
    """Marks on the device's stream before and after each word; what lies between them counts, idle time included, so
    that words whose launches take longer than their work show it.
    """

    def __init__(self, device: torch.device, table: type) -> None:
        self._device, self._table = device, table
        self._marks: list[tuple[str, Any, Any, list[int]]] = []
        self._open: list[list[int]] = []

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            inner: list[int] = []
            self._open.append(inner)
            before = self._mark()
            try:
                return call(*args, **options)
            finally:
                self._open.pop()
                self._marks.append((part, before, self._mark(), inner))
                if self._open:
                    self._open[-1].append(len(self._marks) - 1)

        return run

    @contextmanager
    def watched(self) -> Iterator[None]:
        with ExitStack() as stack:
            for word, part in PARTS.items():
                timed = self._timed(part, getattr(self._table, word))
                stack.enter_context(mock.patch.object(self._table, word, timed))
            for path, name in ADAPTERS:
                module = sys.modules.get(f"coserve_engine.kernels.{path}")
                if module is not None:
                    stack.enter_context(mock.patch.object(module, name, self._timed("LoRA", getattr(module, name))))
            yield

    def seconds(self) -> dict[str, float]:
        """By part; the device's work must be over."""
        spans = [
            after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3
            for _, before, after, _ in self._marks
        ]
        found: dict[str, float] = {}
        for (part, *_, inner), span in zip(self._marks, spans, strict=True):
            found[part] = found.get(part, 0.0) + span - sum(spans[at] for at in inner)
        return found
