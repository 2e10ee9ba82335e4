"""Traces reach a collector of OpenTelemetry, as parts of the caller's traces, without names."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.service.server import Server

_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
_PARENT = "00f067aa0ba902b7"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A collector on this machine; its list has the bodies that it received."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield bodies
        server.shutdown()
        thread.join()


def test_each_request_is_a_span_of_the_callers_trace(
    collector: list[bytes], enrolled: Path, tmp_path: Path
) -> None:
    with Server(enrolled, tmp_path / "log") as server:
        parent = {"traceparent": f"00-{_TRACE}-{_PARENT}-01", "x-request-id": "mine"}
        assert server.client.get("/v1/people/1", headers=parent).status_code == 200
        assert server.client.get("/v1/people", params={"name": "Eden"}).status_code == 200
        assert server.client.get("/nothing").status_code == 404
    sent = [ExportTraceServiceRequest.FromString(body) for body in collector]
    spans = [
        span
        for one in sent
        for part in one.resource_spans
        for some in part.scope_spans
        for span in some.spans
    ]
    assert [span.name for span in spans] == ["GET /v1/people/{person}", "GET /v1/people", "GET unknown"]
    assert (spans[0].trace_id.hex(), spans[0].parent_span_id.hex()) == (_TRACE, _PARENT)
    told = {one.key: one.value for one in spans[0].attributes}
    assert told["http.response.status_code"].int_value == 200
    assert told["faceprint.request_id"].string_value == "mine"
    assert b"Eden" not in b"".join(collector)
    named = {one.key: one.value.string_value for one in sent[0].resource_spans[0].resource.attributes}
    assert named["service.name"] == "faceprint"
