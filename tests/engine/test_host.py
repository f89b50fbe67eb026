"""The engine in its own process: it says when it is ready, serves, finetunes, names what is broken, leaves nothing."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_driver import PATIENCE_S, gather

from coserve_engine.config import DeviceChoice, EngineConfig
from coserve_engine.host import SWITCH_S, YIELDS, EngineHost, settle
from coserve_engine.messages import (
    AddRequest,
    EngineFailed,
    EngineReady,
    Event,
    FinishReason,
    LoadReport,
    RequestFailed,
    SamplingParams,
    StepDone,
    TokenBatch,
)


def any_of(kind: type) -> Callable[[list[Event]], bool]:
    return lambda events: any(isinstance(event, kind) for event in events)


def runs(pid: int) -> bool:
    """Whether there is such a process (one that ended and was not waited for does not count)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int) -> bool:
    end = time.monotonic() + PATIENCE_S
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not runs(pid)


@pytest.fixture(scope="module")
def host(plain: str) -> Iterator[EngineHost]:
    started = EngineHost.start(EngineConfig(plain, max_model_length=256, kv_cache_bytes=2 << 20))
    yield started
    started.close()


@pytest.fixture(scope="module")
def ready(host: EngineHost) -> EngineReady:
    first = gather(host, bool)[0]
    assert isinstance(first, EngineReady)
    return first


def test_it_gives_way_to_the_process_that_started_it(host: EngineHost, ready: EngineReady) -> None:
    assert host.pid is not None
    own = os.getpriority(os.PRIO_PROCESS, 0)
    threads = [int(task.name) for task in Path(f"/proc/{host.pid}/task").iterdir()]
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {min(19, own + YIELDS)}


def test_an_iteration_waits_less_for_a_thread_that_has_the_interpreter() -> None:
    before = sys.getswitchinterval()
    try:
        settle()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        assert before > SWITCH_S
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()


def test_ready_comes_first(ready: EngineReady) -> None:
    assert (ready.vocab_size, ready.max_model_length, ready.page_tokens) == (128, 256, 64)
    assert ready.kv_total_pages == (2 << 20) // 32768 - 1
    assert any("calibrated" in note for note in ready.notes)
    assert not any("not bit-exact" in note for note in ready.notes)


@pytest.mark.usefixtures("ready")
def test_serves_and_finetunes(host: EngineHost, driver: Any, draw_tokens: Any, training: Any, start_job: Any) -> None:
    """The tokens and gradient norms of an engine without a process."""
    job = [start_job(), *training(steps=3)]
    request = AddRequest("r", draw_tokens(1, 40), SamplingParams(12, ignore_eos=True), time.monotonic())
    for command in (*job, request):
        host.submit(command)
    inline = driver()
    inline.submit(*job, request)
    inline.run()

    def enough(events: list[Event]) -> bool:
        tokens = [token for e in events if isinstance(e, TokenBatch) for token in e.tokens]
        return sum(isinstance(e, StepDone) for e in events) == 3 and any(t.finish for t in tokens)

    events = gather(host, enough)
    tokens = [token for e in events if isinstance(e, TokenBatch) for token in e.tokens]
    assert [token.token for token in tokens] == inline.tokens()["r"]
    assert tokens[-1].finish is FinishReason.LENGTH
    assert [e for e in events if isinstance(e, StepDone)] == inline.of(StepDone)


@pytest.mark.usefixtures("ready")
def test_reports_its_load_while_idle(host: EngineHost) -> None:
    gather(host, lambda events: sum(isinstance(e, LoadReport) for e in events) >= 2)


@pytest.mark.usefixtures("ready")
def test_a_bad_request_is_an_event(host: EngineHost) -> None:
    host.submit(AddRequest("bad", (), SamplingParams(1), time.monotonic()))
    assert gather(host, any_of(RequestFailed))
    assert host.alive


