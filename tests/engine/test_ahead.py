"""On a device that computes behind the host an iteration is enqueued before the one before is over. What comes of it is
what an engine that waits says, bit for bit, whatever ends a request in between.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty
from typing import Any

import pytest
import torch
from engine_driver import Driver, depths, late_driver
from stories import SETTINGS, TINY, orders, serve, story

from coserve_engine.host import _serve
from coserve_engine.kernels import bound
from coserve_engine.latency.cost import CostModel
from coserve_engine.latency.work import decode_work
from coserve_engine.memory import iteration_bytes
from coserve_engine.messages import (
    AdapterVersion,
    AddRequest,
    Cancel,
    FinishReason,
    ForwardBackward,
    JobStarted,
    JobStopped,
    LoraSpec,
    Pass,
    PassDone,
    PassMode,
    RequestFailed,
    SamplingParams,
    Shutdown,
    StartJob,
    StepDone,
    StopJob,
    TokenBatch,
    TrainSeq,
)
from coserve_engine.model.transformer import Transformer
from coserve_engine.running import ahead


@pytest.fixture
def behind(plain: str) -> Callable[..., Driver]:
    """A driver of an engine whose device is late by times drawn from a seed."""

    def make(seed: int = 0, slow_s: float = 2e-3, **settings: Any) -> Driver:
        return late_driver(plain, {**SETTINGS, **settings}, seed, slow_s)

    return make


@pytest.mark.parametrize("settings", [{}, TINY], ids=["roomy", "tiny"])
@pytest.mark.parametrize("seed", range(3))
def test_it_says_what_an_engine_that_waits_does(
    behind: Any, driver: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch, seed: int, settings: dict[str, Any]
) -> None:
    asked, unseen = orders(draw_tokens, seed), depths(monkeypatch)
    late = serve(behind(seed, **settings), asked, seed)
    now = serve(driver(**settings), asked, seed)
    assert not now.engine.executor.copies.behind
    assert story(late) == story(now)
    assert set(story(late)) == {one.request_id for one in asked}
    finishes = {token.finish for batch in late.of(TokenBatch) for token in batch.tokens}
    assert finishes == {None, FinishReason.STOP, FinishReason.LENGTH}
    assert set(unseen) == {0, 1}
    device = late.engine.executor.copies
    assert device.waits == 0
    assert late.engine.executor.ledger.held_by("request:") == 0
    assert bool(late.engine.requests.preemptions) is bool(settings)


def test_a_token_that_is_not_taken_on_the_device_breaks_it(
    behind: Any, driver: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: rows whose token the host does not know yet are computed with another."""
    asked = orders(draw_tokens, 0)
    now = serve(driver(), asked, 0)
    monkeypatch.setattr(bound, "_known", lambda tokens, layout, chosen: tokens.clamp(min=0))
    assert story(serve(behind(0), asked, 0)) != story(now)


def test_what_was_launched_before_a_request_was_put_out_is_not_its_own(driver: Any, draw_tokens: Any) -> None:
    d = driver()
    d.submit(AddRequest("r", draw_tokens(1, 30), SamplingParams(60, ignore_eos=True), 0.0))
    d.step()
    table = d.engine.requests
    (request,) = table.running.values()
    computed = table.launched(request, request.done + 1, 0, 0.0)
    assert table.current(computed)
    table.preempt_youngest()
    assert not table.current(computed)
    assert request.tokens == [*draw_tokens(1, 30), *d.tokens()["r"]]
    table.admit(0.0)
    assert request.slot in table.running
    assert not table.current(computed)


@pytest.mark.parametrize("after", range(8))
def test_a_cancelled_request_says_no_more(behind: Any, draw_tokens: Any, after: int) -> None:
    """Whatever of it is under way."""
    d = behind(after)
    params = SamplingParams(60, ignore_eos=True)
    d.submit(AddRequest("a", draw_tokens(1, 30), params, 0.0), AddRequest("b", draw_tokens(2, 30), params, 0.0))
    for _ in range(after):
        d.step()
    d.submit(Cancel("a"))
    before = len(d.tokens().get("a", ()))
    d.submit(AddRequest("a", draw_tokens(3, 5), SamplingParams(4, ignore_eos=True), 0.0))
    d.run()
    assert len(d.tokens()["a"]) == before + 4
    assert len(d.tokens()["b"]) == 60
    assert d.engine.executor.ledger.held_by("request:") == 0


