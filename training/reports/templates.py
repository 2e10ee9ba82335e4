"""The templates of pages and texts, and the formats of numbers in them."""

import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from retrieval.pages import html


def page(name: str, **values: Any) -> bytes:
    """The HTML page of a template; what is put into it is escaped."""
    return html.render("training.reports", name, filters=_FILTERS, **values)


def text(name: str) -> Template:
    """The Markdown template of a name; `plain` makes a name safe to stand in it."""
    environment = Environment(
        loader=PackageLoader("training.reports", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {**html.FILTERS, **_FILTERS}
    return environment.get_template(name)


def percent(value: float) -> str:
    """A share in percent, with one decimal."""
    return f"{100 * value:.1f} %"


def architecture(name: str) -> str:
    """The name of an architecture (a key of `retrieval.models.network.ARCHITECTURES`) as a person says it."""
    family = name.removesuffix("-cosine")
    said = "ResNet50" if family == "resnet50" else family
    return said if family == name else f"{said} with a classifier of cosines"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def setting(value: Any) -> str:
    """The value of a setting, a list as its members."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return ", ".join(map(str, value)) or "-"


def plain(words: str) -> str:
    """A name as code in Markdown, on one line, whatever is in it."""
    shown = html.readable(unicodedata.normalize("NFC", words)).strip()
    fence = "`" * (1 + max((len(run) for run in _ticks(shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _ticks(words: str) -> list[str]:
    return "".join(one if one == "`" else " " for one in words).split()


def share(value: float | None) -> Markup:
    """A share in percent that a program can read too; a dash for none."""
    return Markup("–") if value is None else _datum(value, percent(value))


def bare(value: float) -> Markup:
    """The same without the sign, for the first of two."""
    return _datum(value, f"{100 * value:.1f}")


def measure(value: float | None, digits: int = 3) -> Markup:
    """Any number, likewise."""
    return Markup("–") if value is None else _datum(value, f"{value:,.{digits}f}")


def _datum(value: float, words: str) -> Markup:
    return Markup('<data value="{}">{}</data>').format(repr(float(value)), words)


_FILTERS: Final[Mapping[str, Callable[..., Any]]] = {
    "percent": percent,
    "duration": duration,
    "setting": setting,
    "plain": plain,
    "share": share,
    "bare": bare,
    "measure": measure,
    "architecture": architecture,
}
