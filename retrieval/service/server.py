"""The server: listens, and answers until a signal stops it; in this process, or as a worker of several."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, Final

import uvicorn
from starlette.concurrency import run_in_threadpool
from uvicorn.protocols.http.h11_impl import H11Protocol

from retrieval.errors import FaceprintError, InputError, RunError
from retrieval.service.app import application
from retrieval.service.service import Service
from retrieval.service.settings import Limits, is_loopback
from retrieval.service.tracing import Traced, tracer_provider
from retrieval.system.files import why

# Connections that wait to be accepted.
_BACKLOG: Final = 2048

# How often a process without requests follows the changes of the gallery.
_REFRESH_SECONDS: Final = 1.0

# The most bytes of a request's header.
_MAX_HEADER_BYTES: Final = 32 * 1024


@contextlib.contextmanager
def listening(host: str, port: int) -> Generator[list[socket.socket], None, None]:
    """Yields listening sockets, one for each address of a host, all with the same port.

    Args:
        host: a name or an IP address.
        port: 0 for any free port.

    Raises:
        InputError: the host is unknown, or the address is in use or not of this machine.
        RunError: the system refused.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(f"The host {host!a} is unknown; give a name or an IP address as `host`.") from error
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, _, _, _, place in dict.fromkeys(found):
            # The first socket has chosen the port where any is free.
            chosen = sockets[0].getsockname()[1] if sockets else port
            # asyncio sends small parts at once only where the protocol is stated, and not 0; else a response
            # waits 40 ms for the client's delayed acknowledgement of its header.
            one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            sockets.append(opened.enter_context(one))
            try:
                _bind(sockets[-1], (place[0], chosen, *place[2:]))
            except OSError as error:
                kind = RunError if isinstance(error, PermissionError) else InputError
                raise kind(
                    f"The service cannot listen on {host}, port {port}: {why(error)}; choose another `port`."
                ) from error
        yield sockets


def _bind(one: socket.socket, place: tuple[Any, ...]) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if one.family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.bind(place)
    one.listen(_BACKLOG)


def is_private(sockets: Sequence[socket.socket]) -> bool:
    """Returns whether sockets can be reached from this machine alone."""
    return all(is_loopback(one.getsockname()[0]) for one in sockets)


def address(sockets: Sequence[socket.socket], *, tls: bool) -> str:
    """Returns the address of the service for people and clients."""
    host, port = sockets[0].getsockname()[:2]
    scheme, name = "https" if tls else "http", f"[{host}]" if ":" in host else host
    return f"{scheme}://{name}:{port}"


def run(
    service: Service,
    sockets: Sequence[socket.socket],
    *,
    started: Callable[[], None],
    stop: int | None = None,
) -> None:
    """Answers requests until SIGTERM, Ctrl-C or the end of another process; finishes those in flight.

    Args:
        service: what answers; it is closed at the end.
        sockets: listening sockets; they are closed at the end.
        started: is called once connections are accepted.
        stop: a descriptor; when it can be read, the server stops as after SIGTERM.
    """
    limits, settings = service.limits, service.settings
    # What the process that changes the gallery does is part of a request to another one.
    provider = tracer_provider() if service.counts else None
    app = application(service)
    handshakes: set[_Protocol] = set()
    config = uvicorn.Config(
        app if provider is None else Traced(app, provider),
        http=lambda *args, **options: _Protocol(  # type: ignore[arg-type]
            *args, limits=limits, handshakes=handshakes, **options
        ),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # A process takes one connection each time it is woken, so that a burst is shared among the workers.
        backlog=1,
        timeout_keep_alive=max(1, int(limits.idle_seconds)),
        timeout_graceful_shutdown=max(1, int(limits.drain_seconds)),
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        ssl_certfile=settings.certfile,
        ssl_keyfile=settings.keyfile,
    )
    server = _Server(config, service, started, stop)
    try:
        server.run(sockets=list(sockets))
    finally:
        service.close()
        if provider is not None:
            provider.shutdown()


class _Server(uvicorn.Server):
    """A server that ends quietly after a signal: uvicorn's own would end the process by the signal."""

    def __init__(
        self, config: uvicorn.Config, service: Service, started: Callable[[], None], stop: int | None
    ) -> None:
        super().__init__(config)
        self._service = service
        self._started = started
        self._stop = stop
        self._refreshing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.config.is_ssl:
            _bound_handshakes(asyncio.get_running_loop(), self._service.limits.header_seconds)
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(_BACKLOG)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask)
        if self._stop is not None:
            loop.add_reader(self._stop, self._ask)
        self._refreshing = asyncio.create_task(self._refresh())
        self._started()

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            # A busy or damaged database is reported by the requests that need it.
            with contextlib.suppress(FaceprintError):
                await run_in_threadpool(self._service.refresh)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
        await super().shutdown(sockets)
        if self._service.forwarder is not None:
            await self._service.forwarder.close()

    def _ask(self) -> None:
        """Stops; asked again, without waiting for requests."""
        if self._stop is not None:
            asyncio.get_running_loop().remove_reader(self._stop)
        self.force_exit = self.should_exit
        self.should_exit = True
        self._service.begin_to_stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _bound_handshakes(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Bounds the time of a TLS handshake: the protocol hears only its end, and uvicorn has no option."""
    bounded = partial(loop.create_server, ssl_handshake_timeout=seconds)
    loop.create_server = bounded  # type: ignore[method-assign]


class _Protocol(H11Protocol):
    """uvicorn's protocol with a limit of connections, and of the time that a client lets the service wait.

    uvicorn limits the time between requests only: a client that sends a header byte by byte, or that does not
    read a long response, would keep its connection for ever. It also counts only connections that are made,
    which those in a TLS handshake are not yet.
    """

    def __init__(self, *arguments: Any, limits: Limits, handshakes: "set[_Protocol]", **options: Any) -> None:
        """Counts the connection as a handshake, under TLS; one too many is closed.

        Args:
            arguments, options: of uvicorn's protocol.
            limits: of the service.
            handshakes: the connections of this process that are in a TLS handshake.
        """
        super().__init__(*arguments, **options)
        self._limits = limits
        self._handshakes = handshakes
        self._slow: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        if self.config.is_ssl:
            self._begin_handshake()

    def _begin_handshake(self) -> None:
        # asyncio makes the protocol in the task that accepts the connection, and the task ends with the
        # handshake. The protocol itself hears nothing of one that fails.
        accepting = asyncio.current_task(self.loop)
        assert accepting is not None
        if self._counted() >= self._limits.connections:
            # It is not counted: a handshake that ends now would count it too, and be closed with it. The
            # task closes the connection only once it waits for the handshake, so it is cancelled after that.
            self.loop.call_soon(accepting.cancel)
            return
        self._handshakes.add(self)
        accepting.add_done_callback(lambda _: self._handshakes.discard(self))

    def _counted(self) -> int:
        return len(self.connections) + len(self._handshakes)

    def connection_made(self, transport: Any) -> None:
        self._handshakes.discard(self)
        super().connection_made(transport)
        if self._counted() > self._limits.connections:
            transport.abort()
            return
        self._slow = self.loop.call_later(self._limits.header_seconds, self._end_slow_header)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._is_read()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._slow is None and not self.transport.is_closing() and self.cycle.response_complete:
            seconds = self._limits.header_seconds + self._limits.idle_seconds
            self._slow = self.loop.call_later(seconds, self._end_slow_header)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._limits.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _stop_waiting(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _end_slow_header(self) -> None:
        self._slow = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
