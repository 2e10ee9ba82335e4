"""A page escapes whatever is put into it, stands alone, and has one stylesheet."""

import base64
import io
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from PIL import Image

from retrieval.console import terminal
from retrieval.errors import UnreadableImage
from retrieval.pages import html
from retrieval.system.paths import printable

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "`<b>`",
    "&lt;b&gt;",
]

TEMPLATE = """{% extends "layout.html.jinja" %}
{% block title %}{{ name }}{% endblock %}
{% block body %}
<h1 title="{{ name }}">{{ name }}</h1><p>{{ name|coded }}</p><p>{{ name|readable }}{{ "x" ~ name }}</p>
{{ name|picture }}{{ name|box }}
{% endblock %}
"""


class Tags(HTMLParser):
    """The tags of a page, the attributes of each, and its words outside of the stylesheet."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.words = ""
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words += data


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with one template."""
    (tmp_path / "pages_of_a_test").mkdir()
    (tmp_path / "pages_of_a_test" / "__init__.py").touch()
    (tmp_path / "pages_of_a_test" / "page.html.jinja").write_text(TEMPLATE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pages_of_a_test", raising=False)
    return "pages_of_a_test"


def made(package: str, name: str) -> bytes:
    filters = {"picture": lambda alt: html.photo("data:,", alt=alt), "box": html.gone}
    return html.render(package, "page.html.jinja", filters=filters, name=name)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text_wherever_it_stands(package: str, name: str) -> None:
    plain, page = Tags(made(package, "Ann")), Tags(made(package, name))
    assert [tag for tag in page.tags if tag != "code"] == plain.tags
    assert page.attributes == plain.attributes
    assert page.words.count(name) >= 4


@pytest.mark.parametrize("name", ["\x1b[31mred", "half\udcff", "two\nlines"])
def test_what_cannot_be_shown_is_a_box(package: str, name: str) -> None:
    page = made(package, name).decode()
    assert "\ufffd" in page
    assert "\x1b" not in page
    assert html.readable(name) in Tags(page.encode()).words


def test_a_name_that_is_spelled_with_joiners_is_shown_as_it_is(package: str) -> None:
    """In Persian, and in Hindi; a letter between them that changes the direction is a box all the same."""
    for name in ("علی\u200cرضا", "शर्\u200dमा"):
        assert name in Tags(made(package, name)).words
        assert terminal.text(name).plain == printable(name) == name
    assert html.readable("a\u200c\u202eb") == "a\u200c\ufffdb"
    assert printable("a\u200c\u202eb") == "a\u200c\\u202eb"


def test_a_page_needs_nothing_from_outside_and_follows_the_reader(package: str) -> None:
    page = made(package, "Ann").decode()
    assert "http" not in page
    assert page.count("<style>") == 1
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_a_value_that_a_template_lacks_is_an_error(package: str) -> None:
    with pytest.raises(UndefinedError):
        html.render(package, "page.html.jinja", filters={"picture": str, "box": str})


def test_a_thumbnail_is_a_small_jpeg(tmp_path: Path) -> None:
    Image.new("RGB", (400, 300), (60, 99, 99)).save(tmp_path / "a.png")
    url = html.thumbnail_url((tmp_path / "a.png").read_bytes(), side=64)
    content = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("JPEG", (64, 48))
    with pytest.raises(UnreadableImage):
        html.thumbnail_url(b"no picture", side=64)


@pytest.mark.parametrize("words", ["say `this` and `<that>`", "say `<this>"])
def test_what_stands_between_backquotes_is_code_where_they_come_in_pairs(words: str) -> None:
    said = str(html.coded(words))
    assert said.count("<code>") == (words.count("`") // 2)
    assert "<t" not in said
