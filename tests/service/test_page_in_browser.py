"""The page in a browser, by mouse, by keyboard and on a telephone; axe looks for what keeps people out.

`FACEPRINT_CHROMIUM` names a Chromium where `PATH` has none; `FACEPRINT_AXE` the file axe.min.js of axe-core.
"""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from retrieval import Gallery, ModelBundle, verify
from retrieval.database.records import NewFace
from retrieval.service import tokens
from retrieval.service.tokens import Scope
from tests.cli.test_faces import aligned
from tests.detectors import save
from tests.service.pages import HOSTILE, first_face, person
from tests.service.server import Server
from tests.service.test_enroll_face import asked

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Page = Any

__all__ = ["aligned", "asked"]  # pytest finds the fixtures by their names

NAMES = ("Ada", "Bo", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal")
_MILLISECONDS = 60_000

_GIVE = """([encoded, how]) => {
  const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "given.png", {type: "image/png"}));
  const event = how === "paste"
    ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true})
    : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
  document.body.dispatchEvent(event);
}"""


_FOCUSED = """() => {
  const one = document.activeElement;
  const shown = one.matches("input[type=file]") ? one.closest("label") : one;
  return [`${one.textContent} ${one.ariaLabel} ${one.placeholder}`, getComputedStyle(shown).outlineStyle];
}"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of drawn people, each in two places of the photo, and one of two faces."""
    folder = tmp_path_factory.mktemp("library") / "photos"
    for number, name in enumerate((*NAMES, HOSTILE)):
        save(folder / name / f"{name} left.png", (320, 200), [(64, 64, 16)], seed=number)
        save(folder / name / f"{name} right.png", (320, 200), [(224, 96, 16)], seed=number)
    save(folder.parent / "two.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=1)
    (folder.parent / "broken.jpg").write_bytes(b"\xff\xd8\xff, and then nothing")
    return folder


@pytest.fixture(scope="module")
def browsed(aligned: ModelBundle, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for a calibrated gallery that tests change; each test has people of its own."""
    folder = tmp_path_factory.mktemp("browsed")
    with Gallery.create(folder / "people.gallery", aligned) as gallery:
        gallery.enroll((path, path.parent.name) for path in sorted(photos.glob("*/*.png")))
        gallery.calibrate(0.5)
    with Server(folder / "people.gallery", folder / "log", "--sources", photos) as server:
        yield server
    assert "Traceback" not in server.log.read_text()
    assert not verify(folder / "people.gallery").findings


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("FACEPRINT_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium; install it, or name it in FACEPRINT_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root, nor in most containers; only our pages are opened.
        browser = playwright.chromium.launch(
            executable_path=found,
            args=[
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
            ],
        )
        yield browser
        browser.close()


def opened(chromium: Any, url: str, **options: Any) -> tuple[Any, list[str]]:
    """A window of its own, and a list that gets what went wrong in it."""
    context = chromium.new_context(base_url=url, **options)
    context.set_default_timeout(_MILLISECONDS)
    context.set_default_navigation_timeout(_MILLISECONDS)
    wrong: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda one: wrong.append(one.url) if _is_foreign(one.url, url) else None)
    # A refused form is logged as an error too; a resource that the policy blocks says so.
    page.on("console", lambda one: wrong.append(one.text) if "Content Security" in one.text else None)
    return page, wrong


def _is_foreign(address: str, url: str) -> bool:
    return urlsplit(address).scheme not in ("data", "blob") and not address.startswith(url)


@pytest.fixture
def page(chromium: Any, browsed: Server) -> Iterator[Page]:
    """A window on the page; nothing in it was blocked, failed, or came from elsewhere."""
    shown, wrong = opened(chromium, browsed.url)
    yield shown
    shown.context.close()
    assert wrong == []


def until(page: Page, script: str) -> None:
    """Waits until an expression is true; Playwright's own way needs what the policy of the page forbids."""
    for _ in range(_MILLISECONDS // 50):
        if page.evaluate(script):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{script} is never true")


def choose(page: Page, photo: Path) -> None:
    page.set_input_files("#ask input[type=file]", photo)


def test_every_face_of_a_photo_gets_a_box_a_name_and_its_closest_photos(page: Page, photos: Path) -> None:
    page.goto("/")
    choose(page, photos.parent / "two.png")
    page.wait_for_selector(".answer")
    assert page.locator(".boxes a").count() == 2
    assert page.locator("article.face").count() == 2
    page.wait_for_selector("[data-said]:text-matches('^2 faces: ')", state="attached")
    width, height = (page.locator(".frame").bounding_box()[side] for side in ("width", "height"))
    assert width / height == pytest.approx(480 / 200, rel=0.02)
    first = page.locator(".boxes a rect").nth(1).bounding_box()
    frame = page.locator(".frame").bounding_box()
    # A mark of 16 pixels at (64, 64) is the middle of a face of 96 pixels.
    assert (first["x"] - frame["x"]) / width == pytest.approx((72 - 48) / 480, abs=0.01)
    assert first["width"] / width == pytest.approx(96 / 480, abs=0.02)
    until(page, "[...document.querySelectorAll('.matches img')].every((one) => one.complete)")
    assert page.evaluate("[...document.querySelectorAll('.matches img')].every((one) => one.naturalWidth)")
    page.locator(".boxes a").nth(1).click()
    assert page.url.endswith("#face-2")
    # The next photo takes the place of this one.
    choose(page, photos / "Ada" / "Ada left.png")
    until(page, "document.querySelectorAll('article.face').length === 1")
    assert page.locator("article.face.named h2").inner_text() == "Ada"


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_a_photo_is_pasted_or_dropped(how: str, page: Page, photos: Path) -> None:
    page.goto("/")
    content = base64.b64encode((photos / "Bo" / "Bo left.png").read_bytes()).decode()
    page.evaluate(_GIVE, [content, how])
    page.wait_for_selector(".answer")
    assert "given.png" in page.locator("figcaption").inner_text()


def test_a_photo_that_is_chosen_during_a_search_is_searched_for_instead(page: Page, photos: Path) -> None:
    page.goto("/")
    page.route("**/search", lambda route: None, times=1)  # the first search gets no answer
    with page.expect_request("**/search"):
        choose(page, sorted(photos.glob("*/*"))[0])
    choose(page, photos.parent / "two.png")
    page.wait_for_selector(".answer")
    assert page.evaluate("document.querySelector('#ask input').files.length") == 0


def test_the_camera_takes_a_photo(page: Page) -> None:
    """The camera of this browser shows a moving disk, in which there is no face."""
    page.goto("/")
    page.click("text=Use the camera")
    until(page, "document.querySelector('video').videoWidth > 0")
    page.click("text=Take the photo")
    page.wait_for_selector("#answers .note")
    assert "no face" in page.locator("#answers").inner_text()
    assert not page.locator("#camera").is_visible()


def test_a_photo_that_cannot_be_read_is_a_sentence(page: Page, photos: Path) -> None:
    page.goto("/")
    choose(page, photos.parent / "broken.jpg")
    page.wait_for_selector("#answers [role=alert]")
    assert "cannot be read" in page.locator("#answers").inner_text()


def test_a_person_is_found_renamed_and_merged(page: Page, browsed: Server) -> None:
    page.goto("/people")
    page.fill("input[type=search]", "cy")
    until(page, "document.querySelectorAll('.wall li').length === 1")
    page.click(".wall a")
    page.click("summary:has-text('Rename')")
    page.fill("details[open] input[name=identity]", "Cyd")
    page.click("details[open] button")
    page.wait_for_selector("h1:has-text('Cyd')")
    assert "formerly Cy" in page.locator("main").inner_text()
    page.click("summary:has-text('Merge')")
    page.fill("details[open] input[name=identity]", "De")
    page.wait_for_selector("#names option[value=Dee]", state="attached")
    page.fill("details[open] input[name=identity]", "Dee")
    page.click("details[open] button")
    assert "who then has 4 photos" in page.locator("main").inner_text()
    page.click("button:has-text('Merge')")
    page.wait_for_selector("h1:has-text('Dee')")
    assert person(browsed, "Cyd") == person(browsed, "Cy") == person(browsed, "Dee")
    page.click("button:has-text('Undo')")
    page.wait_for_selector("h1:has-text('The merge is undone')")
    page.click("main a:has-text('Cyd')")
    page.wait_for_selector("h1:has-text('Cyd')")
    assert "2 photos, formerly Cy" in page.locator("main").inner_text()


def test_chosen_photos_are_given_to_another_person(page: Page, browsed: Server) -> None:
    page.goto(f"/people/{person(browsed, 'Eve')}")
    assert not page.locator(".assign").is_visible()
    page.check(".photos li:first-child input")
    assert "1 photo" in page.locator(".assign").inner_text()
    page.fill(".assign input", "Evelyn")
    page.click("text=Give to this person")
    page.wait_for_selector("h1:has-text('Evelyn')")
    page.check(".photos li:first-child input")
    page.click("text=They are nobody")
    page.wait_for_selector("h1:has-text('Faces without a name')")
    assert page.locator(".photos li").count() == 1


def test_a_person_is_forgotten_with_a_receipt(page: Page, browsed: Server) -> None:
    number = person(browsed, "Flo")
    page.goto(f"/people/{number}")
    page.click("text=Forget")
    page.fill("input[name=identity]", "Flora")
    page.click("button:has-text('Forget')")
    page.wait_for_selector("[role=alert]:has-text('nothing was erased')")
    page.fill("input[name=identity]", "Flo")
    page.click("button:has-text('Forget')")
    page.wait_for_selector("h1:has-text('Forgotten')")
    assert "2 faces were erased" in page.locator("main").inner_text()
    assert browsed.client.get(f"/v1/people/{number}").status_code == 404


def test_photos_are_enrolled_and_a_rejected_one_can_be_tried_again(
    page: Page, browsed: Server, photos: Path, tmp_path: Path
) -> None:
    good = [
        save(tmp_path / f"{number}.png", (320, 200), [(64, 64, 16)], seed=50 + number) for number in (1, 2)
    ]
    page.goto("/enroll")
    page.set_input_files("#enroll input[multiple]", good)
    assert "Type whose the photos are" in page.locator("#enroll [role=alert]").inner_text()
    page.fill("#enroll input[name=identity]", "Ira")
    page.set_input_files("#enroll input[multiple]", [*good, photos.parent / "broken.jpg"])
    page.wait_for_selector("text=3 of 3 photos: ")
    page.wait_for_selector("[data-retry]:visible")
    assert "broken.jpg The photo was rejected" in page.locator("[data-rejected]").inner_text()
    page.click("[data-retry]")
    page.wait_for_selector("[data-retry]:visible")
    assert page.locator("[data-rejected] li").count() == 1
    assert browsed.client.get(f"/v1/people/{person(browsed, 'Ira')}").json()["faces"] == 2


def test_a_folder_of_the_machine_is_enrolled_with_progress(page: Page) -> None:
    page.goto("/enroll")
    page.fill("input[name=source]", "Gus")
    page.select_option("select", "none")
    page.click("text=Enroll the folder")
    page.wait_for_selector(".job .state.done")
    assert "2 already-known" in page.locator(".job").inner_text()
    assert page.locator(".job button").count() == 0


def test_hostile_names_stay_text(page: Page, browsed: Server, photos: Path) -> None:
    number, face = person(browsed, HOSTILE), first_face(browsed, HOSTILE)
    for address in ("/people", f"/people/{number}", f"/people/{number}/forget", f"/faces/{face}"):
        page.goto(address)
        page.wait_for_load_state("networkidle")
        assert HOSTILE in page.locator("main").inner_text()
    page.goto("/")
    choose(page, photos / HOSTILE / f"{HOSTILE} left.png")
    page.wait_for_selector(".answer")
    assert HOSTILE in page.locator("article.face h2").inner_text()


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def focus_on(page: Page, text: str) -> None:
    """Goes on with the Tab key to what has a text; it must be reached, and its focus be seen."""
    for _ in range(60):
        press(page, "Tab")
        name, outline = page.evaluate(_FOCUSED)
        if text in name:
            assert outline != "none"
            return
    raise AssertionError(f"the Tab key does not lead to {text}")


def test_the_keyboard_is_enough(page: Page, browsed: Server) -> None:
    page.goto("/")
    press(page, "Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    press(page, "Enter")
    focus_on(page, "Use the camera")
    page.goto("/")
    focus_on(page, "People")
    press(page, "Enter")
    page.wait_for_selector(".wall")
    focus_on(page, "Find by name")
    page.keyboard.type("hal")
    until(page, "document.querySelectorAll('.wall li').length === 1")
    focus_on(page, "Hal")
    press(page, "Enter")
    page.wait_for_selector("h1:has-text('Hal')")
    focus_on(page, "Rename")
    press(page, "Enter", "Tab")
    press(page, "Control+a")
    page.keyboard.type("Halina")
    press(page, "Enter")
    page.wait_for_selector("h1:has-text('Halina')")
    focus_on(page, "Choose photo")
    press(page, "Space")
    assert page.locator(".assign").is_visible()
    assert person(browsed, "Halina") == person(browsed, "Hal")


def _addresses(server: Server) -> tuple[str, ...]:
    number, face = person(server, "Ada"), first_face(server, "Ada")
    of_person = (f"/people/{number}", f"/people/{number}/forget", f"/people/{number}/merge?identity=Bo")
    return ("/", "/people", *of_person, f"/faces/{face}", "/enroll", "/health", "/nothing")


def test_nothing_is_wider_than_a_telephone(chromium: Any, browsed: Server, photos: Path) -> None:
    page, wrong = opened(chromium, browsed.url, viewport={"width": 360, "height": 740})
    wide = "document.documentElement.scrollWidth"
    for address in _addresses(browsed):
        page.goto(address)
        assert (address, page.evaluate(wide)) == (address, 360)
    page.goto("/")
    choose(page, photos.parent / "two.png")
    page.wait_for_selector(".answer")
    assert page.evaluate(wide) == 360
    page.context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def axe() -> str:
    """The program that looks for faults of accessibility."""
    path = os.environ.get("FACEPRINT_AXE", "")
    if not Path(path).is_file():
        pytest.skip("FACEPRINT_AXE names no axe.min.js; .ci/run fetches it where there is npm")
    return Path(path).read_text()


def faults_of(page: Page, axe: str) -> list[str]:
    """What axe finds wrong with the page that is shown: serious and critical faults."""
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{page.url}: {one['id']}: {one['nodes'][0]['html']} {one['nodes'][0]['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(
    scheme: str, axe: str, chromium: Any, browsed: Server, photos: Path
) -> None:
    page, wrong = opened(chromium, browsed.url, color_scheme=scheme)

    found = []
    for address in _addresses(browsed):
        page.goto(address)
        found += faults_of(page, axe)
    page.goto("/")
    choose(page, photos.parent / "two.png")
    page.wait_for_selector(".answer")
    found += faults_of(page, axe)
    page.goto("/enroll")
    page.fill("#enroll input[name=identity]", "Jo")
    page.set_input_files("#enroll input[multiple]", [photos.parent / "broken.jpg"])
    page.wait_for_selector("[data-retry]:visible")
    found += faults_of(page, axe)
    page.context.close()
    assert json.dumps(found) == "[]"
    assert wrong == []


@pytest.fixture(scope="module")
def crowded(aligned: ModelBundle, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for a gallery with tokens: Ada, 130 people with a face each, and one with 130 faces."""
    folder = tmp_path_factory.mktemp("crowded")
    names = [f"P {number:03}" for number in range(130)] + ["Zoe"] * 130
    faces = [NewFace(name, None, f"{number:064x}") for number, name in enumerate(names)]
    with Gallery.create(folder / "people.gallery", aligned) as gallery:
        gallery.enroll([(photos / "Ada" / "Ada left.png", "Ada")])
        dimension = gallery.bundle.dimension
        gallery.enroll_vectors(faces, np.random.default_rng(0).normal(size=(len(faces), dimension)))
    (folder / "token").write_text(tokens.create(folder / "people.gallery", "door-1", Scope.READ)[0])
    with Server(folder / "people.gallery", folder / "log") as server:
        yield server
    assert "Traceback" not in server.log.read_text()


def sign_in(page: Page, secret: str) -> None:
    page.fill("input[name=token]", secret)
    page.click("main button")


def scroll_to_the_end(page: Page, selector: str, number: int) -> None:
    """Scrolls until there are so many of something, and nothing more to load."""
    for _ in range(_MILLISECONDS // 50):
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        if page.locator(selector).count() == number and page.locator(".more").count() == 0:
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"there are {page.locator(selector).count()} of {selector}")


def test_people_and_photos_follow_while_one_scrolls(chromium: Any, crowded: Server) -> None:
    page, wrong = opened(chromium, crowded.url)
    page.goto("/people")
    sign_in(page, (crowded.log.parent / "token").read_text())
    page.wait_for_selector(".wall")
    assert page.locator(".person").count() < 132
    scroll_to_the_end(page, ".person", 132)
    page.click("text=Zoe")
    page.wait_for_selector("h1:has-text('Zoe')")
    scroll_to_the_end(page, ".photos li", 130)
    page.context.close()
    assert wrong == []


def test_a_person_signs_in_once_and_out(chromium: Any, crowded: Server, photos: Path) -> None:
    gallery = crowded.log.parent / "people.gallery"
    secret, _ = tokens.create(gallery, "door-2", Scope.READ)
    page, wrong = opened(chromium, crowded.url)
    page.goto("/people/1")
    sign_in(page, "fpt_wrong")
    page.wait_for_selector("[role=alert]")
    sign_in(page, secret)
    page.wait_for_selector("h1:has-text('Ada')")
    assert page.evaluate("document.cookie") == ""
    until(page, "document.querySelector('.photos img').naturalWidth > 0")
    assert page.locator("nav a:has-text('Enroll')").count() == 0
    page.goto("/")
    choose(page, photos / "Ada" / "Ada left.png")
    page.wait_for_selector("article.face")
    # A session that ended leads to the form, from parts of pages too.
    tokens.revoke(gallery, "door-2")
    choose(page, photos / "Ada" / "Ada left.png")
    page.wait_for_url(re.compile("/sign-in"))
    sign_in(page, (crowded.log.parent / "token").read_text())
    page.wait_for_selector("#ask")
    page.click("text=Sign out")
    page.wait_for_url(re.compile("/sign-in"))
    page.context.close()
    assert wrong == []


def test_an_unknown_face_is_enrolled_by_keyboard(chromium: Any, asked: Server, tmp_path: Path) -> None:
    photo = save(tmp_path / "new.png", (320, 200), [(64, 64, 16)], seed=11)
    page, wrong = opened(chromium, asked.url)
    page.goto("/")
    sign_in(page, (asked.log.parent / Scope.WRITE).read_text())
    page.wait_for_selector("#ask")
    choose(page, photo)
    page.wait_for_selector("article.unknown")
    focus_on(page, "Name")
    page.keyboard.type(" ")
    press(page, "Enter")
    page.wait_for_selector(".enroll-face [role=alert]")
    page.keyboard.type("Nia")
    press(page, "Enter")
    page.wait_for_selector(".enroll-face .done:has-text('Enrolled as Nia')")
    until(page, "document.activeElement.matches('.enroll-face .done')")
    choose(page, photo)
    page.wait_for_selector("article.named h2:has-text('Nia')")
    page.context.close()
    assert wrong == []
