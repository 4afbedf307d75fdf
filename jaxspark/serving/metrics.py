"""Metrics for Prometheus, under the names that vLLM's dashboards and gateways read.

What only this engine has is under `jaxspark:`. "Drafts" of `vllm:spec_decode_*` are
rounds that drafted, and "draft tokens" are those that were verified: what a schedule
left out cost nothing.
"""

import collections
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from jaxspark.generation.completion import FinishReason
from jaxspark.generation.slots import Counts
from jaxspark.serving.engine import Engine
from jaxspark.serving.engine_gauges import EngineGauges
from jaxspark.serving.jobs import Job
from jaxspark.serving.observing import Observer

CONTENT_TYPE = CONTENT_TYPE_LATEST
# vLLM's buckets, in seconds and in tokens.
_FIRST = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10,
          20, 40, 80, 160, 640, 2560)  # fmt: skip
_BETWEEN = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20,
            40, 80)  # fmt: skip
_WHOLE = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
          1920, 7680)  # fmt: skip
_TOKENS = tuple(a * 10**e for e in range(6) for a in (1, 2, 5))
_CHOICES = (1, 2, 5, 10, 20)
_CALL = (1, *(8 * 2**n for n in range(12)))
_ROUNDS = tuple(2**n for n in range(7))
_LABELS = ("model_name", "engine")


class Metrics(Observer):
    """Counts what an engine does; `text` is what is scraped.

    Attributes:
      registry: of the metrics; each server has its own.
    """

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._prompt = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._output = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._drafts = self._counter(
            "vllm:spec_decode_num_drafts", "Rounds that drafted."
        )
        self._verified = self._counter(
            "vllm:spec_decode_num_draft_tokens", "Drafts verified."
        )
        self._accepted = self._counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafts accepted."
        )
        self._drafted = self._counter(
            "jaxspark:drafts", "Drafts, whether or not they were verified."
        )
        self._rounds = self._counter("jaxspark:rounds", "Rounds of all outputs.")
        self._by_place = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts accepted, by position in their block.",
            (*_LABELS, "position"),
            registry=self.registry,
        )
        self._ended = Counter(
            "vllm:request_success",
            "Outputs that ended, by reason.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._rejected = Counter(
            "vllm:admission_rejections",
            "Requests that were turned away.",
            (*_LABELS, "reason"),
            registry=self.registry,
        )
        self._preempted = self._counter(
            "vllm:num_preemptions", "Times that an output gave its pages up."
        )
        self._cached = self._counter(
            "vllm:prompt_tokens_cached", "Tokens of prompts that were cached."
        )
        self._queried = self._counter(
            "vllm:prefix_cache_queries", "Tokens of prompts that were looked up."
        )
        self._hits = self._counter(
            "vllm:prefix_cache_hits", "Those of them that were there."
        )
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "From arrival to first token.", _FIRST
        )
        self._between = self._histogram(
            "vllm:inter_token_latency_seconds", "Between tokens.", _BETWEEN
        )
        self._each = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between an output's tokens.",
            _BETWEEN,
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to end.", _WHOLE
        )
        self._queued = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to a slot.", _WHOLE
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "From a slot to first token.", _WHOLE
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "From first token to end.", _WHOLE
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "From a slot to end.", _WHOLE
        )
        self._prompts = self._histogram(
            "vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS
        )
        self._outputs = self._histogram(
            "vllm:request_generation_tokens", "Tokens of an output.", _TOKENS
        )
        self._budgets = self._histogram(
            "vllm:request_params_max_tokens", "Most tokens asked for.", _TOKENS
        )
        self._choices = self._histogram(
            "vllm:request_params_n", "Outputs of a prompt.", _CHOICES
        )
        self._call_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens read and decoded in a call.", _CALL
        )
        self._call_rounds = self._histogram(
            "jaxspark:rounds_per_call", "Rounds between two looks.", _ROUNDS
        )

    def watch(self, engine: Engine) -> None:
        """Shows an engine's state whenever somebody looks."""
        self.registry.register(EngineGauges(engine, self._labels))

    def text(self) -> bytes:
        """What is scraped."""
        return generate_latest(self.registry)

    def rejected(self, reason: str) -> None:
        """Counts it."""
        self._rejected.labels(**self._labels, reason=reason).inc()

    def taken_on(self, jobs: Sequence[Job]) -> None:
        """Counts its outputs, those of each prompt."""
        prompts = collections.Counter(id(job.demand.request.prompt) for job in jobs)
        for count in prompts.values():
            self._choices.observe(count)

    def admitted(self, job: Job) -> None:
        """Counts its prompt and its wait."""
        self._prompt.inc(job.prompt)
        self._prompts.observe(job.prompt)
        self._budgets.observe(job.request.params.max_new_tokens)
        self._queued.observe((job.admitted or job.arrived) - job.arrived)

    def prefilled(self, job: Job, cached: int) -> None:
        """Counts what was cached."""
        self._queried.inc(job.prompt)
        self._hits.inc(cached)
        self._cached.inc(cached)

    def called(self, tokens: int, rounds: int) -> None:
        """Counts both."""
        self._call_tokens.observe(tokens)
        self._call_rounds.observe(rounds)

    def preempted(self, count: int) -> None:
        """Counts them."""
        self._preempted.inc(count)

    def progressed(self, job: Job, tokens: int, seconds: float, counts: Counts) -> None:
        """Counts tokens, and times them; those of one call came together."""
        self._output.inc(tokens)
        if job.began is None:
            self._first.observe(seconds)
            if job.admitted is not None:
                self._prefill.observe(seconds - (job.admitted - job.arrived))
        else:
            for _ in range(tokens):
                self._between.observe(seconds / tokens)
        self._rounds.inc(counts.rounds)
        self._drafts.inc(counts.drafted)
        self._drafted.inc(counts.drafts)
        self._verified.inc(counts.verified)
        self._accepted.inc(sum(counts.accepted))
        for place, accepted in enumerate(counts.accepted):
            by_place = self._by_place.labels(**self._labels, position=str(place))
            by_place.inc(accepted)

    def ended(self, job: Job, reason: FinishReason) -> None:
        """Counts and times the whole output."""
        told = "abort" if reason == "cancelled" else reason
        self._ended.labels(**self._labels, finished_reason=told).inc()
        if job.admitted is None:
            return
        now = time.monotonic()
        self._whole.observe(now - job.arrived)
        self._inference.observe(now - job.admitted)
        self._outputs.observe(job.tokens)
        if job.began is not None and job.latest is not None:
            self._decode.observe(now - job.began)
            if job.tokens > 1:
                self._each.observe((job.latest - job.began) / (job.tokens - 1))

    def _counter(self, name: str, help: str) -> Counter:
        counter = Counter(name, help, _LABELS, registry=self.registry)
        return counter.labels(**self._labels)

    def _histogram(self, name: str, help: str, buckets: tuple) -> Histogram:
        histogram = Histogram(
            name, help, _LABELS, registry=self.registry, buckets=buckets
        )
        return histogram.labels(**self._labels)
