"""`Where`: conditions on faces and their metadata, for searches. `filter_sql` translates them to SQL."""

import dataclasses
import json
import math
import operator
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, TypeAlias

from retrieval.database.metadata import INTEGERS, MAX_LEVELS
from retrieval.errors import InputError
from retrieval.system.paths import absolute

Value: TypeAlias = str | int | float | bool | None

# The subjects of a condition's text: the fields of `Where`.
Subject: TypeAlias = Literal[
    "faces", "people", "identities", "face_ids", "path_prefixes", "enrolled_after", "enrolled_before"
]

BEGINS: Final = "~"
EXISTS: Final = "?"
ORDER: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_OPERATORS: Final = frozenset({"=", "!=", BEGINS, EXISTS, *ORDER})

# A key: names separated by dots; a name that contains a dot, a quote or an operator is a JSON string.
_PLAIN: Final = '[^"=<>!~?.]+'
_NAME: Final = rf'(?:"(?:[^"\\]|\\.)*"|{_PLAIN})'
_CONDITION: Final = re.compile(rf"({_NAME}(?:\.{_NAME})*)(?:(>=|<=|!=|=|<|>|~)(.*)|(\?)\s*)", re.DOTALL)
_NAMES: Final = re.compile(_NAME)

# The most names in the keys of all conditions: a database joins a table for each.
MAX_NAMES: Final = 400

# Keys with a special meaning; in quotes they are metadata.
_PERSON: Final = "person"
_SPECIAL: Final[Mapping[tuple[str, str], Subject]] = {
    ("identity", "="): "identities",
    ("path", "="): "path_prefixes",
    ("face", "="): "face_ids",
    ("enrolled", ">="): "enrolled_after",
    ("enrolled", "<"): "enrolled_before",
}


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on metadata. Types are strict: a number never equals a text, and true is not a number.

    A missing key meets no condition, not even `!=`.

    Attributes:
        key: the names that lead to a value, object by object.
        operator: `=` or `!=`; `<`, `<=`, `>`, `>=` between numbers, or between texts by their code points;
            `~` for a text with this prefix; `?` for a key that exists, with any value.
        value: the value to compare with; None, for `=` and `!=`, is JSON's null. `?` needs none.

    Raises:
        InputError: the operator does not exist, or does not compare such values.
    """

    key: tuple[str, ...]
    operator: str
    value: Value = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", tuple([self.key] if isinstance(self.key, str) else self.key))
        value = self.value
        if not self.key or not all(isinstance(name, str) for name in self.key):
            raise InputError(f"A condition's key is one text or more, not {self.key!r}.")
        if len(self.key) > MAX_LEVELS:
            raise InputError(
                f"A condition's key has {len(self.key):,} names; "
                f"metadata lie at most {MAX_LEVELS} levels deep."
            )
        if self.operator not in _OPERATORS:
            raise InputError(f"There is no comparison {self.operator!r}; use = != < <= > >= ~ or ?.")
        if self.operator == BEGINS and not isinstance(value, str):
            raise InputError(f"Only texts begin with something: {self} cannot compare with {value!r}.")
        if not isinstance(value, str | int | float | None):
            raise InputError(f"{self} cannot compare with {value!r}; give a text, a number, true or false.")
        if self.operator in ORDER and (value is None or isinstance(value, bool)):
            raise InputError(f"{self} cannot be: true, false and null are neither more nor less than others.")
        if is_number(value) and not _can_be(value):
            raise InputError(f"{self} cannot compare with {value}; integers have 64 bits, others are finite.")
        for text in (*self.key, *([value] if isinstance(value, str) else [])):
            if not _is_text(text):
                raise InputError(f"A condition cannot have the text {text!a}: no metadata can.")

    def __str__(self) -> str:
        plain = [re.fullmatch(_PLAIN, name) is not None and name == name.strip() for name in self.key]
        names = [n if as_it_is else json.dumps(n) for n, as_it_is in zip(self.key, plain, strict=True)]
        shown = ".".join(names)
        literal = "" if self.operator == EXISTS else json.dumps(self.value, ensure_ascii=False, default=repr)
        return f"{shown}{self.operator}{literal}"

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Returns whether metadata meet the condition; the SQL of `filter_sql` gives the same result."""
        found: Any = metadata
        for name in self.key:
            if not isinstance(found, Mapping) or name not in found:
                return False
            found = found[name]
        if self.operator == EXISTS:
            return True
        if self.operator == "=":
            return self._equals(found)
        if self.operator == "!=":
            return not self._equals(found)
        if self.operator == BEGINS:
            return isinstance(found, str) and found.startswith(str(self.value))
        return _are_comparable(found, self.value) and ORDER[self.operator](found, self.value)

    def _equals(self, found: object) -> bool:
        if self.value is None or isinstance(self.value, bool):
            return found is self.value
        return _are_comparable(found, self.value) and found == self.value


