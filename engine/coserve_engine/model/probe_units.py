"""Do gradients keep their bits however windows and units cut a pass, by the kernels and at the widths of this model?
Asked at start-up, word by word: a pass tile by tile, and in larger units, against all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from coserve_engine.layout.passes import pages_of_pass
from coserve_engine.messages import Pass, TrainSeq
from coserve_engine.model.passes import PassState
from coserve_engine.model.probe_words import GROUPS, Asked, linears
from coserve_engine.model.sequences import SequenceRows
from coserve_engine.scheduler.pages import NULL_PAGE
from coserve_engine.scheduler.plan import Kind, Segment

OWNER, PASS_ID = "probe", -1
Word = Callable[[Any], Sequence[torch.Tensor]]
"""Of a bound unit of R rows: what a word gives, [R, ...] each."""


def ask_units(asked: Asked) -> None:
    """Of the words that windows and units are computed by."""
    e = asked.executor
    adapter, lora = asked.trained()
    length = asked.positions(e.ledger.free_pages)
    seq = TrainSeq(0, (1,) * length, (1.0,) * length)
    pages = e.ledger.reserve(f"pass:{PASS_ID}", pages_of_pass((length,), e.numerics))
    state = e.open_pass(Pass(PASS_ID, OWNER, 0, 0, (seq,)), adapter, lora, pages)
    e.forward((state.shape.window(0, len(state.spans)),), {})
    _ask_windows(asked, state)
    _ask_head(asked, state)
    sums = state.grads, state.dkv
    for name, word in _words(asked, state):
        for total in sums:
            total.zero_()
        whole, totals = word(_unit(asked, state, 0, len(state.spans))), [total.clone() for total in sums]
        for cuts in _cuts(len(state.spans)):
            for total in sums:
                total.zero_()
            parts = [word(_unit(asked, state, first, end)) for first, end in cuts]
            asked.same(name, (torch.cat(some) for some in zip(*reversed(parts), strict=True)), whole)
            asked.same(f"{name}: gradients", sums, totals)
    e.close_pass(PASS_ID)


def _cuts(tiles: int) -> Iterator[list[tuple[int, int]]]:
    """Tiles [first, end) of units, last first: one by one, and the first alone."""
    yield [(n, n + 1) for n in reversed(range(tiles))]
    if tiles > 2:
        yield [(1, tiles), (0, 1)]


def _unit(asked: Asked, state: PassState, first: int, end: int) -> Any:
    return asked.executor.kernels.bind_unit(state, 0, first, end)


def _words(asked: Asked, state: PassState) -> Iterator[tuple[str, Word]]:
    e, rows = asked.executor, state.layout.rows
    kernels, model, w = e.kernels, e.model, e.transformer.weights.layers[0]
    for group in GROUPS:
        outs, into = [model.linear_shape(name)[0] for name in group], model.linear_shape(group[0])[1]
        x, dys = asked.draw(rows, into), [asked.draw(rows, out) for out in outs]

        def again(u: Any, group: tuple[str, ...] = group, x: torch.Tensor = x) -> Sequence[torch.Tensor]:
            return kernels.linear_again(w, group, x[u.rows], u)

        def back(
            u: Any, group: tuple[str, ...] = group, x: torch.Tensor = x, dys: Sequence[torch.Tensor] = dys
        ) -> Sequence[torch.Tensor]:
            return (_there(kernels.linear_backward(w, group, tuple(dy[u.rows] for dy in dys), x[u.rows], u)),)

        yield f"{', '.join(group)} again", again
        yield f"{', '.join(group)} backward", back
    q, do = (asked.draw(rows, model.heads, model.head_size) for _ in range(2))
    k = asked.draw(rows, model.kv_heads, model.head_size) if model.qk_norm else None
    yield "encode again", lambda u: (kernels.encode_again(w, q[u.rows], u),)
    yield "attention backward", lambda u: (kernels.attend_backward(q[u.rows], do[u.rows], u, e.cache),)
    yield (
        "encode backward",
        lambda u: kernels.encode_backward(w, do[u.rows], q[u.rows], None if k is None else k[u.rows], u),
    )
    gate, up, dh = (asked.draw(rows, model.intermediate) for _ in range(3))

    def gates(u: Any) -> Sequence[torch.Tensor]:
        h, saved = kernels.gate_again(gate[u.rows], up[u.rows])
        return h, *kernels.gate_backward(dh[u.rows], gate[u.rows], up[u.rows], saved.clone())

    yield "gate backward", gates
    x, dy, residual = (asked.draw(rows, model.hidden) for _ in range(3))

    def norms(u: Any) -> Sequence[torch.Tensor]:
        total, _, rstd = kernels.norm(x[u.rows].clone(), w.input_norm)
        return (kernels.norm_backward(dy[u.rows], total, rstd, w.input_norm, residual[u.rows]),)

    yield "norm backward", norms


def _there(dx: torch.Tensor | None) -> torch.Tensor:
    assert dx is not None  # it was asked for
    return dx


def _ask_windows(asked: Asked, state: PassState) -> None:
    """Linears of windows, whose inputs are dropped: beside decode rows with an adapter, which are not to notice, cut in
    two, and computed again by a unit, each by itself too.
    """
    e, tiles = asked.executor, len(state.spans)
    w, kernels = e.transformer.weights.layers[0], e.kernels
    weights = asked.served()
    decode = {n: SequenceRows((1,), (NULL_PAGE,), weights) for n in range(4)}
    segments = tuple(Segment(Kind.DECODE, n, 0, 1) for n in decode)
    window, rows = state.shape.window(0, tiles), state.layout.rows
    count = len(segments)
    _, both = e.bind((*segments, window), decode)
    _, alone = e.bind(segments, decode)
    cut = [(span.start, e.bind((state.shape.window(n, n + 1),), {})[1]) for n, span in enumerate(state.spans)]
    everything, unit = torch.arange(count + rows, device=e.device), _unit(asked, state, 0, tiles)
    for group, (name, word) in zip(GROUPS, linears(asked, " with an adapter").items(), strict=True):
        expected = word(both, everything)
        asked.same(name, word(alone, everything[:count]), (one[:count] for one in expected))
        windows = [one[count:] for one in expected]
        for start, batch in cut:
            stop = start + len(batch.layout.tokens)
            found = word(batch, everything[count + start : count + stop])
            asked.same(f"{name} of windows", found, (one[start:stop] for one in windows))
        x = asked.draw(rows, e.model.linear_shape(group[0])[1])
        _, batch = e.bind((window,), {})
        forward = kernels.linear(w, 0, group, x, batch)
        asked.same(f"{', '.join(group)} again", kernels.linear_again(w, group, x, unit), forward)
        singly = [kernels.linear_again(w, (one,), x, unit)[0] for one in group]
        asked.same(f"{', '.join(group)} again", singly, forward)


def _ask_head(asked: Asked, state: PassState) -> None:
    """Loss and its derivative, of a tile's rows and of some of them."""
    e = asked.executor
    kernels, head = e.kernels, e.transformer.weights.head
    x = asked.draw(min(e.numerics.tile, state.layout.rows), e.model.hidden)
    targets = torch.arange(x.shape[0], device=e.device) % e.model.vocab_size
    slope = asked.draw(x.shape[0]).to(e.dtypes.accumulate)

    def of(some: slice) -> Sequence[torch.Tensor]:
        logp, kept = kernels.score(kernels.logits(x[some], head), targets[some])
        return logp, kernels.logits_backward(kernels.score_backward(kept, targets[some], slope[some]), head)

    whole = of(slice(None))
    for count in (e.numerics.row_multiple, 5 * e.numerics.row_multiple):
        asked.same("head backward", of(slice(-count, None)), (one[-count:] for one in whole))
