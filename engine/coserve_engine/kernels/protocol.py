"""The seam between a model and how it is computed: a table of kernels, in words that name no device and no layout of
weights. What depends on the batch alone is bound once for all layers, what depends on a unit once for its words.

Shapes: T rows of a batch, R of a unit; H hidden, D of a head. A word may use its first argument up where it says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from coserve_engine.device.protocol import Device
from coserve_engine.layout.batch import BatchLayout
from coserve_engine.tensors.adam import AdamState, AdamW
from coserve_engine.tensors.counts import TokenCounts
from coserve_engine.tensors.kv_cache import KVCache
from coserve_engine.tensors.lora import LoraWeights
from coserve_engine.tensors.passes import PassTensors, UnitRows
from coserve_engine.tensors.weights import FrozenLinear, LayerWeights

B = TypeVar("B")
"""A batch as a table has bound it."""
U = TypeVar("U", bound=UnitRows)
"""A unit as a table has bound it."""
QKV, OUTPUT, GATE_UP, DOWN = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
"""The linears of a layer by what they read: each group is one word."""


class Adapted(Protocol):
    """What binding must know of a running request."""

    @property
    def weights(self) -> LoraWeights | None:
        """Of its adapter."""


class Fixed(NamedTuple):
    """What a captured forward has room for: so many rows, each of a sequence of at most so many pages, of at most so
    many adapters of at most such a rank. `others`: of the rows, those that no decode row can have, 0 where decode is
    all; `block`: the most rows that those of one adapter are taken by.
    """

    rows: int
    pages: int
    adapters: int
    rank: int
    others: int = 0
    block: int = 0


class Graphs(Protocol[B]):
    """Batches of decode rows whose tensors stay where they are."""

    def adapters(self, rows: int) -> tuple[int, ...]:
        """For how many adapters at most a forward of so many rows is to be captured each, ascending from 0."""

    def takes(self, layout: BatchLayout) -> bool:
        """Whether a batch so laid out can be put into one of as many rows."""

    def fixed(self, size: Fixed, device: Device) -> B:
        """A batch of that size; its rows are nobody's."""

    def fill(self, into: B, b: B) -> None:
        """Put a batch, bound, into a fixed one of as many rows, which has room for it."""


class Mixed(Protocol[B]):
    """Batches of decode rows beside prompts and windows whose tensors stay where they are."""

    def forms(self, size: Fixed) -> tuple[Fixed, ...]:
        """That size, for each way to compute its adapters' rows."""

    def fixed(self, size: Fixed, device: Device) -> B:
        """A batch of that size; its rows are nobody's."""

    def holds(self, into: B, b: B) -> bool:
        """Whether a fixed batch has room for one, bound, of as many rows."""

    def fill(self, into: B, b: B) -> None:
        """Put it there."""