@dataclass(frozen=True, slots=True)
class Where:
    """A filter of faces: all of its conditions must hold.

    Attributes:
        identities: any of these identities, by current or former names; empty is every face. An unknown name
            matches no face.
        face_ids: any of these faces; None is every face.
        path_prefixes: a path that is one of these files or folders, or is below one; made absolute.
        enrolled_after, enrolled_before: the time of enrollment, from the first inclusive to the second
            exclusive. ISO 8601 or a datetime; without a zone it is UTC, without a time it is midnight.
        faces: conditions on the metadata of the faces, all of which must hold.
        people: conditions on the metadata of their identities, all of which must hold.

    Raises:
        InputError: a value has the wrong type, or is not a time.
    """

    identities: tuple[str, ...] = ()
    face_ids: Iterable[int] | None = None
    path_prefixes: tuple[str, ...] = ()
    enrolled_after: datetime | str | None = None
    enrolled_before: datetime | str | None = None
    faces: tuple[Condition, ...] = ()
    people: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        for name in ("identities", "path_prefixes"):
            texts = getattr(self, name)
            texts = (texts,) if isinstance(texts, str | os.PathLike) else tuple(texts)
            texts = tuple(os.fspath(text) if isinstance(text, os.PathLike) else text for text in texts)
            if not all(isinstance(text, str) and text and _is_text(text) for text in texts):
                raise InputError(f"{name} must be texts, none empty and all of valid Unicode.")
            object.__setattr__(self, name, texts)
        object.__setattr__(self, "path_prefixes", tuple(map(absolute, self.path_prefixes)))
        if self.face_ids is not None:
            try:
                ids = tuple(map(operator.index, self.face_ids))
            except TypeError as error:
                raise InputError(f"The faces' ids must be integers: {error}.") from error
            object.__setattr__(self, "face_ids", ids)
        for name in ("enrolled_after", "enrolled_before"):
            time = getattr(self, name)
            object.__setattr__(self, name, None if time is None else _second(time))
        for name in ("faces", "people"):
            conditions = getattr(self, name)
            conditions = (conditions,) if isinstance(conditions, Condition) else tuple(conditions)
            if not all(isinstance(one, Condition) for one in conditions):
                raise InputError(f"{name} must be conditions; Where.parse reads them from texts.")
            object.__setattr__(self, name, conditions)
        number = sum(len(condition.key) for condition in (*self.faces, *self.people))
        if number > MAX_NAMES:
            raise InputError(
                f"The keys of these conditions have {number:,} names together; "
                f"at most {MAX_NAMES} can be asked for at once."
            )

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "Where":
        """Returns the filter that several texts state together (see `parse_condition`).

        All conditions must hold; of several `identity=`, `path=` or `face=`, one of each kind.

        Raises:
            InputError: a text cannot be parsed, or one end of the time of enrollment is given twice.
        """
        said: dict[Subject, list[Any]] = {}
        for text in texts:
            subject, condition = parse_condition(text)
            on_metadata = subject in ("faces", "people")
            said.setdefault(subject, []).append(condition if on_metadata else condition.value)
        for subject in ("enrolled_after", "enrolled_before"):
            if len(said.get(subject, ())) > 1:
                sign = ">=" if subject == "enrolled_after" else "<"
                raise InputError(f"Say enrolled{sign} once.")
        return cls(
            identities=tuple(said.get("identities", ())),
            face_ids=said.get("face_ids"),
            path_prefixes=tuple(said.get("path_prefixes", ())),
            enrolled_after=said.get("enrolled_after", [None])[0],
            enrolled_before=said.get("enrolled_before", [None])[0],
            faces=tuple(said.get("faces", ())),
            people=tuple(said.get("people", ())),
        )

    def among(self, identities: Sequence[str]) -> "Where":
        """Returns the filter that also requires any of these identities; an empty list requires nothing.

        Raises:
            InputError: no name is left, because the filter is of other identities.
        """
        if not identities:
            return self
        # Both conditions must hold, so only names that both have are left.
        left = tuple(name for name in identities if not self.identities or name in self.identities)
        if not left:
            raise InputError(
                "`identity` and the condition identity=... name different people, so no face can match both."
            )
        return dataclasses.replace(self, identities=left)


