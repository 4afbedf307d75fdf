"""Every answer has a span by the conventions for generative AI, and no text in it."""

import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jaxspark.serving.tracing import Tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a secret"}],
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture
def spans(exporter):
    """The spans of what a test asks."""
    if exporter is None:
        pytest.skip(
            "OpenTelemetry's SDK is not installed: pip install 'jaxspark[test]'"
        )
    exporter.clear()

    def ended(count=1):
        late = time.monotonic() + 10
        while len(exporter.get_finished_spans()) < count and time.monotonic() < late:
            time.sleep(0.01)
        return exporter.get_finished_spans()

    return ended


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_a_span_below_its_client_s(http, spans, stream):
    answer = http.post(
        "/v1/chat/completions", json=CHAT | {"stream": stream, "n": 2}, headers=HEADERS
    )
    assert answer.status_code == 200
    [span] = spans()
    assert span.name == "chat tiny" and span.kind.name == "SERVER"
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    told = dict(span.attributes)
    assert 0 < told.pop("gen_ai.response.time_to_first_chunk") < 60
    assert told.pop("gen_ai.response.id").startswith("chatcmpl-")
    assert told.pop("gen_ai.usage.input_tokens") > 8
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "jaxspark",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": stream,
        "gen_ai.usage.output_tokens": 16,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
    }
    assert span.status.is_unset
    assert "secret" not in span.to_json()


def test_a_wrong_request_has_its_error_and_others_have_no_span(http, spans):
    for path in ("/health", "/metrics", "/v1/models"):
        http.get(path)
    http.post("/tokenize", json={"prompt": "abc"})
    wrong = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "n": 99})
    assert wrong.status_code == 400
    [span] = spans()
    assert span.name == "text_completion tiny" and span.parent is None
    assert span.attributes["error.type"] == "invalid_request_error"
    assert span.attributes["http.response.status_code"] == 400


def test_spans_go_where_the_environment_says(monkeypatch):
    """The exporter itself reads OpenTelemetry's variables."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    sent = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["Content-Length"])
            sent.append((self.path, self.rfile.read(size)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        tracing = Tracing.of_environment(os.environ, "tiny")
        scope = {"path": "/v1/completions", "method": "POST", "headers": []}
        tracing.end(tracing.begin(scope | {"type": "http"}), {"status": 200})
        assert tracing.provider.force_flush()
        collector.shutdown()
    [(path, body)] = sent
    assert path == "/v1/traces" and b"text_completion tiny" in body


def test_nothing_is_traced_where_no_endpoint_is_configured(monkeypatch, caplog):
    assert Tracing.of_environment({}, "tiny") is None
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}
    off = endpoint | {"OTEL_SDK_DISABLED": "true"}
    assert Tracing.of_environment(off, "tiny") is None and not caplog.records
    exporter = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, exporter, None)
    assert Tracing.of_environment(endpoint, "tiny") is None
    assert "pip install 'jaxspark[otel]'" in caplog.text
