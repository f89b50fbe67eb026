"""A model on a GPU as a simulated machine. Below some number of rows a forward takes as long as its weights are read,
above it as long as its products take, in steps: a latency model has to find out where.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from coserve_engine.config import LINEARS, ModelConfig, Rope
from coserve_engine.latency.work import ForwardWork, UnitWork
from coserve_engine.simulate.device import BUDGET, H200, Device, Host

FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears that are one product, from the same input."""
GRAPH_ROWS, BUCKET = 256, 8
"""Decode alone, of so many rows at most, is a graph: of 1, 2, 4 or a multiple of BUCKET rows."""
GRAPH_LAUNCHES, DECODE_KERNELS, MIXED_KERNELS, UNIT_KERNELS, HEAD_KERNELS = 4, 10, 18, 34, 8
"""The host's launches of a forward that is graphs; kernels of a layer of decode, of one with adapters, of a unit."""
MIXED_DECODE, MIXED_OTHERS = (64, 128, 256), (64, 128, 256, 512)
"""Rows of graphs of decode rows beside others."""
MOST_ROWS = 8192
"""Of a forward."""
RANK, LORA = 16, 0.057
"""Of the job's adapter, on all linears; share of the peak that its small products reach."""
ATTENTION, ATTENTION_BACKWARD = 0.55, 0.45
"""Share of the peak; forward does two products, backward five."""
HEAD_ROWS, LOGIT_PASSES = 2048, 6
"""Rows of logits that are made at a time; how often their float32 is read or written."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model on a device; `itemsize` bytes a number."""

    device: Device
    model: ModelConfig
    itemsize: int = 2
    host: Host | None = BUDGET
    turnaround_ms: float = 0.0
    mixed: bool = True
    """Whether there are graphs of decode rows with others."""

    @property
    def layers(self) -> int:
        return self.model.layers

    def slower(self, factor: float) -> Roofline:
        """A part of the machine: everything takes `factor` times as long."""
        return replace(self, device=self.device.slower(factor))

    def forward_s(self, work: ForwardWork) -> float:
        """Seconds of a forward on the device: a graph where it is decode alone, else kernels one by one."""
        decode, prefill, finetune, _, kv_rows, pairs = work
        graph = _is_graph(work)
        kernels = self.layers * (DECODE_KERNELS if graph else MIXED_KERNELS)
        rows, sampled = (bucket(decode),) * 2 if graph else (self.mixed_rows(work) or work.rows, decode + (prefill > 0))
        device_s = self.layers * _layer_s(self, rows)
        device_s += self._attention_s(kv_rows, pairs) + self.layers * self._lora_s(finetune)
        return device_s + self._logits_s(sampled) + kernels * self.device.kernel_s

    def unit_s(self, work: UnitWork) -> float:
        """Seconds of a unit: gradients of a layer's inputs and of its adapters, or logits and their gradient."""
        d, m, rows = self.device, self.model, work.rows
        if work.head:
            device_s = d.moved_s(4 * LOGIT_PASSES * rows * m.vocab_size)
            for first in range(0, rows, HEAD_ROWS):
                part = min(HEAD_ROWS, rows - first)
                device_s += d.product_s(part, m.vocab_size, m.hidden, self.itemsize)
                device_s += d.product_s(part, m.hidden, m.vocab_size, self.itemsize)
        else:
            device_s = _layer_back_s(self, rows) + 2 * self._lora_s(rows)
            device_s += work.pairs * 10 * m.heads * m.head_size / (ATTENTION_BACKWARD * d.flops_per_s)
        return device_s + _unit_kernels(work) * d.kernel_s

    def launch_s(self, work: ForwardWork | UnitWork) -> float:
        """Seconds of the host to launch it."""
        if isinstance(work, UnitWork):
            return _unit_kernels(work) * self.device.launch_s
        graph = _is_graph(work) or self.mixed_rows(work) > 0
        return (GRAPH_LAUNCHES if graph else self.layers * MIXED_KERNELS) * self.device.launch_s

    def mixed_rows(self, work: ForwardWork) -> int:
        """Rows of the graph of a forward with others beside decode rows; 0 where there is none: there are such that
        take no longer than the host would to launch their kernels.
        """
        if not self.mixed or work.rows in (0, work.decode):
            return 0
        sizes = [d + o for d in MIXED_DECODE if d >= work.decode for o in MIXED_OTHERS if d + o >= work.rows]
        rows, kernels, device = min(sizes, default=0), self.layers * MIXED_KERNELS, self.device
        graph_s = self.layers * _layer_s(self, rows) + kernels * device.kernel_s
        return rows if graph_s <= kernels * device.launch_s else 0

    @property
    def ridge_rows(self) -> float:
        """Rows with which a weight's operations take as long as its bytes."""
        return self.itemsize * self.device.flops_per_s / (2 * self.device.bytes_per_s)

    @property
    def fixed_s(self) -> float:
        """Of a forward, besides its rows at their best: logits of one row, its kernels, and what the last wave of tiles
        leaves idle whatever number of rows there is.
        """
        least_s = min(_layer_s(self, rows) - rows * self._row_s for rows in range(64, MOST_ROWS + 1, 64))
        return self._logits_s(1) + self.layers * (least_s + MIXED_KERNELS * self.device.kernel_s)

    def rows_s(self, work: ForwardWork) -> float:
        """Seconds that these rows take at least in a forward that fills the device."""
        logits_s = 2 * work.decode * self.model.vocab_size * self.model.hidden / self.device.best_flops_per_s
        return work.rows * self.layers * self._row_s + logits_s + self._attention_s(work.kv_rows, work.pairs)

    @property
    def _row_s(self) -> float:
        """Of a row in one layer, where whole waves are full."""
        weights = sum(out * into for out, into in _products(self.model))
        return 2 * weights / self.device.best_flops_per_s + self._moved_s(1)

    def _attention_s(self, kv_rows: float, pairs: float) -> float:
        """Keys are read once a call, and most calls are decode rows, whose pairs cost nothing beside."""
        m, d = self.model, self.device
        read_s = d.moved_s(2 * self.itemsize * m.kv_heads * m.head_size)
        pair_s = 4 * m.heads * m.head_size / (ATTENTION * d.flops_per_s)
        return m.layers * (kv_rows * read_s + max(0.0, pairs - 4 * kv_rows) * max(0.0, pair_s - read_s / 64))

    def _lora_s(self, rows: int) -> float:
        """Of one layer, in forward."""
        both = sum(out + into for out, into in map(self.model.linear_shape, LINEARS))
        return rows * 2 * RANK * both / (LORA * self.device.flops_per_s)

    def _logits_s(self, rows: int) -> float:
        m = self.model
        return self.device.product_s(rows, m.vocab_size, m.hidden, self.itemsize) if rows else 0.0

    def _moved_s(self, rows: int) -> float:
        """What is no product in a layer's forward: norms, rotation, gate."""
        m = self.model
        heads = (m.heads + 2 * m.kv_heads) * m.head_size
        return self.device.moved_s(self.itemsize * rows * (8 * m.hidden + 2 * heads + 3 * m.intermediate))


