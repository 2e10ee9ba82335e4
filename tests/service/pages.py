"""What tests of the page share: a gallery with hostile names, and forms as a browser sends them."""

import re
import shutil
from pathlib import Path
from typing import Any

import httpx

from retrieval import Gallery, ModelBundle
from tests.quality.test_audit import Drawn
from tests.service.server import Server

HOSTILE = "<img src=x onerror=alert(1)>"

# What a browser says that it takes.
HTML = {"accept": "text/html,*/*"}


def make_gallery(folder: Path, bundle: ModelBundle, faces: Path) -> Path:
    """Makes a gallery of drawn faces below a folder, with a person and a file of a hostile name."""
    photos = Path(shutil.copytree(faces, folder / "photos"))
    hostile = photos / "Sky" / f"{HOSTILE}.jpg"
    (photos / "Sky" / "Sky_0001.jpg").rename(hostile)
    with Gallery.create(folder / "people.gallery", bundle) as gallery:
        gallery.enroll(
            (path, HOSTILE if path == hostile else path.parent.name)
            for path in sorted(photos.glob("*/*.jpg"))
        )
    return folder / "people.gallery"


def doubtful(folder: Path, bundle: ModelBundle) -> Path:
    """Makes a gallery in which a photo of the hostile name is among those of P03, and P05 is Double too."""
    drawn = Drawn()
    drawn.add("P03", drawn.near("P17", 1))
    drawn.add("Double", drawn.near("P05", 4))
    drawn.names = [HOSTILE if name == "P17" else name for name in drawn.names]
    with Gallery.create(folder, bundle) as gallery:
        drawn.into(gallery)
    return folder


def words(page: str) -> str:
    """A page without the elements that isolate the directions of names."""
    return re.sub("</?bdi>", "", page)


def person(server: Server, name: str, **options: Any) -> int:
    """The id of a person."""
    [found] = server.client.get("/v1/people", params={"name": name}, **options).json()["people"]
    number: int = found["id"]
    return number


def first_face(server: Server, name: str) -> int:
    """The id of the first face of a person."""
    [found] = server.client.get("/v1/people", params={"name": name}).json()["people"]
    number: int = found["face_id"]
    return number


def form_token(page: str) -> str:
    """What the forms of a page send."""
    found = re.search(r'name="form-token" content="([0-9a-f]{64})"', page)
    assert found is not None
    return found[1]


def send(client: httpx.Client, address: str, **fields: Any) -> httpx.Response:
    """Sends a form of the page, as a browser does."""
    token = form_token(client.get("/", headers=HTML).text)
    return client.post(address, data={"form_token": token, **fields}, headers=HTML)
