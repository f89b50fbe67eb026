"""The recipes of docs/autoscaling.md: KEDA's CRD takes the ScaledObject, a real Prometheus answers the queries."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web
from live_operator import eventually

from coserve_agent.telemetry.metrics import Metrics
from coserve_agent.telemetry.slo import Slo, SloMeter
from coserve_api.common import API_VERSION

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "autoscaling"


def recipe(name: str) -> Any:
    return yaml.safe_load((RECIPES / name).read_text())


@pytest.fixture(scope="module")
def prometheus_program() -> Path:
    """Debian's Prometheus, unpacked."""
    found = shutil.which("prometheus")
    if found is not None:
        return Path(found)
    words = [ROOT / "hack" / "cluster", "internal", "from_debian", "prometheus"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()) / "usr" / "bin" / "prometheus"


@pytest.fixture
async def agents(servers: Any) -> AsyncIterator[Any]:
    """Agents' /metrics on ports of this machine; `serve(values)` starts one each."""
    runners: list[web.AppRunner] = []

    async def serve(*values: float) -> list[str]:
        targets = []
        for value in values:
            metrics = Metrics("tiny", lambda: 0.0)
            if not math.isnan(value):
                metrics.load_average.add(0.0, value)
            text = metrics.render(SloMeter(Slo(ttft_s=1.0, tpot_s=0.1), lambda: 0.0)).decode()
            application = web.Application()

            async def render(_: web.Request, text: str = text) -> web.Response:
                return web.Response(text=text)

            application.router.add_get("/metrics", render)
            runners.append(web.AppRunner(application))
            await runners[-1].setup()
            await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
            targets.append(f"127.0.0.1:{runners[-1].addresses[0][1]}")
        return targets

    yield serve
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
def prometheus(prometheus_program: Path, servers: Any, tmp_path: Path) -> Iterator[Any]:
    """A Prometheus with the recipe's relabelling; `scrape` targets as its discovery of pods gives them, `ask` it."""
    port = servers.free_port()
    config, targets = tmp_path / "prometheus.yml", tmp_path / "targets.json"
    targets.write_text("[]")
    (scraped,) = recipe("prometheus.yaml")["scrape_configs"]
    del scraped["kubernetes_sd_configs"]  # Debian's is built without it
    scraped |= {"scrape_interval": "1s", "file_sd_configs": [{"files": [str(targets)]}]}
    config.write_text(yaml.safe_dump({"scrape_configs": [scraped]}))
    words = [str(prometheus_program), f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]

    class Prometheus:
        @staticmethod
        def scrape(agents: dict[str, list[str]], **more: str) -> None:
            groups = json.loads(targets.read_text())
            for endpoint, each in agents.items():
                about = {
                    "namespace": "default",
                    "pod_name": f"{endpoint}-1",
                    "pod_ready": "true",
                    "pod_container_port_name": "admin",
                    "pod_label_app_kubernetes_io_name": "coserve-agent",
                    "pod_label_coserve_dev_endpoint": endpoint,
                } | more
                labels = {f"__meta_kubernetes_{name}": value for name, value in about.items()}
                groups.append({"targets": each, "labels": labels})
            targets.write_text(json.dumps(groups))

        @staticmethod
        async def ask(query: str) -> list[float]:
            async with aiohttp.ClientSession() as session:
                got = await session.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query})
                answer = await got.json()
            assert answer["status"] == "success", answer
            return [float(each["value"][1]) for each in answer["data"]["result"]]

    with servers.program([*words, f"--web.listen-address=127.0.0.1:{port}"], tmp_path / "log") as process:
        servers.wait_until(lambda: servers.answers(port), process, tmp_path / "log")
        yield Prometheus()


def queries() -> dict[str, str]:
    """The query of each recipe for endpoint tiny of namespace default, as it reaches Prometheus."""
    (rule,) = recipe("prometheus-adapter.yaml")["rules"]
    filled = rule["metricsQuery"]
    for mark, text in (
        ("<<.Series>>", "coserve_saturation_percent"),
        ("<<.LabelMatchers>>", 'namespace="default",endpoint="tiny"'),
        ("<<.GroupBy>>", "endpoint"),
    ):
        filled = filled.replace(mark, text)
    return {"KEDA": recipe("keda.yaml")["spec"]["triggers"][0]["metadata"]["query"], "prometheus-adapter": filled}


async def test_the_queries_give_the_mean_of_the_agents_that_have_reported_and_nothing_without_one(
    prometheus: Any, agents: Any
) -> None:
    nan = float("nan")
    prometheus.scrape({"tiny": await agents(500.0)}, pod_ready="false")
    prometheus.scrape({"tiny": await agents(500.0)}, pod_container_port_name="http")
    prometheus.scrape({"tiny": await agents(500.0)}, pod_label_app_kubernetes_io_name="other")
    prometheus.scrape({"tiny": await agents(60.0, 81.0, nan), "other": await agents(500.0), "idle": await agents(nan)})

    async def all_scraped() -> bool:
        return len(await prometheus.ask("coserve_saturation_percent")) == 5

    await eventually(all_scraped)
    for query in queries().values():
        assert await prometheus.ask(query) == [70.5]
        assert await prometheus.ask(query.replace("tiny", "idle")) == [], "no data is not 0"
        assert await prometheus.ask(query.replace("tiny", "nobody")) == []
    (naive,) = await prometheus.ask("avg(coserve_saturation_percent{endpoint='tiny'})")
    assert math.isnan(naive), "what >= 0 is for"


def test_keda_holds_when_there_is_no_data_and_takes_the_figure_as_it_is() -> None:
    (trigger,) = recipe("keda.yaml")["spec"]["triggers"]
    assert trigger["metricType"] == "Value"
    assert trigger["metadata"]["ignoreNullValues"] == "false"


@pytest.mark.apiserver
async def test_kedas_crd_and_the_api_server_take_the_recipes(crds: Any) -> None:
    definition = str(Path(__file__).parent / "keda" / "scaledobjects.yaml")
    assert crds.kubectl("apply", "--server-side", "-f", definition).returncode == 0
    ready = ("wait", "--for=condition=Established", "crd/scaledobjects.keda.sh", "--timeout=30s")
    assert crds.kubectl(*ready).returncode == 0
    for name in ("keda.yaml", "hpa.yaml"):
        done = await asyncio.to_thread(
            crds.kubectl, "apply", "--dry-run=server", "--validate=strict", "-f", str(RECIPES / name)
        )
        assert done.returncode == 0, done.stderr
    for body in (recipe("keda.yaml"), recipe("hpa.yaml")):
        assert body["spec"]["scaleTargetRef"] == {
            "apiVersion": API_VERSION,
            "kind": "InferenceEndpoint",
            "name": "tiny",
        }
    broken = recipe("keda.yaml")
    broken["spec"]["triggers"][0]["metricType"] = 5
    refused = crds.kubectl("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(broken))
    assert refused.returncode != 0, "the CRD does look"
