"""Metrics for Prometheus, under vLLM's names where it has them, so that its dashboards work."""

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from qwen_jax.inference.active import Times
from qwen_jax.serving.engine_protocol import EngineLike

# vLLM's, in seconds.
_TO_FIRST = (
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
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
_PER_TOKEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_WHOLE = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)
_TOKENS = (
    1,
    2,
    5,
    10,
    20,
    50,
    100,
    200,
    500,
    1000,
    2000,
    5000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
)
_CHOICES = (1, 2, 5, 10, 20)


class Histogram:
    """Counts of values in ranges. The event loop observes one value for each token, so this is quick."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts a value."""
        self._counts[bisect.bisect_left(self.bounds, value)] += times
        self._sum += value * times

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum of the values."""
        total, result = 0, []
        for bound, count in zip([*map(float, self.bounds), float("inf")], self._counts, strict=True):
            total += count
            result.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        return result, self._sum


class Metrics(Collector):
    """What a server counts.

    Args:
      model: its name, a label of every metric.
      engine: whose counts are read at each scrape; None for a reward model.
    """

    def __init__(self, model: str, engine: EngineLike | None) -> None:
        self._engine = engine
        self._labels = {"model_name": model, "engine": "0"}
        self.time_to_first_token = Histogram(_TO_FIRST)
        self.inter_token = Histogram(_PER_TOKEN)
        self.per_output_token = Histogram(_PER_TOKEN)
        self.end_to_end = Histogram(_WHOLE)
        self.prompt_tokens, self.generated_tokens = Histogram(_TOKENS), Histogram(_TOKENS)
        self.queue, self.prefill, self.decode = Histogram(_WHOLE), Histogram(_WHOLE), Histogram(_WHOLE)
        self.choices, self.max_tokens = Histogram(_CHOICES), Histogram(_TOKENS)
        self.finished: Counter[str] = Counter({reason: 0 for reason in ("stop", "length", "abort", "error")})
        self.http: Counter[tuple[str, str, str]] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def observe_times(self, times: Times) -> None:
        """Counts where the time of a request went. Called by the engine's thread, and by no other."""
        if times.started is not None:
            self.queue.observe(times.started - times.submitted)
        if times.started is not None and times.first_token is not None:
            self.prefill.observe(times.first_token - times.started)
            self.decode.observe(times.finished - times.first_token)

    def page(self) -> tuple[bytes, str]:
        """The text of /metrics and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics, as the registry asks."""
        histograms = {
            "time_to_first_token_seconds": (
                "From the arrival of a request to its first token.",
                self.time_to_first_token,
            ),
            "inter_token_latency_seconds": ("Between a token and the next.", self.inter_token),
            "time_per_output_token_seconds": ("The same, by its older name.", self.inter_token),
            "request_time_per_output_token_seconds": ("Mean of each request.", self.per_output_token),
            "e2e_request_latency_seconds": ("From the arrival of a request to its last token.", self.end_to_end),
            "request_queue_time_seconds": ("Of choices, before their prompt is read.", self.queue),
            "request_prefill_time_seconds": ("Of choices, from there to the first token.", self.prefill),
            "request_decode_time_seconds": ("Of choices, from there to the last token.", self.decode),
            "request_prompt_tokens": ("Tokens of prompts.", self.prompt_tokens),
            "request_generation_tokens": ("New tokens of requests.", self.generated_tokens),
            "request_params_n": ("Choices that requests ask for.", self.choices),
            "request_params_max_tokens": ("New tokens that requests ask for.", self.max_tokens),
        }
        for name, (text, histogram) in histograms.items():
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), *histogram.buckets())
            yield family
        finished = CounterMetricFamily(
            "vllm:request_success", "Ended requests.", labels=[*self._labels, "finished_reason"]
        )
        for reason, count in sorted(self.finished.items()):
            finished.add_metric([*self._labels.values(), reason], count)
        yield finished
        http = CounterMetricFamily("http_requests", "Answers over HTTP.", labels=["method", "handler", "status"])
        for key, count in sorted(self.http.items()):
            http.add_metric(key, count)
        yield http
        yield from self._of_engine()

    def _of_engine(self) -> Iterator[Metric]:
        if self._engine is None:
            return
        try:
            stats = self._engine.stats()
        except RuntimeError:
            return  # It has failed, as /health says. What was counted over HTTP stays.
        used = stats.pages_used / max(stats.pages, 1)
        gauges = {
            "num_requests_running": ("Requests in the batch.", stats.running),
            "num_requests_waiting": ("Requests in the queue.", stats.waiting),
            "kv_cache_usage_perc": ("Pages of the cache in use, 1 is all of them.", used),
            "gpu_cache_usage_perc": ("The same, by its older name.", used),
        }
        for name, (text, number) in gauges.items():
            yield self._add(GaugeMetricFamily(f"vllm:{name}", text, labels=list(self._labels)), number)
        # A metric whose labels are what it tells, as vLLM has it.
        cache = {"cache_dtype": stats.kv_dtype, "block_size": str(stats.page_size), "num_gpu_blocks": str(stats.pages)}
        labels = {**self._labels, **cache}
        info = GaugeMetricFamily("vllm:cache_config_info", "The pages of keys and values.", labels=list(labels))
        info.add_metric(list(labels.values()), 1)
        yield info
        counters = {
            "prompt_tokens": ("Tokens of prompts that were read.", stats.prompt_tokens),
            "generation_tokens": ("New tokens.", stats.output_tokens),
            "num_preemptions": ("Requests that gave up their pages and were read again.", stats.preemptions),
            "prefix_cache_queries": ("Tokens of prompts looked up in the prefix cache.", stats.prefix_queries),
            "prefix_cache_hits": ("Tokens of prompts found in the prefix cache.", stats.prefix_hits),
            "gpu_prefix_cache_queries": ("The same, by its older name.", stats.prefix_queries),
            "gpu_prefix_cache_hits": ("The same, by its older name.", stats.prefix_hits),
            "engine_steps": ("Programs of the model that ran. vLLM has no such count.", stats.steps),
        }
        for name, (text, number) in counters.items():
            yield self._add(CounterMetricFamily(f"vllm:{name}", text, labels=list(self._labels)), number)

    def _add(self, family: GaugeMetricFamily | CounterMetricFamily, number: float) -> Metric:
        family.add_metric(list(self._labels.values()), number)
        return family
