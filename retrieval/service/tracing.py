"""Traces of requests by OpenTelemetry, if its packages are installed and an address to send them to is set.

The variables are those of OpenTelemetry: OTEL_EXPORTER_OTLP_ENDPOINT switches traces on, and its SDK reads
the others, such as OTEL_SERVICE_NAME and OTEL_TRACES_SAMPLER.
"""

import logging
import os
from http import HTTPStatus
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOG: Final = logging.getLogger("faceprint.service")

_ADDRESSES: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Traced:
    """An ASGI application with a span for each request, part of the caller's trace if the request names one.

    A span has the route, the method, the status and the id of a request: no name, and no path of a photo.
    """

    def __init__(self, app: ASGIApp, provider: Any) -> None:
        """Wraps an application.

        Args:
            app: the application.
            provider: makes and sends the spans; see `tracer_provider`.
        """
        self._app = app
        self._provider = provider

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        from opentelemetry import propagate, trace

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = int(HTTPStatus.INTERNAL_SERVER_ERROR)

        async def observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        tracer = self._provider.get_tracer("faceprint")
        context = propagate.extract(Headers(scope=scope))
        with tracer.start_as_current_span("request", context=context, kind=trace.SpanKind.SERVER) as span:
            try:
                await self._app(scope, receive, observed)
            finally:
                # The route, not the path: a path may hold a person's name.
                route = getattr(scope.get("route"), "path", "unknown")
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.request.method", scope["method"])
                span.set_attribute("http.route", route)
                span.set_attribute("http.response.status_code", status)
                span.set_attribute("faceprint.request_id", scope["state"]["request_id"])
                if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    span.set_status(trace.StatusCode.ERROR)


def tracer_provider() -> Any:
    """Returns what makes spans and sends them from a thread of its own; None where that is not asked for."""
    if not any(map(os.environ.get, _ADDRESSES)):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        _LOG.warning(
            "no traces are sent: %s is not installed; pip install 'faceprint[tracing]'", error.name or error
        )
        return None
    # OTEL_SERVICE_NAME has precedence.
    named = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or "faceprint"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
