"""Templates of report pages and model cards, and the number formats that they use."""

import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from retrieval.pages import html


def page(name: str, **values: Any) -> bytes:
    """Renders the HTML page of a template; values are escaped."""
    return html.render("training.reports", name, filters=_FILTERS, **values)


def text(name: str) -> Template:
    """Returns a Markdown template by its file name; its filter `plain` escapes names."""
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
    """Formats a share in percent, with one decimal."""
    return f"{100 * value:.1f} %"


def architecture(name: str) -> str:
    """Formats an architecture, a key of `retrieval.models.network.ARCHITECTURES`, for people."""
    variant = name.removesuffix("-cosine")
    family = variant.removesuffix("-caffe")
    shown = "ResNet50" if family == "resnet50" else family
    if variant != family:
        shown += " in Caffe's form (stride in the first convolution of a block)"
    return shown if variant == name else f"{shown} with a classifier of cosines"


def duration(seconds: float) -> str:
    """Formats seconds as minutes and seconds, for people."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def setting(value: Any) -> str:
    """Formats the value of a setting; a list as its members, separated by commas."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return ", ".join(map(str, value)) or "-"


def plain(words: str) -> str:
    """Formats any name as inline code in Markdown, on one line."""
    shown = html.readable(unicodedata.normalize("NFC", words)).strip()
    fence = "`" * (1 + max((len(run) for run in _backtick_runs(shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _backtick_runs(words: str) -> list[str]:
    return "".join(one if one == "`" else " " for one in words).split()


def share(value: float | None) -> Markup:
    """Formats a share in percent, with its exact value in a `data` element; a dash for None."""
    return Markup("–") if value is None else _datum(value, percent(value))


def bare(value: float) -> Markup:
    """Formats a share as `share` does, without the percent sign: the lower end of an interval."""
    return _datum(value, f"{100 * value:.1f}")


def measure(value: float | None, digits: int = 3) -> Markup:
    """Formats any number, with its exact value in a `data` element; a dash for None."""
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
