"""A span for every answer, for OpenTelemetry, where an endpoint is configured.

Names follow the semantic conventions for generative AI; a client's W3C `traceparent`
is the span's parent. No text of requests or answers is in it. Configured is what
OpenTelemetry's own variables say: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER and so on.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

log = logging.getLogger(__name__)
# What is traced, and the conventions' word for it.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
}
# A stream whose client has left: no fault of the server.
GONE = "client_gone"
# Attributes by what the request's line in the log calls them.
ATTRIBUTES = {
    "request": "gen_ai.response.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "first_token_seconds": "gen_ai.response.time_to_first_chunk",
    "outputs": "gen_ai.request.choice.count",
    "stream": "gen_ai.request.stream",
    "error": "error.type",
}


class Tracing:
    """Makes spans.

    Attributes:
      provider: keeps and sends them.
    """

    def __init__(self, provider: "TracerProvider", model: str):
        """Spans of a provider.

        Args:
          provider: of OpenTelemetry.
          model: what clients call it.
        """
        from opentelemetry.trace.propagation import tracecontext

        self.provider = provider
        self._tracer = provider.get_tracer("jaxspark")
        self._propagator = tracecontext.TraceContextTextMapPropagator()
        self._model = model

    @classmethod
    def of_environment(
        cls, environment: Mapping[str, str], model: str
    ) -> "Tracing | None":
        """As the environment says; None where it names no endpoint."""
        names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        if not any(map(environment.get, names)):
            return None
        if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            log.warning("no traces: pip install 'jaxspark[otel]' (%s)", error)
            return None
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider, model)

    def begin(self, scope: Scope) -> "Span | None":
        """The span of a request; None where it is not for an answer."""
        from opentelemetry.trace import SpanKind

        operation = OPERATIONS.get(scope["path"])
        if operation is None or scope["method"] != "POST":
            return None
        return self._tracer.start_span(
            f"{operation} {self._model}",
            context=self._propagator.extract(dict(Headers(scope=scope))),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "jaxspark",
                "gen_ai.request.model": self._model,
                "gen_ai.response.model": self._model,
                "http.request.method": scope["method"],
                "url.path": scope["path"],
            },
        )

    def end(self, span: "Span", line: Mapping[str, Any]) -> None:
        """Ends a request's span with what its line in the log says."""
        from opentelemetry.trace import StatusCode

        span.set_attribute("http.response.status_code", line["status"])
        for name, attribute in ATTRIBUTES.items():
            if name in line:
                span.set_attribute(attribute, line[name])
        # A stream's errors come after its status.
        failed = line["status"] == 200 and line.get("error", GONE) != GONE
        if line["status"] >= 500 or failed:
            span.set_status(StatusCode.ERROR)
        span.end()
