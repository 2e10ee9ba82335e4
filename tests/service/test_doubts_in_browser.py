"""The page of doubts in a browser: an audit, answers by key, undo, focus, what is said, and axe."""

from collections.abc import Iterator
from typing import Any

import pytest

from retrieval import ModelBundle, verify
from tests.service.pages import HOSTILE, doubtful
from tests.service.server import Server
from tests.service.test_doubts import page as listed
from tests.service.test_page_in_browser import axe, chromium, faults_of, opened, press, until

Page = Any

__all__ = ["axe", "chromium"]  # pytest finds the fixtures by their names

_FOCUSED = "document.activeElement.id"


@pytest.fixture(scope="module")
def doubted(bundle: ModelBundle, chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for a gallery that was audited from the page."""
    folder = tmp_path_factory.mktemp("doubted-browser")
    with Server(doubtful(folder / "g", bundle), folder / "log") as server:
        page, wrong = opened(chromium, server.url)
        page.goto("/doubts")
        page.click("text=Audit the gallery")
        # The page shows the doubts by itself when the audit ends.
        page.wait_for_selector("#doubt")
        page.context.close()
        assert wrong == []
        yield server
    assert "Traceback" not in server.log.read_text()
    assert not verify(folder / "g").findings


@pytest.fixture
def page(chromium: Any, doubted: Server) -> Iterator[Page]:
    """A window on the page of doubts; nothing in it was blocked, failed, or came from elsewhere."""
    shown, wrong = opened(chromium, doubted.url)
    shown.goto("/doubts")
    yield shown
    shown.context.close()
    assert wrong == []


def said(page: Page, text: str) -> None:
    """Waits until a text is said to those who do not see the page."""
    page.wait_for_selector(f"[data-said]:has-text('{text}')", state="attached")


def confirms(page: Page) -> str:
    """The doubt that is shown, by the address that confirms it."""
    address: str = page.locator(".verdict form").first.get_attribute("action")
    return address.split("/")[2]


def test_doubts_are_answered_skipped_and_undone_by_keys(page: Page, doubted: Server) -> None:
    first, second, third = (one["id"] for one in listed(doubted, limit=3)["doubts"])
    left = int(page.locator(".tabs b").first.inner_text())
    press(page, "n")
    said(page, f"Dismissed. {left - 1} doubts left.")
    assert (confirms(page), page.evaluate(_FOCUSED)) == (second, "question")
    press(page, "s")
    until(page, f"document.querySelector('.verdict form').action.includes('{third}')")
    assert page.evaluate(_FOCUSED) == "question"
    page.goto(f"/doubts?answered={first}")
    press(page, "u")
    said(page, f"The answer was taken back. {left} doubts left.")
    assert confirms(page) == first
    assert listed(doubted, state="dismissed")["doubts"] == []
    # Keys can be turned off, and stay off.
    page.uncheck("[data-keys] input")
    page.reload()
    press(page, "n")
    assert not page.is_checked("[data-keys] input")
    assert not page.locator(".verdict kbd").first.is_visible()
    page.check("[data-keys] input")
    assert (confirms(page), len(listed(doubted, state="dismissed")["doubts"])) == (first, 0)


def test_a_confirmation_gives_the_photo_away_and_undo_gives_it_back(page: Page, doubted: Server) -> None:
    [doubt] = [
        one
        for one in listed(doubted, limit=500)["doubts"]
        if one["kind"] == "anothers-photo" and one["people"][1]["identity"] == HOSTILE
    ]
    page.goto(f"/doubts?doubt={doubt['id']}")
    assert HOSTILE in page.locator("#question").inner_text()
    press(page, "y")
    said(page, "the photo was given to")
    [face] = doubt["act"]["faces"]
    assert doubted.client.get(f"/v1/faces/{face}").json()["identity"] == HOSTILE
    page.click("button:has-text('Undo')")
    said(page, "The answer was taken back.")
    assert doubted.client.get(f"/v1/faces/{face}").json()["identity"] == "P03"


def test_a_refusal_is_said_beside_the_doubt(page: Page, doubted: Server) -> None:
    [first] = listed(doubted, limit=1)["doubts"]
    page.evaluate("document.querySelector('meta[name=form-token]').content = 'x'")
    press(page, "n")
    page.wait_for_selector("#doubt-problem [role=alert]:has-text('of another session')")
    assert confirms(page) == first["id"]


def test_a_decided_doubt_is_reopened_without_javascript(chromium: Any, doubted: Server) -> None:
    [first] = listed(doubted, limit=1)["doubts"]
    page, wrong = opened(chromium, doubted.url, java_script_enabled=False)
    page.goto("/doubts")
    page.click(".verdict button >> nth=1")
    page.wait_for_selector(".note.done:has-text('Dismissed.')")
    page.click("text=Dismissed 1")
    page.click("button:has-text('Reopen')")
    page.wait_for_selector(".note.done:has-text('The answer was taken back.')")
    page.click("text=Decide it now")
    page.wait_for_selector("#doubt")
    assert confirms(page) == first["id"]
    page.context.close()
    assert wrong == []


@pytest.mark.parametrize("options", [{"color_scheme": "dark"}, {"viewport": {"width": 360, "height": 740}}])
def test_axe_finds_no_serious_fault_and_nothing_is_wider_than_a_telephone(
    options: dict[str, Any], axe: str, chromium: Any, doubted: Server
) -> None:
    page, wrong = opened(chromium, doubted.url, **options)
    kinds = {one["kind"]: one["id"] for one in listed(doubted, limit=500)["doubts"]}
    found, wide = [], []
    for address in (*(f"/doubts?doubt={number}" for number in kinds.values()), "/doubts/confirmed"):
        page.goto(address)
        # The faces of this gallery have no files, which a box says in place of each.
        until(page, "!document.querySelector('.sides figure > a > img')")
        found += faults_of(page, axe)
        wide.append(page.evaluate("document.documentElement.scrollWidth - innerWidth"))
    page.context.close()
    assert found == []
    assert (wrong, max(wide)) == ([], 0)
