"""The rate limit: a second's requests at once, then as many as the rate, for each caller."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.errors import InputError
from retrieval.service import rate_limit
from retrieval.service.rate_limit import RateLimit
from retrieval.service.settings import Limits
from tests.service.server import Server


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_second_of_requests_is_taken_at_once_and_the_next_when_there_is_room() -> None:
    clock = Clock()
    limit = RateLimit(4, clock=clock)
    assert [limit.wait("a") for _ in range(6)] == [0, 0, 0, 0, 0.25, 0.25]
    assert limit.wait("b") == 0
    clock.now = 0.125
    assert limit.wait("a") == 0.125
    clock.now = 0.25
    assert [limit.wait("a"), limit.wait("a")] == [0, 0.25]


def test_a_rate_below_one_takes_one_request() -> None:
    limit = RateLimit(0.1, clock=Clock())
    assert [limit.wait("a"), limit.wait("a")] == [0, 10]


@given(st.floats(0.1, 100), st.lists(st.floats(0, 0.5), max_size=200))
def test_no_caller_gets_more_than_the_rate_and_a_second(rate: float, pauses: list[float]) -> None:
    clock = Clock()
    limit = RateLimit(rate, clock=clock)
    taken = 0
    for pause in pauses:
        clock.now += pause
        taken += limit.wait("a") == 0
    assert taken <= max(1, rate) + clock.now * rate + 1e-6


def test_callers_that_are_gone_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "_MAX_CALLERS", 10)
    clock = Clock()
    limit = RateLimit(2, clock=clock)
    for number in range(100):
        clock.now += 1
        assert limit.wait(str(number)) == 0
    assert len(limit._buckets) <= 11


def test_the_service_says_when_to_come_again(enrolled: Path, tmp_path: Path) -> None:
    with Server(enrolled, tmp_path / "log", "--max-rate", 0.001) as server:
        assert server.client.get("/v1/info").status_code == 200
        refused = server.client.get("/v1/info")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too-many-requests")
        assert 0 < int(refused.headers["retry-after"]) <= 1000
        assert server.client.get("/healthz").status_code == 200


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="`rate` is 0; it must be above 0"):
        Limits(rate=0)
