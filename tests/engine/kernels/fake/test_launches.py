"""How many launches an iteration asks for: of the words, by the table that computes nothing, and of plain operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tables import use_fake, use_torch
from torch.utils._python_dispatch import TorchDispatchMode

from coserve_engine.messages import AddRequest, Pass, PassDone, SamplingParams, StepDone, TrainSeq
from coserve_engine.scheduler.plan import Kind, Segment

LAYERS = 2
A_LAYER = {"norm": 2, "linear": 4, "encode": 1, "attend": 1, "gate": 1}
ONCE = {"embed": 1, "add": 1, "norm": 1, "sampled": 1, "logits": 1}


def decoded(rig: Any, draw_tokens: Any, adapters: list[Any]) -> Callable[[], object]:
    """A forward in which a sequence decodes for each of `adapters`, at places of their own."""
    slots = [rig.add(draw_tokens(n, 30 + 17 * n), adapter) for n, adapter in enumerate(adapters)]
    segments = [Segment(Kind.DECODE, slot, 29 + 17 * n, 1, sample=True) for n, slot in enumerate(slots)]
    return lambda: rig.forward(*segments)


@pytest.mark.parametrize("requests", (1, 4, 9))
@pytest.mark.parametrize("adapted", (0, 1, 3))
def test_of_a_decode_iteration(
    rig: Any, draw_tokens: Any, random_adapter: Any, monkeypatch: pytest.MonkeyPatch, requests: int, adapted: int
) -> None:
    """9 a layer, 17 with adapters, whatever their number and that of requests."""
    use_fake(monkeypatch)
    r = rig()
    made = [random_adapter(r.executor, rank=4 + n) for n in range(min(adapted, requests))]
    forward = decoded(r, draw_tokens, made + [None] * (requests - len(made)))
    forward()
    expected = Counter({word: LAYERS * count for word, count in A_LAYER.items()}) + Counter(ONCE)
    if adapted:
        expected["adapters"] = 8 * LAYERS
    assert +r.executor.kernels.launches == expected


@pytest.mark.parametrize(("lengths", "tiles"), [((60,), 1), ((64 * 8,), 8), ((100, 30, 70), 5)])
def test_of_a_unit(
    rig: Any,
    draw_tokens: Any,
    random_adapter: Any,
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[int, ...],
    tiles: int,
) -> None:
    """The same for one tile and for eight, of one sequence or of three."""
    use_fake(monkeypatch)
    r = rig(kv_cache_bytes=8 << 20)
    seqs = tuple(TrainSeq(n, draw_tokens(n, length), (0.01,) * length) for n, length in enumerate(lengths))
    state = r.open(Pass(1, "job", 0, 0, seqs), random_adapter(r.executor))
    assert len(state.spans) == tiles
    r.forward(r.window(state, tiles))
    r.executor.backward(r.unit(state, tiles))
    launches = r.executor.kernels.launches
    launches.clear()
    r.executor.backward(r.unit(state, tiles))
    assert +launches == {
        "norm": 2,
        "gate": 1,
        "linear_backward": 4,
        "adapters": 20,
        "gate_backward": 1,
        "norm_backward": 2,
        "encode": 1,
        "attend_backward": 2,
        "encode_backward": 1,
    }


def test_an_engine_runs_on_it(
    driver: Any, training: Any, start_job: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake(monkeypatch)
    d = driver()
    d.submit(start_job(), *training(steps=2))
    d.submit(*(AddRequest(f"r{n}", draw_tokens(n, 90), SamplingParams(20, ignore_eos=True), 0.0) for n in range(3)))
    tokens = d.run().tokens()
    assert {name: len(said) for name, said in tokens.items()} == {"r0": 20, "r1": 20, "r2": 20}
    assert len(d.of(PassDone)) == 4 and len(d.of(StepDone)) == 2
    assert d.failures == []


# ---- plain operators ----


class Operators(TorchDispatchMode):
    """Counts what would be a launch: operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.overloadpacket.__name__ not in ("lift_fresh", "empty", "_unsafe_view")
        return func(*args, **(kwargs or {}))


def operators(forward: Callable[[], object]) -> int:
    with Operators() as seen:
        forward()
    return seen.count


@pytest.mark.parametrize("model", ("plain", "qwen2"))
def test_plain_decode_does_not_grow_with_requests(
    rig: Any, model_path: Any, draw_tokens: Any, random_adapter: Any, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Nor with requests of one adapter; on the CPU's table, which goes row by row, the same count would show it."""
    path = model_path(model)

    def counts(adapter: Any = None) -> set[int]:
        found = set()
        for requests in (4, 8, 12):
            r = rig(path)
            made = None if adapter is None else SimpleNamespace(weights=adapter(r.executor).weights)
            forward = decoded(r, draw_tokens, [made] * requests)
            forward()
            found.add(operators(forward))
        return found

    assert len(counts()) == 3, "the count sees every row"
    use_torch(monkeypatch)
    assert len(counts()) == 1
    assert len(counts(random_adapter)) == 1
