"""What `/metrics` shows: vLLM's names, so that existing dashboards work, and `distserve:` for what is ours.

Observed by the gateway only (instances send their figures with each step), so that one scrape shows the whole server.
TTFT is split along a request's way: queued for prefill, prefill, queued for decode, pull, first decode step.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from distserve.plan import Role
from distserve.request import FinishReason
from distserve.serve.base import Instance
from distserve.serve.histogram import Histogram, Series
from distserve.serve.messages import Step, Timing

# Buckets as vLLM has them, so that its dashboards' quantiles mean the same here.
TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
SHORT = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Telemetry:
    """Every metric of the server, in a registry of its own (two servers in one process do not collide)."""

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody reads
        self.registry = CollectorRegistry()
        self.model = model_name
        self._instances()
        self._requests()
        self._handoffs()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("model_name", *labels), registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        histogram = Histogram(name, text, ("model_name", *labels), buckets)
        self.registry.register(histogram)
        return histogram

    def _of_model(self, name: str, text: str, buckets: tuple[float, ...]) -> Series:
        return self._histogram(name, text, buckets).labels(self.model)

    def _instances(self) -> None:
        where = ("instance", "role")
        self.running = self._gauge("vllm:num_requests_running", "Requests in running batches.", *where)
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait to be scheduled.", *where)
        self.kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", *where)
        self.preemptions = self._gauge("vllm:num_preemptions_total", "Requests that lost their KV to others.", *where)
        self.step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens computed in a step.", STEP, *where)
        self.held = self._gauge("distserve:num_handoffs_waiting", "Hand-offs whose KV waits in prefill memory.", *where)
        self.up = self._gauge("distserve:instance_up", "1 while the instance can take work.", *where)
        self.restarts = self._counter("distserve:instance_restarts", "Restarts of the instance's process.", *where)
        self.step_seconds = self._histogram("distserve:step_seconds", "Duration of a step.", SHORT, *where)

    def _requests(self) -> None:
        histogram = self._of_model
        self.ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", TTFT)
        self.gap = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a stream.", TPOT)
        self.tpot = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean, of a request, after the first.", TPOT
        )
        self.latency = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", SECONDS)
        self.queue = histogram("vllm:request_queue_time_seconds", "Arrival to first batch.", SECONDS)
        self.prefill = histogram("vllm:request_prefill_time_seconds", "First batch to first token.", SECONDS)
        self.decode = histogram("vllm:request_decode_time_seconds", "First to last token.", SECONDS)
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.output_length = histogram("vllm:request_generation_tokens", "Generated tokens of a request.", TOKENS)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens processed.").labels(self.model)
        self.output_tokens = self._counter("vllm:generation_tokens", "Tokens generated.").labels(self.model)
        self.finished = self._counter("vllm:request_success", "Requests that ended well.", "finished_reason")
        self.failed = self._counter("distserve:request_failures", "Requests that did not end well.", "reason")
        self.retries = self._counter("distserve:request_retries", "Attempts after the first.", "reason")

    def _handoffs(self) -> None:
        self.phase_queue = self._histogram("distserve:phase_queue_seconds", "Waiting before a phase.", SHORT, "phase")
        name = "distserve:phase_first_token_seconds"
        self.phase_compute = self._histogram(name, "From a phase's start to its first token.", SHORT, "phase")
        text = "Making one request's KV ready to be pulled."
        self.publish_seconds = self._of_model("distserve:publish_seconds", text, SHORT)
        self.pull_seconds = self._of_model("distserve:pull_seconds", "Reading and checking one request's KV.", SHORT)
        self.pull_bytes = self._counter("distserve:pull_bytes", "KV bytes pulled.").labels(self.model)
        self.handoffs = self._counter("distserve:handoffs", "Prompts handed from prefill to decode.").labels(self.model)
        self.pull_failures = self._counter("distserve:pull_failures", "Pulls that failed.", "reason")
        text = "KV that was not what was promised."
        self.digest_failures = self._counter("distserve:digest_failures", text).labels(self.model)

    # -- what is observed ---------------------------------------------------------------------------------------------

    def add_instance(self, instance: Instance) -> None:
        """Gauges are read when they are scraped, not written when something happens."""
        where = (self.model, instance.name, instance.role)
        load = instance.load

        def kv_usage() -> float:
            report = load()
            return 1 - report.num_free_blocks / report.num_blocks if report.num_blocks else 0.0

        self.running.labels(*where).set_function(lambda: load().num_running)
        self.waiting.labels(*where).set_function(lambda: load().num_queued)
        self.held.labels(*where).set_function(lambda: load().num_held)
        self.preemptions.labels(*where).set_function(lambda: load().num_preemptions)
        self.kv_usage.labels(*where).set_function(kv_usage)
        self.up.labels(*where).set_function(lambda: float(instance.alive))
        self.restarts.labels(*where)  # shown as 0 from the start

    def observe_step(self, instance: str, role: Role, step: Step) -> None:
        if step.num_batched_tokens:
            where = (self.model, instance, role)
            self.step_tokens.labels(*where).observe(step.num_batched_tokens)
            self.step_seconds.labels(*where).observe(step.seconds)
        for seconds in step.publishing:
            self.publish_seconds.observe(seconds)

    def observe_timing(self, role: Role, timing: Timing) -> None:
        """Where an attempt's time went on one instance."""
        self.phase_queue.labels(self.model, role).observe(timing.queued)
        self.phase_compute.labels(self.model, role).observe(timing.computed)
        if role is not Role.DECODE:
            self.queue.observe(timing.queued)
            self.prefill.observe(timing.computed)
        elif timing.pull_bytes:
            self.pull_seconds.observe(timing.pull)
            self.pull_bytes.inc(timing.pull_bytes)
            self.handoffs.inc()

    def observe_pull_failure(self, reason: str) -> None:
        self.pull_failures.labels(self.model, reason).inc()
        if reason == "digest":
            self.digest_failures.inc()

    def observe_end(
        self, finish: FinishReason, num_prompt: int, num_output: int, latency: float, after_first: float
    ) -> None:
        """A request ended well. `after_first`: seconds from its first to its last token."""
        self.finished.labels(self.model, finish).inc()
        self.latency.observe(latency)
        self.decode.observe(after_first)
        if num_output > 1:
            self.tpot.observe(after_first / (num_output - 1))
        self.prompt_length.observe(num_prompt)
        self.output_length.observe(num_output)

    def ended_early(self) -> None:
        """The client went away: nobody wants the rest."""
        self.finished.labels(self.model, "abort").inc()

    def observe_failure(self, reason: str) -> None:
        self.failed.labels(self.model, reason).inc()

    def observe_retry(self, reason: str) -> None:
        self.retries.labels(self.model, reason).inc()

    def render(self) -> tuple[bytes, str]:
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
