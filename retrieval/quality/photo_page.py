"""Pages of photos: findings with photos side by side, as one self-contained HTML file."""

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Final, TypeAlias

from retrieval.errors import Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.sources import photos
from retrieval.sources.archives import Shelf
from retrieval.sources.remote import NOTHING_FETCHED, Fetching

# Reads a photo's bytes from one of its paths.
_Read: TypeAlias = Callable[[str], bytes]

# Side of a photo on a sheet, in pixels: twice what is shown, for screens and printers that show more.
_SIDE: Final = 224

_QUALITY: Final = 80

# Colours and measures are those of training/report.html.jinja.
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1d2430; --faint: #5d6675; --paper: #fbfbf9; --line: #dfe3e8;
  --card: #fff; --doubt: #b3362b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaef; --faint: #9aa4b2; --paper: #14171c;
  --line: #2c323b; --card: #1b1f26; --doubt: #f08a7d; } }
body { margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 72rem; background: var(--paper); color:
  var(--ink);
       font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; }
p { max-width: 52rem; margin: .4rem 0; overflow-wrap: anywhere; }
.faint, figcaption, th { color: var(--faint); font-size: .92rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; }
th, td { padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th.n, td.n { text-align: right; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem
  1.1rem 1rem; margin: 1rem 0; }
article .score { float: right; margin-left: 1rem; color: var(--faint); font-variant-numeric: tabular-nums; }
.groups { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin-top: .6rem; }
.group b { display: block; font-size: .92rem; overflow-wrap: anywhere; }
.photos { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; width: 7rem; }
figure img, figure .gone { display: block; box-sizing: border-box; width: 7rem; height: 7rem;
  object-fit: contain; border-radius: .4rem;
       border: 1px solid var(--line); background: var(--paper); }
figure .gone { padding: .5rem; overflow: hidden; font-size: .75rem; line-height: 1.3; color:
  var(--faint); overflow-wrap: anywhere; }
.doubted img, .doubted .gone { border: 2px solid var(--doubt); }
figcaption { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere; }
code { font-size: .92em; }
@media print { body { padding: 0; max-width: none; background: #fff; color: #000; } article, figure, tr
  { break-inside: avoid; } h2 { break-after: avoid; } }
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A photo with a line under it.

    Attributes:
        paths: where its bytes may be; the first that has them is shown.
        sha256: of its bytes, in hex; a file with others is not shown.
        caption: the line.
    """

    paths: Sequence[str]
    sha256: str
    caption: str


@dataclass(frozen=True, slots=True)
class Group:
    """Photos under one name; doubted ones have a red frame."""

    name: str
    pictures: Sequence[Picture]
    doubted: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """A finding: what was seen, what to do, how serious it is, and the photos that show it, side by side."""

    says: str
    next: str
    score: str
    groups: Sequence[Group]


@dataclass(frozen=True, slots=True)
class Section:
    """Findings of one kind under a heading, with a sentence about them."""

    heading: str
    words: str
    items: Sequence[Item]


@dataclass(frozen=True, slots=True)
class Table:
    """A small table; columns of numbers are aligned to the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()


def sheet(
    title: str,
    words: Sequence[str],
    table: Table,
    sections: Iterable[Section],
    fetching: Fetching = NOTHING_FETCHED,
) -> bytes:
    """One HTML file, photos in it, in UTF-8.

    A photo that cannot be read, or whose bytes are others by now, is a box that says so with its name; so is
    one at an address, unless `fetching` allows to fetch it.
    """
    with Shelf() as shelf:
        read = partial(photos.read_stored, shelf, fetching=fetching)
        parts = [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n",
            *(f"<p>{_text(one)}</p>\n" for one in words),
            *_table(table),
            *(part for section in sections for part in _section(section, read)),
            "</body>\n</html>\n",
        ]
    # A name may hold bytes that are not UTF-8.
    return "".join(parts).encode("utf-8", "backslashreplace")


def _text(words: str) -> str:
    """Text in HTML; what stands between backquotes is code. Control characters are shown as boxes."""
    shown = escape("".join(one if one.isprintable() else "\ufffd" for one in words))
    pieces = shown.split("`")
    if len(pieces) % 2 == 0:  # a name with a backquote of its own
        return shown
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))


def _table(table: Table) -> Iterator[str]:
    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="n"' if place in table.numeric else "" for place in range(len(cells))]
        shown = [f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)]
        return f"<tr>{''.join(shown)}</tr>\n"

    yield f"<table>\n<thead>{row('th', table.heads)}</thead>\n<tbody>\n"
    yield from (row("td", cells) for cells in table.rows)
    yield "</tbody>\n</table>\n"


def _section(section: Section, read: _Read) -> Iterator[str]:
    yield f"<h2>{_text(section.heading)}</h2>\n<p>{_text(section.words)}</p>\n"
    for item in section.items:
        yield f'<article>\n<span class="score">{_text(item.score)}</span>\n<p>{_text(item.says)}</p>\n'
        yield f'<p class="faint">{_text(item.next)}</p>\n<div class="groups">\n'
        yield from (_group(group, read) for group in item.groups)
        yield "</div>\n</article>\n"


def _group(group: Group, read: _Read) -> str:
    kind = "group doubted" if group.doubted else "group"
    figures = "".join(_figure(picture, read) for picture in group.pictures)
    return f'<div class="{kind}"><b>{_text(group.name)}</b><div class="photos">{figures}</div></div>\n'


def _figure(picture: Picture, read: _Read) -> str:
    caption = f"<figcaption>{_text(picture.caption)}</figcaption>"
    try:
        url = _data_url(_content(picture, read))
    except UnreadableImage as error:
        name = picture.paths[0] if picture.paths else "a photo without a path"
        return f'<figure><div class="gone">{_text(f"{name}: {error.detail}")}</div>{caption}</figure>'
    return f'<figure><img alt="{_text(picture.caption)}" src="{url}">{caption}</figure>'


def _content(picture: Picture, read: _Read) -> bytes:
    """A photo's bytes, from the first of its files that still has them."""
    problem = UnreadableImage(Reason.MISSING, "it was enrolled without a file")
    for path in picture.paths:
        try:
            content = read(path)
        except UnreadableImage as error:
            problem = error
            continue
        if pixels.content_sha256(content) == picture.sha256:
            return content
        problem = UnreadableImage(Reason.MISSING, "the file has other bytes by now")
    raise problem


def _data_url(content: bytes) -> str:
    buffer = io.BytesIO()
    pixels.thumbnail(content, side=_SIDE).save(buffer, format="JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
