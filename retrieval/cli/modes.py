"""The table of which options each command can use with which others; unusable options are refused.

Some options select a mode of a command: `ingest --embeddings` enrolls vectors, `search --by-person` finds
people. An option that has no effect in a mode is an error, since the user expects an effect of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from retrieval.errors import InputError


@dataclass(frozen=True)
class Use:
    """A rule for when some options of a command have an effect.

    All options are named as the parameters of the command's function.

    Attributes:
        options: the options that the rule is about.
        needs: at least one of these must be given too. PARAMETER=VALUE is a parameter with that value.
        wanted: a description of `needs` for the error, where the names of the options are not enough.
        bars: none of these may be given too.
        why: what the modes of `bars` do instead, as words that follow "which" in the error: "--workers is of no
            use with --embeddings, which enrolls vectors as they are".
        when: the parameter without which the rule does not apply; empty for a rule that always applies.
    """

    options: tuple[str, ...]
    needs: tuple[str, ...] = ()
    wanted: str = ""
    bars: tuple[str, ...] = ()
    why: str = ""
    when: str = ""


_FACE_LIMITS: Final = ("min_face", "min_sharpness", "max_yaw")
_DECODING: Final = (
    "batch_size",
    "workers",
    "decoders",
    "photo_seconds",
    "faces",
    *_FACE_LIMITS,
)
_EMBEDDING: Final = ("device", "precision")
# What `evaluate` measures with; of no use where it only compares two results.
_MEASURING: Final = (
    "protocol",
    "gallery",
    "pairs",
    "weights",
    "val_fraction",
    "min_images",
    "exclude",
    "workers",
)

# The rules by command. They are checked in order, and the first one that is broken is reported.
USES: Final[Mapping[str, tuple[Use, ...]]] = {
    "train": (
        Use(("margin",), needs=("detector",)),
        Use(("crop",), bars=("detector",), why="takes aligned faces"),
    ),
    "derive": (Use(("device", "workers"), needs=("data",)),),
    "model import": (Use(("margin",), needs=("detector",)),),
    "evaluate": (
        Use(("check",), bars=("compare",), why="makes a report of two evaluations"),
        Use(("log_json",), bars=("compare",), why="may measure two models"),
        Use(("log_json",), bars=("as_json",), why="prints the results alone"),
        Use(("check",), needs=("out",)),
        Use(
            (*_MEASURING, *_EMBEDDING),
            needs=("compared_on",),
            wanted="the DATA on which two models are compared",
            when="compare",
        ),
        Use(("pairs",), needs=("protocol=lfw-pairs",)),
        Use(
            ("min_images", "val_fraction", "weights"),
            bars=("gallery",),
            why="searches what is enrolled already",
        ),
        Use(("min_images",), needs=("protocol=open",)),
        Use(("val_fraction",), bars=("protocol=lfw-pairs",), why="splits nothing"),
    ),
    "ingest": (
        Use(("vectors",), needs=("model",)),
        Use(
            ("model", "metadata", "report", "strict", "summary", "share", "rehash", *_DECODING, *_EMBEDDING),
            bars=("dry_run",),
            why="enrolls nothing",
        ),
        Use(
            ("relabel", "rehash", *_DECODING, *_EMBEDDING),
            bars=("embeddings",),
            why="enrolls vectors as they are",
        ),
        Use(_FACE_LIMITS, bars=("faces=none",), why="looks for no faces"),
        Use(("relabel",), bars=("identity_from=none",), why="names no identity"),
        Use(("identity_from", "exclude", "sync"), needs=("sources",)),
        Use(("gone",), needs=("sync",)),
        Use(("dry_run",), needs=("sync", "relabel")),
        Use(("relabel", "rehash", *_DECODING, *_EMBEDDING), needs=("sources", "retry")),
        Use(("model", "strict", "summary", "share"), needs=("sources", "retry", "embeddings")),
    ),
    "import": (Use(("vectors",), needs=("model",)),),
    "embed": (
        Use(_FACE_LIMITS, bars=("faces=none",), why="looks for no faces"),
        Use(("cores_per_worker",), bars=("device=cuda",), why="gives each worker its share of the cores"),
        Use(("address", "gpus_per_worker", "cores_per_worker", "photos_per_part"), needs=("on",)),
    ),
    "search": (
        Use(("within",), bars=("by_person",), why="finds people, not photos"),
        Use(("rule", "photos"), needs=("by_person",)),
        Use(("mean_of",), needs=("rule=mean",)),
        Use(("min_face",), bars=("faces=none",), why="looks for no faces"),
        Use(
            ("exclude_self", "plot", "faces", "min_face", "crop", *_EMBEDDING),
            needs=("images", "paths"),
        ),
    ),
    "check": (
        Use(("device",), needs=("model",)),
        Use(("crop",), bars=("detector",), why="takes aligned faces"),
    ),
    "calibrate": (
        Use(
            ("fpir", "strangers", "exclude", "sample", "seed", "batch_size", "workers", *_EMBEDDING),
            bars=("show",),
            why="measures nothing",
        ),
        Use(("exclude", "batch_size", "workers", *_EMBEDDING), needs=("strangers",)),
    ),
    "reembed": (
        Use(
            ("no_switch", "give_up", "fetch", "report", "device"),
            bars=("drop_other",),
            why="embeds nothing",
        ),
        Use(("give_up",), bars=("no_switch",), why="removes nothing"),
    ),
    "follow": (
        Use(("once",), bars=("serve",), why="goes on until it is stopped"),
        Use(("every",), bars=("once",), why="ends after the first state"),
        Use(("host", "port", "workers", "device"), needs=("serve",)),
    ),
    "audit": (
        Use(("fetch",), needs=("page",)),
        Use(("top",), bars=("as_json",), why="prints everything"),
    ),
}


def refuse_unusable(command: str, given: Mapping[str, Any], spelled: Mapping[str, str]) -> None:
    """Refuses options that have no effect together with the other options.

    Args:
        command: its name.
        given: the values on the command line, by the parameters of the command's function.
        spelled: the name of each parameter on the command line.

    Raises:
        InputError: there is such an option; the sentence names it, and the option that it needs or excludes.
    """
    for use in USES.get(command, ()):
        if not use.when or use.when in given:
            for option in use.options:
                if option in given:
                    _check(use, option, given, spelled)


def _check(use: Use, option: str, given: Mapping[str, Any], spelled: Mapping[str, str]) -> None:
    name = spelled[option]
    if use.needs and not any(_holds(need, given) for need in use.needs):
        wanted = use.wanted or " or ".join(_spelled(need, spelled) for need in use.needs)
        raise InputError(f"{name} is of use only with {wanted}; add that, or leave {name} out.")
    for bar in use.bars:
        if _holds(bar, given):
            which = f"{_spelled(bar, spelled)}, which {use.why}"
            raise InputError(f"{name} is of no use with {which}; leave one of the two out.")


def _holds(condition: str, given: Mapping[str, Any]) -> bool:
    name, _, value = condition.partition("=")
    return name in given and (not value or given[name] == value)


def _spelled(condition: str, spelled: Mapping[str, str]) -> str:
    name, _, value = condition.partition("=")
    return f"{spelled[name]} {value}".strip()
