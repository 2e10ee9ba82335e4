"""Old spellings of options, which were documented: they still work, and print the current spelling."""

from collections.abc import Mapping, Sequence
from typing import Final

# By command: the old spelling of an option, or of an option and its value, and the current one.
OLD_SPELLINGS: Final[Mapping[str, Mapping[str, str]]] = {
    "train": {"--precision fp32": "--precision float32"},
    "model": {"--layers": "--layer-table"},
    "check": {"--validation-fraction": "--val-fraction"},
    "audit": {"--show": "--top"},
}

# Commands with an old spelling `--json FILE` of what is `--json-file FILE` now.
JSON_NAMED_A_FILE: Final = frozenset({"check", "audit"})


def renewed(command: str, args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments of a command in the current spelling, and a sentence for each old one."""
    old = OLD_SPELLINGS.get(command, {})
    replaced: dict[str, str] = {}
    words, values = _split_at_double_dash(args)
    done: list[str] = []
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if option in old:
            replaced[option] = old[option]
            done.append(f"{old[option]}{equals}{value}")
        elif (pair := f"{option} {value or ''.join(words[:1])}") in old:
            replaced[pair] = old[pair]
            done += old[pair].split()
            words = words if equals else words[1:]
        else:
            done.append(word)
    return [*done, *values], [_notice(*pair) for pair in replaced.items()]


def json_in_a_file(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns arguments with `--json FILE` replaced by `--json-file FILE`, and a sentence if it was there."""
    words, values = _split_at_double_dash(args)
    done = [f"--json-file{word.removeprefix('--json')}" if _is_json(word) else word for word in words]
    return [*done, *values], [_notice("--json FILE", "--json-file FILE")] if done != words else []


def in_todays(command: str, sentence: str) -> str:
    """Returns a sentence with the current spelling of values that the library names by their old spelling."""
    for old, new in OLD_SPELLINGS.get(command, {}).items():
        sentence = sentence.replace(old, new) if " " in old else sentence
    return sentence


def _is_json(word: str) -> bool:
    return word == "--json" or word.startswith("--json=")


def _notice(old: str, new: str) -> str:
    return f"{old} is spelled {new} now; the old spelling still works."


def _split_at_double_dash(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments before `--`, which may be options, and those from `--` on, which are not."""
    end = list(args).index("--") if "--" in args else len(args)
    return list(args[:end]), list(args[end:])