def _is_graph(work: ForwardWork) -> bool:
    return work.rows == work.decode <= GRAPH_ROWS


def _unit_kernels(work: UnitWork) -> int:
    return HEAD_KERNELS * -(-work.rows // HEAD_ROWS) if work.head else UNIT_KERNELS


def bucket(rows: int) -> int:
    """Rows of the graph in which `rows` are computed."""
    if rows >= BUCKET:
        return -(-rows // BUCKET) * BUCKET
    return next(size for size in (1, 2, 4, BUCKET) if size >= rows)


def _products(model: ModelConfig) -> list[tuple[int, int]]:
    """(out, in features) of a layer's products."""
    shapes = [[model.linear_shape(name) for name in names] for names in FUSED]
    return [(sum(out for out, _ in group), group[0][1]) for group in shapes]


@lru_cache(maxsize=1 << 16)
def _layer_s(machine: Roofline, rows: int) -> float:
    """A layer's forward but for attention and adapters."""
    products = _products(machine.model)
    return machine._moved_s(rows) + sum(machine.device.product_s(rows, *p, machine.itemsize) for p in products)


@lru_cache(maxsize=1 << 16)
def _layer_back_s(machine: Roofline, rows: int) -> float:
    """A layer's backward but for attention and adapters: its products turned, and twice as much to move."""
    products = [(into, out) for out, into in _products(machine.model)]
    return 2 * machine._moved_s(rows) + sum(machine.device.product_s(rows, *p, machine.itemsize) for p in products)


LLAMA_8B = ModelConfig(
    vocab_size=128_256,
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_size=128,
    intermediate=14_336,
    rms_eps=1e-5,
    rope=Rope(500_000.0),
    max_positions=131_072,
    biased=(),
    qk_norm=False,
    windows=(None,) * 32,
    tied=False,
    eos_token_ids=(128_001,),
)
"""Llama-3.1-8B, as far as times depend on it."""
LLAMA_1B = replace(LLAMA_8B, hidden=2048, layers=16, head_size=64, intermediate=8192, windows=(None,) * 16, tied=True)
"""Llama-3.2-1B, likewise."""
LLAMA_ON_H200, LLAMA_1B_ON_H200 = Roofline(H200, LLAMA_8B), Roofline(H200, LLAMA_1B)
