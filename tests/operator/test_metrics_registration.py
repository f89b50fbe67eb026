"""Who registers custom.metrics.k8s.io, when, and who takes it away: on a fake clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from coserve_operator.apply.metrics_slot import MetricsSlotKeeper
from coserve_operator.decide.endpoint_status import ObservedEndpoint, status_of
from coserve_operator.decide.metrics_slot import API_SERVICES, slot_of
from coserve_operator.kube import API_SERVICE, Kind, Manifest, NotFoundError, UnavailableError
from coserve_operator.leader import Leader
from coserve_operator.metrics_api.registration import Registration
from coserve_operator.settings import MetricsApiSettings
from coserve_operator.telemetry import Telemetry

OURS = ("coserve-system", "coserve-metrics-api")
NAME = API_SERVICES[0]


class Api:
    """An API server with APIServices, a ClusterRole and the server's pod."""

    def __init__(self) -> None:
        self.services: dict[str, Manifest] = {}
        self.ready, self.applied, self.role = True, 0, "role-1"

    async def get(self, kind: Kind, _: str | None, name: str) -> Manifest:
        if kind is API_SERVICE:
            if name not in self.services:
                raise NotFoundError(404, name)
            return self.services[name]
        if kind.name == "Pod":
            return {"status": {"conditions": [{"type": "Ready", "status": str(self.ready)}]}}
        return {"metadata": {"name": name, "uid": self.role}}

    async def apply(self, manifest: Manifest, **_: Any) -> None:
        self.applied += 1
        name = manifest["metadata"]["name"]
        metadata = {**manifest["metadata"], "uid": f"uid-{self.applied}", "resourceVersion": "1"}
        self.services[name] = {**manifest, "metadata": metadata, "status": {}}

    async def delete(self, _: Kind, __: None, name: str, uid: str) -> None:
        assert self.services.pop(name)["metadata"]["uid"] == uid

    def set_available(self, available: bool) -> None:
        self.services[NAME]["status"] = {"conditions": [{"type": "Available", "status": str(available)}]}

    def add_foreign(self, name: str = API_SERVICES[1]) -> None:
        service = {"namespace": "monitoring", "name": "prometheus-adapter"}
        self.services[name] = {"metadata": {"name": name, "uid": "theirs"}, "spec": {"service": service}}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def api() -> Any:
    return Api()


@pytest.fixture
def registration(api: Any, tmp_path: Path) -> Any:
    (tmp_path / "ca.crt").write_text("the CA")
    clock = Clock()
    made: Any = Registration(api, MetricsApiSettings(namespace=OURS[0], certificates=tmp_path), clock)
    made.clock, made.folder = clock, tmp_path
    return made


@pytest.fixture
def keeper(api: Any) -> Any:
    changes: list[None] = []
    clock = Clock()
    made: Any = MetricsSlotKeeper(api, OURS, clock, lambda: changes.append(None))
    made.clock, made.changes = clock, changes
    return made


async def test_a_server_registers_once_it_is_ready_and_again_only_where_something_differs(registration, api) -> None:
    api.ready = False
    await registration.look()
    assert not api.services
    api.ready = True
    await registration.look()
    await registration.look()
    assert api.applied == 1
    assert api.services[NAME]["spec"]["service"] == {"namespace": OURS[0], "name": OURS[1], "port": 443}
    (registration.folder / "ca.crt").write_text("another CA")
    await registration.look()
    assert api.applied == 2
    api.role = "role-2"  # the release was installed anew
    await registration.look()
    assert api.services[NAME]["metadata"]["ownerReferences"][0]["uid"] == "role-2"


@pytest.mark.parametrize("taken", API_SERVICES)
async def test_an_api_that_somebody_else_serves_is_left_to_them(registration, keeper, api, taken) -> None:
    api.add_foreign(taken)
    await registration.look()
    assert api.applied == 0
    for keeper.clock.now in (0.0, 1000.0):
        await keeper.look()
    assert list(api.services) == [taken]
    assert len(keeper.changes) == 1, "endpoints are looked at again, once"
    assert "monitoring/prometheus-adapter" in keeper.slot.obstacle[1]
    api.services.clear()
    await keeper.look()
    assert keeper.slot.obstacle is None
    assert len(keeper.changes) == 2


async def test_what_nobody_reaches_is_taken_away_and_tried_again_ever_more_seldom(registration, keeper, api) -> None:
    tries = []
    for now in range(0, 6000, 2):
        registration.clock.now = keeper.clock.now = float(now)
        before = api.applied
        await registration.look()
        if api.applied > before:
            tries.append(now)
            api.set_available(False)
        await keeper.look()
    assert tries == [0, 300, 900, 2100, 4500]
    api.services.clear()
    registration.clock.now = 10_000.0
    await registration.look()
    api.set_available(True)
    await registration.look()
    del api.services[NAME]
    await registration.look()
    assert api.services, "it was reached: at once"


async def test_a_server_that_is_away_for_a_moment_keeps_its_registration(registration, keeper, api) -> None:
    await registration.look()
    for now, available in ((0.0, False), (29.0, False), (29.5, True), (30.0, False), (59.0, False)):
        keeper.clock.now = now
        api.set_available(available)
        await keeper.look()
    assert api.services
    keeper.clock.now = 60.0
    await keeper.look()
    assert not api.services


def test_an_endpoint_says_why_it_has_no_autoscaler(make) -> None:
    def reason(slot: Any, **spec: Any) -> str:
        observed = ObservedEndpoint(make.endpoint(**spec), autoscaler_obstacle=slot.obstacle)
        conditions = status_of(observed, make.NOW).conditions
        (found,) = (each for each in conditions if each.type == "ScalingReady")
        return f"{found.status} {found.reason}"

    scaling = {"autoscaling": {"maxReplicas": 2}}
    api = Api()
    assert reason(slot_of([], OURS), **scaling) == "Unknown AutoscalerStarting"
    assert reason(slot_of([], None), **scaling) == "False NoMetricsApi"
    assert reason(slot_of([], None)) == "Unknown NotAutoscaled"
    api.add_foreign()
    assert reason(slot_of([*api.services.values()], OURS), **scaling) == "False MetricsApiTaken"


async def test_a_replica_is_ready_only_while_the_lease_can_be_had(ask) -> None:
    class Leases:
        error: Exception | None = UnavailableError(403, "may not create leases")
        holder = ""

        async def get(self, *_: Any) -> Manifest:
            if self.error is not None:
                raise self.error
            return {"metadata": {}, "spec": {"holderIdentity": self.holder, "renewTime": "1"}}

        async def replace(self, lease: Manifest) -> Manifest:
            return lease

    leases: Any = Leases()
    leader = Leader(leases, "ns", "lease", "me")
    telemetry = Telemetry(lambda: 0.0)
    telemetry.trouble = lambda: leader.trouble
    assert await ask(telemetry, "/readyz") == (200, "ok")
    assert not await leader._try()
    status, text = await ask(telemetry, "/readyz")
    assert status == 503
    assert "Lease ns/lease: 403: may not create leases" in text
    assert await ask(telemetry, "/healthz") == (200, "ok")
    leases.error, leases.holder = None, "another"
    assert not await leader._try()
    assert await ask(telemetry, "/readyz") == (200, "ok"), "a replica that waits could take it"


@pytest.fixture
def ask() -> Any:
    async def answer(telemetry: Telemetry, path: str) -> tuple[int, str]:
        async with TestClient(TestServer(telemetry.application())) as client:
            got = await client.get(path)
            return got.status, await got.text()

    return answer
