"""An engine's state as Prometheus gauges: one look at it for each scrape."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from jaxspark.calibration.estimates import REGIMES, Estimate
from jaxspark.models.pages import PAGE
from jaxspark.serving.engine import Engine
from jaxspark.serving.observing import Stats

_NAN = float("nan")


class EngineGauges(Collector):
    """What an engine shows whenever somebody looks."""

    def __init__(self, engine: Engine, labels: Mapping[str, str]):
        self._engine, self._labels = engine, labels

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All gauges, of one moment."""
        stats = self._engine.stats()
        for name, help, value in (
            ("vllm:num_requests_running", "Outputs with slots.", stats.running),
            ("vllm:num_requests_waiting", "Outputs without slots.", stats.waiting),
            (
                "vllm:kv_cache_usage_perc",
                "Pages that outputs have, from 0 to 1.",
                stats.pages_used / stats.pages,
            ),
            (
                "jaxspark:pages_cached",
                "Pages that the prefix cache keeps.",
                stats.pages_cached,
            ),
            (
                "jaxspark:waiting_tokens",
                "Tokens of prompts that were not admitted.",
                stats.waiting_tokens,
            ),
            (
                "jaxspark:accepted_length",
                "Tokens per round in the last seconds.",
                stats.accepted_length,
            ),
            (
                "jaxspark:tokens_per_second",
                "Tokens in the last seconds.",
                stats.tokens_per_second,
            ),
            (
                "jaxspark:compilations_after_ready",
                "Programs compiled late; 0 is right.",
                stats.late_compilations,
            ),
        ):
            yield self._gauge(name, help, [({}, value)])
        yield self._gauge(
            "vllm:num_requests_waiting_by_reason",
            "Outputs without slots.",
            [
                ({"reason": "capacity"}, stats.waiting - stats.deferred),
                ({"reason": "deferred"}, stats.deferred),
            ],
        )
        yield self._caches(stats)
        if self._engine.options.estimator is not None:
            yield from self._estimate(stats.estimate)

    def _caches(self, stats: Stats) -> GaugeMetricFamily:
        size = PAGE if self._engine.pages else self._engine.context
        return self._gauge(
            "vllm:cache_config_info",
            "Pages, and positions of each.",
            [({"block_size": str(size), "num_gpu_blocks": str(stats.pages)}, 1)],
        )

    def _estimate(self, estimate: Estimate | None) -> Iterator[GaugeMetricFamily]:
        """What was learned of acceptance; NaN until anything was."""
        error = None if estimate is None else estimate.calibration_error
        yield self._gauge(
            "jaxspark:calibration_error",
            "Expected calibration error of recent forecasts of survival.",
            [({}, error)],
        )
        slopes: list[tuple[dict[str, str], float | None]] = []
        intercepts: list[tuple[dict[str, str], float | None]] = []
        for kind in REGIMES:
            fit = None if estimate is None else estimate.regressions[kind]
            for signal in ("confidence", "certainty"):
                told = None if fit is None else getattr(fit, signal)
                slopes.append(({"outputs": kind, "signal": signal}, told))
            for place in range(self._engine.options.block):
                told = None if fit is None else fit.intercepts[place]
                intercepts.append(({"outputs": kind, "position": str(place)}, told))
        yield self._gauge(
            "jaxspark:acceptance_slope", "What a signal of a draft counts for.", slopes
        )
        yield self._gauge(
            "jaxspark:acceptance_intercept",
            "What its place in a block adds.",
            intercepts,
        )

    def _gauge(
        self,
        name: str,
        help: str,
        values: list[tuple[dict[str, str], float | None]],
    ) -> GaugeMetricFamily:
        """A gauge with some values, by what labels them beside the engine's own."""
        labels = [*self._labels, *values[0][0]]
        gauge = GaugeMetricFamily(name, help, labels=labels)
        for own, value in values:
            told = [*self._labels.values(), *own.values()]
            gauge.add_metric(told, _NAN if value is None else value)
        return gauge
