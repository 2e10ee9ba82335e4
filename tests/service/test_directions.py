"""Names that are written from right to left, or say so by control characters, change nothing around them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrieval import Gallery, ModelBundle
from retrieval.service.page import rendering
from tests.quality.test_audit import Drawn
from tests.service.pages import HTML, first_face, form_token, person, send
from tests.service.server import Server
from tests.service.test_jobs import events

# Right-to-left override: what follows is shown backwards, up to the end of its paragraph or element.
OVERRIDE = "Adi\u202egpj"
HEBREW = "\u05d3\u05d5\u05d3"
SHOWN = OVERRIDE.replace("\u202e", "\ufffd")


@pytest.fixture(scope="module")
def directed(bundle: ModelBundle, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for a gallery with these names, which the classifier says too, and an audit of it."""
    folder = tmp_path_factory.mktemp("directed")
    drawn = Drawn()
    drawn.add("P03", drawn.near("P17", 1))
    drawn.add("Double", drawn.near("P05", 4))
    names = {"P17": OVERRIDE, "P05": HEBREW}
    drawn.names = [names.get(name or "", name) for name in drawn.names]
    with Gallery.create(folder / "g", bundle) as gallery:
        drawn.into(gallery)
        for name, other in (("Adi", OVERRIDE), ("Bao", HEBREW)):
            photos = sorted((faces / name).glob("*.jpg"))
            gallery.enroll([(photos[0], f"{other} 2"), (photos[1], f"{other} 3")])
        gallery.annotate(identities={OVERRIDE: {HEBREW: OVERRIDE}})
        gallery.merge_identities(f"{OVERRIDE} 3", f"{HEBREW} 3")
    with Server(folder / "g", folder / "log") as server:
        send(server.client, "/doubts/audit")
        [job] = server.client.get("/v1/jobs").json()["jobs"]
        assert events(server, job["id"])[-1][1]["state"] == "done"
        yield server
    assert "Traceback" not in server.log.read_text()


def outside(page: str) -> str:
    """The text of a page that is outside of isolating elements, without titles, attributes and proposals."""
    page = re.sub(r"<title>.*?</title>|<bdi>[^<]*</bdi>|<text .*?</text>", "", page, flags=re.DOTALL)
    return re.sub(r"<[^>]*>", "\n", page)


def test_every_name_is_isolated_where_it_stands_on_a_page(directed: Server, faces: Path) -> None:
    number, other = person(directed, OVERRIDE), person(directed, f"{HEBREW} 3")
    [merge] = directed.client.get("/v1/merges").json()["merges"]
    doubts = directed.client.get("/v1/doubts").json()["doubts"]
    assert {OVERRIDE, HEBREW} <= {person["identity"] for one in doubts for person in one["people"]}
    addresses = [
        *("/people", f"/people/{number}", f"/people/{other}", f"/people/{number}/forget"),
        f"/people/{number}/merge?identity={HEBREW}",
        *(f"/faces/{first_face(directed, OVERRIDE)}", f"/merges/{merge['id']}/undo", "/health"),
        *(f"/doubts?doubt={one['id']}" for one in doubts),
    ]
    face = first_face(directed, HEBREW)
    addresses += [f"/people?name={HEBREW}%20nobody", f"/faces/{face}", f"/faces/{face}/forget"]
    pages = {address: directed.client.get(address, headers=HTML) for address in addresses}
    files = {"image": (f"{OVERRIDE}.jpg", (faces / "Adi" / "Adi_0001.jpg").read_bytes())}
    pages["search"] = directed.client.post("/search", files=files, headers=HTML)
    for one in doubts:
        answered = send(directed.client, f"/doubts/{one['id']}/dismiss").headers["location"]
        pages[answered] = directed.client.get(answered, headers=HTML)
    pages["dismissed"] = directed.client.get("/doubts/dismissed", headers=HTML)
    pages["undone"] = send(directed.client, f"/merges/{merge['id']}/undo")
    for address, page in pages.items():
        assert page.status_code == 200, address
        assert "\u202e" not in re.sub(r' value="[^"]*"', "", page.text), address
        left = outside(page.text)
        assert SHOWN not in left, address
        assert HEBREW not in left, address
    seen = "".join(page.text for page in pages.values())
    assert f"<bdi>{SHOWN}</bdi>" in seen
    assert f"<bdi>{HEBREW}</bdi>" in seen
    assert f"<title>\u2068{SHOWN}\u2069 " in pages[f"/people/{number}"].text


def test_a_form_sends_the_name_that_is_stored_and_not_the_one_that_is_shown(directed: Server) -> None:
    number = person(directed, "P03")
    asked = directed.client.get(f"/people/{number}/merge", params={"identity": OVERRIDE}, headers=HTML).text
    [sent] = re.findall(r'name="identity" value="([^"]*)"', asked)
    assert sent == OVERRIDE
    proposed = directed.client.get("/people/names", params={"identity": "gpj"}).text
    assert f'value="{OVERRIDE}"' in proposed
    merged = directed.client.post(
        f"/people/{number}/merge", data={"identity": sent, "form_token": form_token(asked)}, headers=HTML
    )
    assert merged.headers["location"].startswith(f"/people/{person(directed, OVERRIDE)}?")


def test_a_person_is_forgotten_by_the_name_that_is_shown(directed: Server) -> None:
    number = person(directed, f"{OVERRIDE} 2")
    asked = directed.client.get(f"/people/{number}/forget", headers=HTML).text
    assert f"Type the name to confirm: <bdi>{SHOWN} 2</bdi>" in asked
    assert send(directed.client, f"/people/{number}/forget", identity="Adigpj 2").status_code == 422
    assert send(directed.client, f"/people/{number}/forget", identity=f"{SHOWN} 2").status_code == 303


def test_names_in_a_sentence_are_isolated_the_longest_first() -> None:
    made = rendering._naming("Ada B is no Ada, <says> Bo.", ["Ada", "Ada B", "Bo", ""])
    assert made == "<bdi>Ada B</bdi> is no <bdi>Ada</bdi>, &lt;says&gt; <bdi>Bo</bdi>."
    assert rendering._naming("1 < 2", []) == "1 &lt; 2"