@pytest.mark.usefixtures("ready")
def test_close_leaves_no_process(host: EngineHost) -> None:
    """The last test of the module's host."""
    pid = host.pid
    assert pid is not None
    assert runs(pid)
    host.close()
    assert not host.alive
    assert not runs(pid)


def test_a_broken_folder_is_named(tmp_path: Path) -> None:
    broken = EngineHost.start(EngineConfig(str(tmp_path)))
    try:
        (failed,) = gather(broken, bool)
        assert isinstance(failed, EngineFailed)
        assert str(tmp_path / "config.json") in failed.message
        assert broken.pid is not None
        assert gone(broken.pid)
    finally:
        broken.close()


def test_what_the_device_decides_is_settled_in_its_process(plain: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Said in what it tells the agent, and in the log before anything is read."""
    choice = DeviceChoice("cpu", dtype="bfloat16", kv_cache_bytes=1 << 20)
    started = EngineHost.start(EngineConfig(plain, max_model_length=256), choice)
    try:
        ready = gather(started, bool)[0]
        assert isinstance(ready, EngineReady)
        assert ready.kv_total_pages == (1 << 20) // 16384 - 1
        assert "dtype bfloat16: engine.dtype is bfloat16" in ready.notes
        assert ready.device == "cpu"
        assert ready.notes[0].startswith("device cpu")
        assert any("calibrated" in note for note in ready.notes)
    finally:
        started.close()
    log = capfd.readouterr().err
    assert log.index("memory: KV cache (64 pages): 1,048,576 bytes") < log.index("reading model.safetensors (1 of 1, ")


def test_a_machine_without_what_is_asked_for_is_an_event(plain: str) -> None:
    for choice, named in (
        (DeviceChoice(dtype="float16"), "engine.dtype is float16"),
        (DeviceChoice("cpu", kv_cache_bytes=32768), "engine.kvCacheMemory is 32,768 bytes"),
    ):
        refused = EngineHost.start(EngineConfig(plain, max_model_length=256), choice)
        try:
            (failed,) = gather(refused, bool)
            assert isinstance(failed, EngineFailed)
            assert named in failed.message
        finally:
            refused.close()


PARENT = """
import sys, time
from coserve_engine.config import EngineConfig
from coserve_engine.host import SWITCH_S, YIELDS, EngineHost, settle
if __name__ == "__main__":
    host = EngineHost.start(EngineConfig(sys.argv[1], max_model_length=256, kv_cache_bytes=2 << 20))
    while not host.events(1.0):
        pass
    print(host.pid, flush=True)
    time.sleep(600)
"""


def test_it_does_not_outlive_its_parent(plain: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script, plain], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert runs(pid)
        os.kill(parent.pid, 9)
    assert gone(pid)


BROKEN = """
import sys
from coserve_engine import engine, host
from coserve_engine.config import EngineConfig
from coserve_engine.messages import AdapterVersion, AddRequest, LoadAdapter, SamplingParams

def broken(*_):
    raise ZeroDivisionError("on purpose")

if sys.argv[2] == "step":
    engine.Engine._view = broken
else:
    engine.read_adapter = broken

if __name__ == "__main__":
    started = host.EngineHost.start(EngineConfig(sys.argv[1], max_model_length=256, kv_cache_bytes=2 << 20))
    started.submit(LoadAdapter(AdapterVersion("a", 1), "/nowhere"))
    found = []
    while not found or type(found[-1]).__name__ != "EngineFailed":
        found += started.events(1.0)
    print(found[-1].message, flush=True)
    started._process.join()
    print(started.alive)
"""


@pytest.mark.parametrize("where", ["step", "files"])
def test_a_mistake_is_said_before_the_process_ends(plain: str, tmp_path: Path, where: str) -> None:
    """A spawned process imports its parent's script, and with it the mistake."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    ended = subprocess.run(
        [sys.executable, script, plain, where], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    said, alive = ended.stdout.splitlines()
    assert "ZeroDivisionError('on purpose')" in said
    assert alive == "False"
    assert "Traceback" in ended.stderr
