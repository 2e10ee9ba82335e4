"""How Sphinx builds the site: `make docs`. A broken reference or a missing docstring is an error."""

import re
import sys
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import retrieval

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "faceprint"
release = version = retrieval.__version__
copyright = "the faceprint authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "command_pages"]
exclude_patterns = ["_build", "_extensions"]
nitpicky = True
# Docstrings write code in single backticks, as Markdown does.
default_role = "code"

# Quotes and dots stay as they are typed, so that they can be copied.
smartquotes = False
# A fence that names no language is plain text.
highlight_language = "text"

myst_enable_extensions = ["deflist", "attrs_inline"]
myst_heading_anchors = 3
# The build needs no network, and what a page links to outside the site is not looked up.
myst_url_schemes = {"http": None, "https": None}

html_theme = "furo"
html_title = "faceprint"
html_static_path = ["_static"]
html_css_files = ["faceprint.css"]
html_copy_source = False
html_show_sphinx = False
# Furo's own palette, with a contrast of 7:1 for links in light and dark.
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b4f8a", "color-brand-content": "#0b4f8a"},
    "dark_css_variables": {"color-brand-primary": "#8cc4ff", "color-brand-content": "#8cc4ff"},
    "top_of_page_buttons": [],
}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# One entry may name several attributes, "width, height: in pixels", and their types stand in the signature.
napoleon_custom_sections = [("Attributes", "params_style")]

# Types of other libraries: their documentation cannot be linked without a network.
nitpick_ignore_regex = [
    ("py:.*", r"(_thread|collections|contextlib|datetime|enum|os|pathlib|threading|types|typing)\..+"),
    ("py:.*", r"(numpy|np|PIL|torch|NDArray)(\..+)?"),
    # Types of ours that a program hands on, or never meets.
    (
        "py:class",
        r"retrieval\.([a-z_]+\.)+"
        r"(_T|ActiveModel|Decode|DetectionClock|FaceDetector|Faces|Engine|Exclusion|Fetching|Found|Layout|Meters|"
        r"Passed|PhotoFaces|PhotoPipeline|Prepared|Ready|Relabel|Stamp)",
    ),
]

_log = logging.getLogger(__name__)
# FAISS tells which instructions it found.
getLogger("faiss.loader").setLevel(WARNING)


_NEED_DOCSTRINGS = {"class", "exception", "function", "method", "property"}


def _prepare_docstring(
    app: Sphinx, what: str, name: str, thing: object, options: Any, lines: list[str]
) -> None:
    """Runs before napoleon reads a docstring; a class or function without one fails the build."""
    if what in _NEED_DOCSTRINGS and not any(lines):
        _log.warning("%s %s has no docstring", what, name)
    elif what == "module":
        # It tells who reads the source how the module is built; the page has words of its own.
        lines.clear()
    elif what == "property":
        # Otherwise napoleon takes what stands before a first colon for a type.
        lines[0] = f": {lines[0]}"


def _readable_defaults(
    app: Sphinx,
    what: str,
    name: str,
    thing: object,
    options: Any,
    signature: str | None,
    returned: str | None,
) -> tuple[str | None, str | None]:
    """Writes `...` for defaults that are no expressions, such as `<factory>`, which Sphinx cannot parse."""
    return (re.sub(r"<[^<>]*>", "...", signature) if signature else signature), returned


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _readable_defaults)
    app.connect("autodoc-process-docstring", _prepare_docstring, priority=1)
