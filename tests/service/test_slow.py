"""Clients that are slow, or too many, lose their connection, and the others are answered."""

import asyncio
import contextlib
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import uvicorn

from retrieval.service import server
from retrieval.service.settings import Limits

PROGRAM = """
import sys
from pathlib import Path
from retrieval.service import server
from retrieval.service.service import Service
from retrieval.service.settings import Limits, Settings

seconds = float(sys.argv[1])
limits = Limits(header_seconds=seconds, idle_seconds=1, body_seconds=0.5, read_seconds=0.5, connections=4)
with server.listening("127.0.0.1", 0) as sockets:
    folder, *certificate = map(Path, sys.argv[2:])
    settings = Settings(folder, limits=limits, certfile=certificate[0] if certificate else None)
    service = Service(settings, needs_token=False)
    server.run(service, sockets, started=lambda: print(server.address(sockets, tls=False), flush=True))
"""


@pytest.fixture(scope="module")
def impatient(enrolled: Path) -> Iterator[str]:
    """The address of a server with short limits."""
    with started(enrolled) as url:
        yield url


@contextmanager
def started(*arguments: Path, header_seconds: float = 0.5) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(header_seconds), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()
    assert process.returncode == 0


def connected(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    data = b""
    try:
        while more := connection.recv(65_536):
            data += more
    except ConnectionResetError:
        pass
    return data


def is_answered(url: str, verify: ssl.SSLContext | None = None) -> bool:
    if verify is not None:
        url = url.replace("http:", "https:")
    found = httpx.get(f"{url}/healthz", trust_env=False, timeout=60, verify=verify or True)
    return found.status_code == 200


def wait_until_answered(url: str, verify: ssl.SSLContext) -> None:
    """Asks again until the server has seen that another connection was closed."""
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            assert is_answered(url, verify)
            return
        time.sleep(0.1)
    raise AssertionError("the server has no room for a connection")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def certificate(authority: trustme.CA, tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1 with its key."""
    path = tmp_path / "certificate.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    return path


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """What a client needs to trust the certificate."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n"])
def test_a_header_that_does_not_end_loses_the_connection(sent: bytes, impatient: str) -> None:
    with connected(impatient) as connection:
        connection.sendall(sent)
        assert rest(connection) == b""
    assert is_answered(impatient)


def test_a_silent_tls_connection_is_closed_before_its_handshake_and_after_it(
    enrolled: Path, certificate: Path, trusting: ssl.SSLContext
) -> None:
    """asyncio itself would wait for 60 s for the handshake."""
    with started(enrolled, certificate) as url:
        for sent in (b"", b"\x16\x03\x01"):  # nothing, and the beginning of a handshake
            with connected(url) as connection:
                connection.settimeout(30)
                connection.sendall(sent)
                assert rest(connection) == b""
        with trusting.wrap_socket(connected(url), server_hostname="127.0.0.1") as connection:
            connection.settimeout(30)
            assert rest(connection) == b""


def test_tls_handshakes_that_do_not_end_count_as_connections(
    enrolled: Path, certificate: Path, trusting: ssl.SSLContext
) -> None:
    """The time of a handshake is long here: none of the connections is closed for being slow."""
    with started(enrolled, certificate, header_seconds=600) as url:
        with contextlib.ExitStack() as held:
            made = held.enter_context(trusting.wrap_socket(connected(url), server_hostname="127.0.0.1"))
            handshakes = [held.enter_context(connected(url)) for _ in range(3)]
            with connected(url) as one_more, pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
                trusting.wrap_socket(one_more, server_hostname="127.0.0.1")
            # A handshake that fails, and a client that goes, leave room for others.
            handshakes[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
            rest(handshakes[0])
            wait_until_answered(url, trusting)
            handshakes[1].close()
            wait_until_answered(url, trusting)
            assert made.getpeercert()
        wait_until_answered(url, trusting)


def test_a_tls_connection_that_is_one_too_many_takes_the_place_of_no_other(
    certificate: Path, trusting: ssl.SSLContext
) -> None:
    """The last message of the other handshake comes while the server refuses the new connection."""
    assert b" 200 " in asyncio.run(answer_beside_one_too_many(certificate, trusting))


async def answer_beside_one_too_many(certificate: Path, trusting: ssl.SSLContext) -> bytes:
    """Returns what a server of one connection answers to that one."""
    config = uvicorn.Config(answer_nothing, ssl_certfile=certificate, lifespan="off", log_config=None)
    config.load()
    state, handshakes = uvicorn.server.ServerState(), set[server._Protocol]()
    last: list[tuple[socket.socket, bytes]] = []

    def accept() -> server._Protocol:
        for client, message in last:
            client.sendall(message)
        return server._Protocol(config, state, {}, limits=Limits(connections=1), handshakes=handshakes)

    loop = asyncio.get_running_loop()
    listener = await loop.create_server(accept, "127.0.0.1", 0, ssl=config.ssl)
    address = listener.sockets[0].getsockname()
    async with listener:
        with socket.socket() as client, socket.socket() as one_more:
            received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = trusting.wrap_bio(received, to_send, server_hostname="127.0.0.1")
            for connection in (client, one_more):
                connection.setblocking(False)
            await loop.sock_connect(client, address)
            while not is_shaken(tls):
                await loop.sock_sendall(client, to_send.read())
                received.write(await loop.sock_recv(client, 65_536))
            tls.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            last.append((client, to_send.read()))
            await loop.sock_connect(one_more, address)
            with contextlib.suppress(ConnectionResetError):
                while data := await loop.sock_recv(client, 65_536):
                    received.write(data)
                    with contextlib.suppress(ssl.SSLWantReadError):
                        return tls.read(65_536)
    return b""


def is_shaken(tls: ssl.SSLObject) -> bool:
    """Whether the client's side of a handshake is done."""
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


async def answer_nothing(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_a_second_header_that_does_not_end_loses_the_connection_too(impatient: str) -> None:
    with connected(impatient) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\nGET /heal")
        assert rest(connection).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_body_that_does_not_end_is_refused(impatient: str) -> None:
    head = (
        "POST /v1/search HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\ncontent-length: 9\r\n\r\n"
    )
    with connected(impatient) as connection:
        connection.sendall(head.encode() + b"\r\nx")
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body-too-slow"' in answer
    assert b"connection: close" in answer.lower()


def test_a_client_that_does_not_read_loses_the_connection(impatient: str) -> None:
    query = b'{"face": 1, "k": 36, "full": true}' + b" " * 200 + b"\n"
    head = "POST /v1/search/bulk HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(impatient.rpartition(":")[2])))
        connection.sendall(f"{head}content-length: {len(query) * 100_000}\r\n\r\n".encode())
        # It sends for as long as the server reads, and the server reads for as long as it can send.
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012  any of the calls raises
            while True:
                connection.sendall(query * 10)
    assert is_answered(impatient)


def test_more_connections_than_the_limit_are_closed(impatient: str) -> None:
    held = [connected(impatient) for _ in range(4)]
    with connected(impatient) as one_more:
        assert rest(one_more) == b""
    for connection in held:
        assert rest(connection) == b""  # each sent no header
        connection.close()
    assert is_answered(impatient)