def parse_condition(text: str) -> tuple[Subject, Condition]:
    """Returns the subject and the condition of a text such as `year>=2020`.

        camera=north  camera!=north  year>=2020  name~North  badge?  address.city=Rome  "a.b".c=true
        person.country=FR                       of the identity's metadata
        identity=Kim  path=photos/2024  face=12  enrolled>=2024-01-01  enrolled<2025-01-01T12:00

    A JSON value (a number, true, false, null, a text in quotes) is parsed as JSON; any other value is a text.
    After `~`, `identity=` and `path=` it is always a text. White space around key and value is ignored.

    Raises:
        InputError: the text is not a condition.
    """
    match = _CONDITION.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"{text!r} is not a condition; say KEY=VALUE, with = != < <= > >= or ~, or KEY?, and put a key "
            "with other letters in double quotes."
        )
    spelled, sign, literal, exists = match.groups()
    names = [name.strip() for name in _NAMES.findall(spelled)]
    if not all(names):
        raise InputError(f"{text!r} has a key without a name; put it in double quotes if it is meant.")
    sign, literal = sign or exists, (literal or "").strip()
    subject: Subject = "faces"
    if names[0] == _PERSON and len(names) > 1:
        subject, names = "people", names[1:]
    elif len(names) == 1 and any(names[0] == key for key, _ in _SPECIAL):
        return _special(text, names[0], sign, literal)
    key = tuple(_unquoted(name, text) for name in names)
    if sign == EXISTS:
        return subject, Condition(key, sign)
    return subject, Condition(key, sign, _as_text(literal) if sign == BEGINS else _as_json(literal))


def _special(text: str, key: str, sign: str, literal: str) -> tuple[Subject, Condition]:
    subject = _SPECIAL.get((key, sign))
    if subject is None:
        signs = " or ".join(f"{key}{sign}" for one, sign in _SPECIAL if one == key)
        raise InputError(f'{text!r} is not a condition; say {signs}, or "{key}" in quotes for metadata.')
    value: Value = _as_text(literal)
    if subject == "identities":
        value = unicodedata.normalize("NFC", str(value))
    if subject == "face_ids":
        if not re.fullmatch("[0-9]{1,18}", literal):
            raise InputError(f"{text!r} names no face; face= takes its number.")
        value = int(literal)
    if not value and subject != "face_ids":
        raise InputError(f"{text!r} is not a condition; something must follow.")
    return subject, Condition((key,), sign, value)


def _unquoted(name: str, text: str) -> str:
    if not name.startswith('"'):
        return name
    try:
        return str(json.loads(name))
    except ValueError as error:
        raise InputError(f"{text!r} has the key {name}, which is not a JSON text.") from error


def _as_json(literal: str) -> Value:
    try:
        value = json.loads(literal, parse_constant=lambda name: name)
    except (ValueError, RecursionError):
        return literal
    if isinstance(value, list | dict):
        return literal
    if not is_number(value) or _can_be(value):
        return value  # type: ignore[no-any-return]
    nearest = _as_float(value)
    return literal if math.isinf(nearest) else nearest


def _as_text(literal: str) -> str:
    """Returns a literal as a text, without its quotes if it has any."""
    value = _as_json(literal) if literal.startswith('"') else literal
    return value if isinstance(value, str) else literal


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def is_number(value: object) -> bool:
    """Returns whether a value is a JSON number: Python also counts booleans as integers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _can_be(number: Any) -> bool:
    """Returns whether metadata can hold a number: an integer of 64 bits, or a finite float."""
    return number in INTEGERS if isinstance(number, int) else math.isfinite(number)


def _are_comparable(one: object, other: object) -> bool:
    return (is_number(one) and is_number(other)) or (isinstance(one, str) and isinstance(other, str))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _second(given: datetime | str) -> str:
    """Returns a time in the format of the database: UTC, rounded up to a whole second.

    Times of faces have whole seconds, so that rounding up selects the same faces.

    Raises:
        InputError: the value is not a time.
    """
    try:
        time = datetime.fromisoformat(given) if isinstance(given, str) else given
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
        if time.microsecond:
            time = time.replace(microsecond=0) + timedelta(seconds=1)
    except (ValueError, OverflowError, AttributeError, TypeError) as error:
        raise InputError(
            f"{given!r} is not a time; write 2024-01-31, or 2024-01-31T12:00, or with a zone."
        ) from error
    return time.isoformat(timespec="seconds")