def test_a_job_learns_the_same_beside_requests(
    behind: Any, driver: Any, draw_tokens: Any, training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, unseen = orders(draw_tokens, 5), depths(monkeypatch)
    commands = (StartJob("job", LoraSpec(4, 8.0, ("q_proj", "down_proj"), 0.1), 1), *training(steps=3))
    late, now = serve(behind(5), asked, 5, *commands), serve(driver(jitter_s=1e-5), asked, 5, *commands)
    for kind in (PassDone, StepDone):
        assert late.of(kind) == now.of(kind)
        assert late.of(kind)
    assert torch.equal(late.parameters(), now.parameters())
    assert story(late) == story(now)
    assert late.engine.executor.copies.waits == 0
    assert set(unseen) == {0, 1}


def test_the_device_rarely_waits_for_the_host(behind: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode of a few requests: but for the first plans there is always something enqueued. The control is an engine
    that plans when nothing is unseen.
    """

    def idle() -> int:
        d = behind(3, slow_s=4e-3)
        params = SamplingParams(80, ignore_eos=True)
        d.submit(*(AddRequest(f"r{n}", draw_tokens(n, 20), params, 0.0) for n in range(3)))
        d.run()
        found: int = d.engine.executor.copies.idle
        return found

    running_ahead = idle()
    monkeypatch.setattr("coserve_engine.scheduler.timeline.MOST_UNSEEN", 0)
    waiting = idle()
    assert running_ahead < waiting / 4


def test_its_process_sleeps_only_when_nothing_is_under_way(behind: Any, draw_tokens: Any) -> None:
    """What the device is through with is seen at once, though nothing can be planned: the last token of an answer."""
    d = behind(1, slow_s=4e-3)
    slept: list[bool] = []

    class Commands:
        """A queue: one request, then the end."""

        def __init__(self) -> None:
            self.left = [AddRequest("r", draw_tokens(1, 20), SamplingParams(5, ignore_eos=True), 0.0)]

        def get(self, timeout: float) -> Any:
            slept.append(d.engine._runner.busy)
            return self.get_nowait() if self.left or not d.engine.idle else Shutdown()

        def get_nowait(self) -> Any:
            if not self.left:
                raise Empty
            return self.left.pop()

        def empty(self) -> bool:
            return True

    class Events:
        def send(self, batch: list[Any]) -> None:
            d.events.extend(batch)

    _serve(d.engine, Commands(), Events())  # type: ignore[arg-type]
    assert len(d.tokens()["r"]) == 5
    assert slept
    assert not any(slept)


def test_a_start_measures_the_device_and_not_the_host(behind: Any) -> None:
    """A forward is what lies between two marks, each up to 50 ms late; the host's clock stands still meanwhile. What an
    iteration takes of memory is asked for before.
    """
    d = behind(6, slow_s=0.05)
    d.engine.ready()
    assert d.engine.cost.forward_s(decode_work([48] * 8, 64)) > 5e-3
    e = d.engine.executor
    assert e.copies.reserved == iteration_bytes(e.model, e.config)


def test_a_request_that_diverges_ends_alone(behind: Any, driver: Any, draw_tokens: Any) -> None:
    """Its row is enqueued once more before the host sees that its logits are not finite."""
    d = behind(2)
    params = SamplingParams(30, ignore_eos=True)
    d.submit(AddRequest("good", draw_tokens(1, 30), params, 0.0), AddRequest("bad", draw_tokens(2, 30), params, 0.0))
    while "bad" not in d.tokens():
        d.step()
    bad = next(r for r in d.engine.requests.running.values() if r.command.request_id == "bad")
    cache, page = d.engine.executor.cache, d.engine.executor.numerics.page
    cache.v[:, :, bad.pages[0] * page : bad.pages[0] * page + 8] = float("nan")
    d.run()
    alone = driver()
    alone.submit(AddRequest("good", draw_tokens(1, 30), params, 0.0))
    assert d.tokens()["good"] == alone.run().tokens()["good"]
    assert [e.request_id for e in d.of(RequestFailed)] == ["bad"]


def test_a_job_that_is_to_stop_waits_for_its_step(behind: Any, training: Any) -> None:
    """And the host does not; what comes for the job meanwhile is obeyed after it."""
    d = behind(9)
    start = StartJob("job", LoraSpec(4, 8.0, ("q_proj",)), 1)
    d.submit(start, *training(steps=1))
    while not (d.engine.jobs and d.engine.jobs["job"]._stepped):
        d.step()
    d.submit(StopJob("job"), start)
    assert d.of(JobStopped) == []
    d.run()
    assert [type(event) for event in d.events if isinstance(event, StepDone | JobStopped | JobStarted)] == [
        JobStarted,
        StepDone,
        JobStopped,
        JobStarted,
    ]
    assert d.engine.executor.copies.waits == 0


def launch_slowly(d: Driver, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """From now on a layer takes 3 ms to enqueue, in which the device is through with the forward before. The list is
    not empty while the host looks in between.
    """
    launching: list[bool] = []
    real = Transformer.forward

    def forward(self: Transformer, batch: Any, cache: Any, goes_on: Callable[[int], bool]) -> torch.Tensor | None:
        def slowly(layer: int) -> bool:
            d.clock.now += 3e-3
            launching.append(True)
            on = goes_on(layer)
            launching.pop()
            return on

        return real(self, batch, cache, slowly)

    monkeypatch.setattr(Transformer, "forward", forward)
    return launching


def test_tokens_do_not_wait_for_the_launch_of_the_next_forward(
    behind: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = behind(7)
    launching = launch_slowly(d, monkeypatch)
    params = SamplingParams(30, ignore_eos=True)
    d.submit(*(AddRequest(f"r{n}", draw_tokens(n, 20), params, 0.0) for n in range(3)))
    meanwhile = 0

    def emit(events: list[Any]) -> None:
        nonlocal meanwhile
        meanwhile += bool(launching) and any(isinstance(event, TokenBatch) for event in events)

    while not d.engine.idle:
        d.engine.step(emit=emit)
    assert meanwhile > 20


def test_what_ends_while_the_next_forward_is_enqueued_leaves_clean_pages(
    behind: Any, driver: Any, random_adapter: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request whose adapter overflows is written to by layers that are enqueued after its end was seen."""
    d = behind(8)
    launching, ledger = launch_slowly(d, monkeypatch), d.engine.executor.ledger
    freed: list[bool] = []
    real = ledger.free

    def free(owner: str, *, forget: bool = False) -> None:
        freed.append(bool(launching))
        real(owner, forget=forget)

    monkeypatch.setattr(ledger, "free", free)
    adapter = random_adapter(d.engine.executor)
    adapter.flat.mul_(1e25)
    version = AdapterVersion("poison", 1)
    d.engine._adapters[version] = adapter.weights
    params = SamplingParams(8, ignore_eos=True)
    d.submit(AddRequest("poisoned", draw_tokens(2, 40), params, 0.0, version))
    d.run()
    assert freed == [True]
    assert not d.engine.executor.cache.v.isfinite().all()
    d.submit(AddRequest("after", draw_tokens(4, 20), params, d.clock.now))
    alone = driver()
    alone.submit(AddRequest("after", draw_tokens(4, 20), params, 0.0))
    assert d.run().tokens() == alone.run().tokens()


def test_a_request_that_comes_stops_a_forward_that_serves_nobody(
    behind: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of it is enqueued than a lead, and the windows are computed again."""
    monkeypatch.setattr(ahead, "gives_way", lambda plan, view, cost, done: not view.sequences)
    d = behind(4, slow_s=1e-3)
    seq = TrainSeq(0, draw_tokens(1, 200), (1.0,) * 200)
    d.submit(StartJob("job", LoraSpec(4, 8.0, ("q_proj",)), 1))
    d.step()
    d.submit(ForwardBackward("job", 1, Pass(1, "job", 0, 0, (seq,), PassMode.TRAIN)))
    for _ in range(3):
        d.step(lambda: True)
    (state,) = d.engine.executor.passes.values()
    assert state.fwd_tile == 0
    d.run()
    assert len(d.of(PassDone)) == 1


def test_a_forward_that_serves_nobody_keeps_the_pace_of_the_device(
    behind: Any, draw_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that of its prediction, which would come true where it is too long."""
    monkeypatch.setattr(CostModel, "forward_s", lambda self, work: 10.0)
    d = behind(5, slow_s=1e-3)
    seq = TrainSeq(0, draw_tokens(1, 200), (1.0,) * 200)
    d.submit(StartJob("job", LoraSpec(4, 8.0, ("q_proj",)), 1))
    d.step()
    d.submit(ForwardBackward("job", 1, Pass(1, "job", 0, 0, (seq,), PassMode.EVAL)))
    began_s = d.clock.now
    d.run()
    assert len(d.of(PassDone)) == 1
    assert d.clock.now - began_s < 1.0