class Kernels(Protocol[B, U]):
    """How a model is computed on one device in one choice of dtypes."""

    @property
    def exact(self) -> bool:
        """Whether a row's bits are to depend on its sequence alone: worth probing."""

    @property
    def turned(self) -> bool:
        """Whether products read copies of an adapter's factors that lie turned (`tensors.lora`)."""

    @property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """Groups of linears whose weights are to be one."""

    @property
    def graphs(self) -> Graphs[B] | None:
        """How a forward of decode rows is captured, where it can be."""

    @property
    def mixed(self) -> Mixed[B] | None:
        """The same of one with others."""

    def notes(self) -> Iterator[str]:
        """Lines for the log: what was chosen and why."""

    def frozen(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> FrozenLinear:
        """The linear of weight [out, in] and bias [out], laid out for this table."""

    # ---- forward ----

    def bind(
        self,
        layout: BatchLayout,
        sequences: Mapping[int, Adapted],
        passes: Mapping[int, PassTensors],
        device: Device,
        chosen: torch.Tensor,
    ) -> B:
        """All that the layout says goes to the device in one copy.

        Args:
            sequences, passes: those that the layout names.
            chosen: [N] int64, what the last forward's rows chose; a negative token of the layout counts from there.
        """

    def embed(self, table: torch.Tensor, b: B) -> torch.Tensor:
        """Rows of table [vocab, H] -> [T, H]."""

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """RMSNorm of x + residual [N, H]: the sum (which takes x's place), the normalised rows, and 1 / rms [N, 1]."""

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x + residual, in x's place."""

    def linear(
        self, w: LayerWeights, layer: int, group: tuple[str, ...], x: torch.Tensor, b: B
    ) -> tuple[torch.Tensor, ...]:
        """x [T, in] -> [T, out] of each linear of the group, adapters of the batch included."""

    def encode(
        self, w: LayerWeights, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: B, cache: KVCache
    ) -> torch.Tensor:
        """Queries [T, heads, D] as attention takes them, normed where the model does and rotated; keys, likewise, and
        values [T, KVH, D] go to their places in the cache.
        """

    def attend(self, layer: int, q: torch.Tensor, b: B, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """o [T, heads, D] of encoded queries, and the log-sum-exp [T, heads] of rows that a pass keeps."""

    def gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, [T, I]."""

    def keep(self, layer: int, b: B, values: Mapping[str, torch.Tensor]) -> None:
        """Copy what passes of this batch keep of `values` [T, ...]."""

    def keep_final(self, b: B, x: torch.Tensor) -> None:
        """Copy the last layer's rows [T, H] of passes."""

    def sampled(self, b: B, x: torch.Tensor) -> torch.Tensor:
        """The rows of x [T, H] to sample from, the last repeated up to the row multiple."""

    def logits(self, x: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        """Normalised rows [N, H] -> [N, vocab], float32 at least."""

    def sample(self, logits: torch.Tensor, b: B, counts: TokenCounts) -> torch.Tensor:
        """Tokens [N], int64, by the batch's choices from logits [N, vocab]; `counts` are of rows with penalties."""

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of logits [N, vocab], in their place, N padded to the row multiple: what is reported, and has a target's bits
        that `score` gives.
        """

    # ---- backward of a unit ----

    def bind_unit(self, state: PassTensors, layer: int, first: int, end: int) -> U:
        """Tiles [first, end) of a pass in one layer."""

    @property
    def head_rows(self) -> int:
        """Rows of a pass that meet the head at once; 0: tile by tile, whose sums are then the same in any unit."""

    def score(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Log-probabilities [N] of targets [N] by logits [N, vocab], and what their backward wants; uses logits up."""

    def score_backward(self, kept: Any, targets: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """d loss / d logits [N, vocab] for slope [N], d loss / d log-probability; uses `kept` up."""

    def logits_backward(self, dlogits: torch.Tensor, head: FrozenLinear) -> torch.Tensor:
        """dx [N, H]; the head is frozen."""

    def norm_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """dx [N, H] of `norm` for the normalised rows' dy, plus residual."""

    def linear_again(
        self, w: LayerWeights, group: tuple[str, ...], x: torch.Tensor, unit: U
    ) -> tuple[torch.Tensor, ...]:
        """`linear` for a unit's rows, of linears of one group, where their results were not kept."""

    def linear_backward(
        self,
        w: LayerWeights,
        group: tuple[str, ...],
        dys: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        unit: U,
        *,
        need_dx: bool = True,
    ) -> torch.Tensor | None:
        """dx [R, in] of a group for its dys [R, out], None where it is not needed; the adapter's gradients are added
        to the pass's.
        """

    def encode_again(self, w: LayerWeights, q: torch.Tensor, unit: U) -> torch.Tensor:
        """Encoded queries of a unit's rows."""

    def attend_backward(self, q: torch.Tensor, do: torch.Tensor, unit: U, cache: KVCache) -> torch.Tensor:
        """dq [R, heads, D] of encoded queries; what encoded keys and values get is added to the pass's dkv."""

    def encode_backward(
        self, w: LayerWeights, dq: torch.Tensor, q: torch.Tensor, k: torch.Tensor | None, unit: U
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of queries, keys and values [R, heads, D] before their norms and rotation; k where keys are normalised."""

    def gate_again(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`gate`, and what its backward wants of it."""

    def gate_backward(
        self, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, saved: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(dgate, dup); uses `saved` up."""

    # ---- optimizer ----

    def optimize(self, param: torch.Tensor, grad: torch.Tensor, state: AdamState, how: AdamW) -> torch.Tensor:
        """One update of `param` [size] in place, unless `grad` [size] is not finite; uses it up.

        Returns [2]: the gradient's norm before clipping, and 1 where there was an update, else 0.
        """
