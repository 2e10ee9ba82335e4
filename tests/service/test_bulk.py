"""Bulk searches: lines in, lines out, in their order, while others are still sent."""

import asyncio
import base64
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from retrieval.service.routes.bulk import Room
from retrieval.service.schemas import Answers, ErrorBody
from tests.service.server import Server
from tests.service.test_gate import accepts_connections, refused

LINES = {"content-type": "application/x-ndjson"}
PATH = "/v1/search/bulk"


def answers(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


def codes(lines: list[dict[str, Any]]) -> list[str]:
    return [line["error"]["code"] if "error" in line else "ok" for line in lines]


@pytest.mark.parametrize("chunk", [1, 7, 100_000])
def test_each_line_gets_the_answer_of_a_search_in_its_order(chunk: int, served: Server, faces: Path) -> None:
    image = base64.b64encode(sorted(faces.glob("*/*.jpg"))[4].read_bytes()).decode()
    queries: list[Any] = [
        {"image": image, "k": 2},
        {"face": 7},
        {"face": 99},
        {"k": 2},
        [],
        {"image": image, "by_person": True, "exclude_self": True},
        {"image": image[:80]},
        {"face": 7, "explain": True, "k": 1},
        {"face": 8, "k": 3},
    ]
    body = b"\n\r\n".join(json.dumps(query).encode() for query in queries)
    chunks = (body[start : start + chunk] for start in range(0, len(body), chunk))
    lines = answers(served.client.post(PATH, content=chunks, headers=LINES))
    assert codes(lines) == [
        "ok",
        "ok",
        "not-found",
        "invalid-argument",
        "bad-request",
        "ok",
        "unreadable-image",
        "ok",
        "ok",
    ]
    for query, line in zip(queries, lines, strict=True):
        if "error" in line:
            ErrorBody.model_validate(line)
        else:
            Answers.model_validate(line)
            alone = served.client.post("/v1/search", json=query).json()
            assert line["answers"] == alone["answers"]
            assert ("explanation" in line) == ("explain" in query)


def test_blank_lines_of_any_number_are_passed_over(served: Server) -> None:
    query = b'{"face": 7, "k": 1}'
    blank = b"\n" * 500_000 + b" \r\n\t\n" * 100_000 + b" " * 100_000 + b"\n"
    for body in (blank, blank + query + blank + query + blank, query + blank + query):
        found = answers(served.client.post(PATH, content=body, headers=LINES))
        assert codes(found) == ["ok"] * body.count(query)


def test_hundreds_of_queries_are_answered_in_order(served: Server) -> None:
    queries = (json.dumps({"face": 1 + number % 36, "k": 1}).encode() + b"\n" for number in range(500))
    lines = answers(served.client.post(PATH, content=queries, headers=LINES))
    assert [line["answers"][0]["query"] for line in lines] == [f"face {1 + n % 36}" for n in range(500)]


def test_no_line_is_no_answer(served: Server) -> None:
    assert answers(served.client.post(PATH, content=b"\n \n", headers=LINES)) == []
    assert answers(served.client.post(PATH, content=b"", headers=LINES)) == []


def test_another_type_is_refused(served: Server) -> None:
    refused(served.client.post(PATH, json={"face": 1}), 415, "unsupported-media-type")


class Conversation:
    """A bulk search whose lines are sent one by one."""

    def __init__(self, server: Server) -> None:
        self.connection = socket.create_connection(("127.0.0.1", server.port))
        head = "\r\n".join([f"POST {PATH} HTTP/1.1", "host: localhost", "transfer-encoding: chunked"])
        self.connection.sendall(f"{head}\r\ncontent-type: {LINES['content-type']}\r\n\r\n".encode())
        self.file = self.connection.makefile("rb")

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_error: object) -> None:
        self.file.close()
        self.connection.close()

    def send(self, data: bytes) -> None:
        self.connection.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yields what comes in chunks, of which each is a line, until the end of the response."""
        while self.file.readline().strip():
            pass
        while size := int(self.file.readline(), 16):
            yield json.loads(self.file.read(size))
            self.file.readline()
        self.file.readline()


def test_an_answer_comes_before_the_next_query_is_sent(served: Server) -> None:
    with Conversation(served) as conversation:
        lines = conversation.lines()
        for number in (3, 5, 8):
            conversation.send(json.dumps({"face": number, "k": 1}).encode() + b"\n")
            assert next(lines)["answers"][0]["query"] == f"face {number}"
        conversation.send(b'{"face": 9')  # the last line has no end
        conversation.send(b"}")
        conversation.connection.sendall(b"0\r\n\r\n")
        assert [line["answers"][0]["query"] for line in lines] == ["face 9"]
        # The connection goes on.
        conversation.connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert conversation.file.readline() == b"HTTP/1.1 200 OK\r\n"


def test_a_line_above_the_limit_ends_the_request_after_the_answers_before_it(
    enrolled: Path, tmp_path: Path
) -> None:
    with Server(enrolled, tmp_path / "log", "--max-body", 1) as server:
        body = b'{"face": 1}\n' + b"x" * 1_100_000 + b'\n{"face": 2}\n'
        lines = answers(server.client.post(PATH, content=body, headers=LINES))
        assert codes(lines) == ["ok", "body-too-large"]
        # All lines together may have more bytes than a body may have.
        body = (b'{"face": 1, "k": 1}' + b" " * 5000 + b"\n") * 300
        assert codes(answers(server.client.post(PATH, content=body, headers=LINES))) == ["ok"] * 300


def test_a_server_that_stops_says_so_in_the_last_line(enrolled: Path, tmp_path: Path) -> None:
    with Server(enrolled, tmp_path / "log") as server, Conversation(server) as conversation:
        lines = conversation.lines()
        conversation.send(b'{"face": 1}\n')
        first = next(lines)
        server.process.send_signal(signal.SIGTERM)
        while accepts_connections(server):
            time.sleep(0.01)
        conversation.send(b'{"face": 2}\n')
        assert codes([first, *lines]) == ["ok", "shutting-down"]
        conversation.connection.sendall(b"0\r\n\r\n")
        assert server.process.wait(60) == 0


def test_single_queries_go_before_those_in_bulk() -> None:
    from tests.service.test_batching import Batches

    batches = Batches(most=2)
    batches.worker.put(0)
    batches.begun.wait()
    for number in (10, 11, 12):
        batches.worker.put(number, bulk=True)
    for number in (1, 2, 3):
        batches.worker.put(number)
    batches.go.set()
    batches.worker.close()
    assert batches.done == [[0], [1, 2], [3, 10], [11, 12]]


def test_lines_wait_until_those_before_them_are_answered_where_they_are_long() -> None:
    """A request holds as many bytes of queries as a body may have, or one query."""

    async def taken() -> list[bool]:
        room = Room(10)
        await room.take(12)
        second, third = (asyncio.ensure_future(room.take(6)) for _ in range(2))
        seen = []
        for size in (12, 6):
            await asyncio.sleep(0)
            seen += [second.done(), third.done()]
            room.give_back(size)
            await asyncio.gather(second if size == 12 else third)
        return [*seen, third.done()]

    assert asyncio.run(taken()) == [False, False, True, False, True]


def test_long_lines_are_answered_in_their_order(enrolled: Path, tmp_path: Path) -> None:
    """Each takes more than half of what a request may hold."""
    queries: list[Any] = [{"face": number} if number % 2 else {} for number in range(1, 37)]
    body = "".join(f"{json.dumps(query):<{600_000}}\n" for query in queries).encode()
    with Server(enrolled, tmp_path / "log", "--max-body", 1) as server:
        lines = answers(server.client.post(PATH, content=body, headers=LINES))
    assert codes(lines) == ["ok", "invalid-argument"] * 18
