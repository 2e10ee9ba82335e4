"""Builds HTML pages: one file each, without anything from outside, from templates of the calling package.

A template extends `layout.html.jinja`, which brings the stylesheet. Whatever a template puts out is escaped,
and characters that cannot be shown become boxes; only `Markup`, which this module, macros and charts make of
escaped parts, is put out as it is. So a name is only ever text.
"""

import base64
import io
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from PIL import Image

from retrieval.images import pixels
from retrieval.system.paths import shown

# JPEG quality of thumbnails.
_QUALITY: Final = 80


def render(
    package: str, template: str, *, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any
) -> bytes:
    """Returns a page in UTF-8.

    Args:
        package: where the template is, such as "retrieval.quality".
        template: its file's name.
        filters: what the template applies to values, beside those of `FILTERS`.
        values: what it shows.
    """
    # Where a name got through that UTF-8 cannot encode, its bytes are shown.
    text = environment(package, filters=filters).get_template(template).render(**values)
    return text.encode("utf-8", "backslashreplace")


def environment(
    package: str, folder: str = ".", *, filters: Mapping[str, Callable[..., Any]] | None = None
) -> Environment:
    """Returns what renders the templates in a folder of a package, and `layout.html.jinja`; see `render`."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package, folder), PackageLoader("retrieval.pages", ".")]),
        autoescape=select_autoescape(default=True, default_for_string=True, disabled_extensions=("css",)),
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # A service that runs goes on with the templates that it began with.
        auto_reload=False,
    )
    made.filters |= {**FILTERS, **(filters or {})}
    return made


def thumbnail_url(content: bytes, *, side: int) -> str:
    """Returns a photo's bytes as a data URL of a JPEG, at most `side` pixels wide and high.

    Raises:
        UnreadableImage: as `pixels.thumbnail`.
    """
    return data_url(pixels.thumbnail(content, side=side))


def data_url(image: Image.Image) -> str:
    """Returns a picture as a data URL of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_QUALITY)
    return _data_url("image/jpeg", buffer.getvalue())


def png_url(png: bytes) -> str:
    """Returns the bytes of a PNG file as a data URL."""
    return _data_url("image/png", png)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64," + base64.b64encode(content).decode()


def photo(url: str, *, alt: str) -> Markup:
    """Returns a photo by its data URL."""
    return Markup('<img alt="{}" src="{}">').format(readable(alt), url)


def gone(why: str) -> Markup:
    """Returns a box in place of a photo that cannot be shown."""
    return Markup('<div class="gone">{}</div>').format(readable(why))


def readable(words: str) -> str:
    """Returns a name as it can be shown: control characters and halves of letters become boxes."""
    return shown(words)


def coded(words: str) -> Markup:
    """Returns a sentence in which what stands between backquotes is code."""
    pieces = readable(words).split("`")
    if len(pieces) % 2 == 0:  # a name with a backquote of its own
        return escape(readable(words))
    code = Markup("<code>{}</code>")
    return Markup("").join(code.format(one) if place % 2 else one for place, one in enumerate(pieces))


def thousands(number: int) -> str:
    """Returns a whole number with commas."""
    return f"{number:,}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Returns a number and what it counts."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "readable": readable,
    "coded": coded,
    "thousands": thousands,
    "counted": counted,
    "file": os.path.basename,
}


def _shown(value: Any) -> Any:
    """Returns what a template puts out for a value."""
    return readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
