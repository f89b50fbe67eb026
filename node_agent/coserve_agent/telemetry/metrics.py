"""What /metrics and /debug/iterations show. The vllm: names are those that routers and autoscalers of the ecosystem
read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from coserve_agent.telemetry.passage import Cause
from coserve_agent.telemetry.slo import LoadAverage, SloMeter
from coserve_engine.messages import EngineReady, IterationDone, LoadReport, PlainReason

RING_SIZE = 20_000
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
GAP_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
ITERATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


class IterationLog:
    """The last iterations, for /debug/iterations."""

    def __init__(self, size: int = RING_SIZE) -> None:
        self._ring: deque[IterationDone] = deque(maxlen=size)

    def add(self, event: IterationDone) -> None:
        self._ring.append(event)

    def since(self, started_s: float, limit: int) -> list[dict[str, Any]]:
        """At most `limit` iterations that started after `started_s` (monotonic seconds of this machine), oldest
        first.
        """
        rows = []
        for event in self._ring:
            if event.started_s > started_s:
                rows.append(
                    {
                        "started": event.started_s,
                        "duration": event.duration_s,
                        "until": event.until_s,
                        "predicted": event.predicted_s,
                        "decode": event.decode_tokens,
                        "prefill": event.prefill_tokens,
                        "finetune": event.finetune_tokens,
                        "backward": event.backward_tokens,
                        "paused": event.paused_s,
                        "reserve": event.reserve_s,
                    }
                )
                if len(rows) == limit:
                    break
        return rows


class Metrics:
    """Prometheus series of one agent, in a registry of its own."""

    def __init__(self, model_name: str, now_s: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.load_average = LoadAverage(now_s)
        self.iterations = IterationLog()
        self.last_load: LoadReport | None = None
        self._jobs: set[str] = set()
        gauge, counter = self._gauge, self._counter
        self._waiting = gauge("vllm:num_requests_waiting", "Requests that have no token yet", model_name)
        self._running = gauge("vllm:num_requests_running", "Requests that are being generated", model_name)
        self._kv_usage = gauge("vllm:kv_cache_usage_perc", "Share of the KV pool in use, 0 to 1", model_name)
        self._saturation = gauge(
            "coserve_saturation_percent", "Demand of inference alone, averaged over 15 s", model_name
        )
        self._attainment = gauge(
            "coserve_slo_attainment_percent", "Requests of the last minute that attained", model_name
        )
        self._tokens = counter("coserve_tokens", "Tokens by kind", "kind")
        self._finetune_tokens = counter("coserve_finetune_tokens", "Tokens of finished optimizer steps", "job")
        self._requests = counter("coserve_requests", "Requests by result", "result")
        self._prefix_queries = counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the KV cache", "model_name"
        ).labels(model_name)
        self._prefix_hits = counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the KV cache", "model_name"
        ).labels(model_name)
        self._preemptions = counter("vllm:num_preemptions", "Times a request gave its pages back", "model_name").labels(
            model_name
        )
        self._job_step = Gauge("coserve_job_step", "Finished optimizer steps", ["job"], registry=self.registry)
        self._job_loss = Gauge("coserve_job_loss", "Loss of the last finished step", ["job"], registry=self.registry)
        self._job_eval_loss = Gauge(
            "coserve_job_eval_loss", "Loss of the last evaluation", ["job"], registry=self.registry
        )
        self.ttft = self._histogram("coserve_time_to_first_token_seconds", "Arrival to first token", TTFT_BUCKETS_S)
        self.gap = self._histogram("coserve_inter_token_seconds", "Between tokens of a request", GAP_BUCKETS_S)
        self.late = Histogram(
            "coserve_late_seconds",
            "How much later than promised first tokens and gaps were, by cause",
            ["cause"],
            buckets=GAP_BUCKETS_S,
            registry=self.registry,
        )
        self.missed = counter(
            "coserve_promises_missed",
            "Requests late or turned away, by cause",
            "cause",
        )
        for cause in Cause:
            self.missed.labels(cause.value)
        self.reserve = Gauge(
            "coserve_reserve_seconds", "Of each gap, kept free for what no plan foresees", registry=self.registry
        )
        self._fallbacks = Gauge(
            "coserve_kernel_fallbacks",
            "Words of an iteration that plain operators compute though the device has kernels for them, by reason",
            ["reason"],
            registry=self.registry,
        )
        self._pauses_s = 0.0
        self._paused = Counter("coserve_paused_seconds", "Pauses of the machine", registry=self.registry)
        self._iterations_done = Counter("coserve_iterations", "Iterations of the engine", registry=self.registry)
        self._over_bound = Counter(
            "coserve_iterations_over_bound",
            "Iterations that ended after their bound, pauses taken out",
            registry=self.registry,
        )
        self._iteration = self._histogram("coserve_iteration_seconds", "Duration of an iteration", ITERATION_BUCKETS_S)
        self._overrun = self._histogram("coserve_iteration_overrun_seconds", "Duration past its bound", GAP_BUCKETS_S)

    def on_ready(self, event: EngineReady) -> None:
        for reason in PlainReason:
            self._fallbacks.labels(reason.value).set(event.plain_words if reason is event.plain_reason else 0)

    def on_iteration(self, event: IterationDone) -> None:
        self.iterations.add(event)
        self._iteration.observe(event.duration_s)
        self._iterations_done.inc()
        self._paused.inc(event.pauses_s - self._pauses_s)
        self._pauses_s = event.pauses_s
        late_s = event.started_s + event.duration_s - event.until_s - event.paused_s
        if late_s > 0:
            self._over_bound.inc()
            self._overrun.observe(late_s)
        self._tokens.labels("decode").inc(event.decode_tokens)
        self._tokens.labels("prefill").inc(event.prefill_tokens)
        self._tokens.labels("finetune").inc(event.finetune_tokens)
        self._tokens.labels("backward").inc(event.backward_tokens)

    def on_load(self, event: LoadReport) -> None:
        last = self.last_load
        self._prefix_queries.inc(event.prefix_queries - (last.prefix_queries if last else 0))
        self._prefix_hits.inc(event.prefix_hits - (last.prefix_hits if last else 0))
        self._preemptions.inc(event.preemptions - (last.preemptions if last else 0))
        self.last_load = event
        self.load_average.add(event.at_s, event.saturation_percent)

    def on_request(self, result: str) -> None:
        """`result`: ok, cancelled, refused or failed."""
        self._requests.labels(result).inc()

    def on_step(self, job: str, step: int, loss: float | None, tokens: int) -> None:
        self._jobs.add(job)
        self._job_step.labels(job).set(step)
        self._job_loss.labels(job).set(_or_nan(loss))
        self._finetune_tokens.labels(job).inc(tokens)

    def on_evaluation(self, job: str, loss: float | None) -> None:
        self._jobs.add(job)
        self._job_eval_loss.labels(job).set(_or_nan(loss))

    def forget_job(self, job: str) -> None:
        if job not in self._jobs:
            return
        self._jobs.remove(job)
        for series in (self._job_step, self._job_loss, self._job_eval_loss, self._finetune_tokens):
            series.remove(job)

    def render(self, meter: SloMeter) -> bytes:
        """The text exposition. A gauge without data is NaN: no data is not zero."""
        load = self.last_load
        self._waiting.set(load.waiting if load else 0)
        self._running.set(load.running if load else 0)
        self._kv_usage.set(load.kv_used_pages / load.kv_total_pages if load and load.kv_total_pages else 0.0)
        self._saturation.set(_or_nan(self.load_average.percent()))
        self._attainment.set(_or_nan(meter.report().attainment_percent))
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, model_name: str) -> Gauge:
        return Gauge(name, text, ["model_name"], registry=self.registry).labels(model_name)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, [label], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
