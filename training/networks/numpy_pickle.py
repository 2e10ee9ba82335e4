"""A restricted unpickler: reads numpy arrays from a pickle, and runs nothing that the pickle asks for.

A pickle is a program that may call any function. Here it may call only stand-ins for the functions with
which numpy pickles an array: they store their arguments. Arrays are made afterwards, by this module, from a
shape, a type of number and bytes that fit each other. So nothing of a hostile file reaches numpy's own
`__setstate__`.
"""

import io
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

# With these bytes begin pickles of protocol 2 or newer, and older ones of a dict or an OrderedDict.
_STARTS: Final = (b"\x80", b"(", b"}", b"c")
# Numbers that weights consist of, as numpy's type strings without the byte order.
_NUMBERS: Final = ("f2", "f4", "f8", "i4", "i8")
_BYTE_ORDERS: Final = ("<", ">", "=")


class RefusedPickle(Exception):
    """A pickle is refused because it asks for more than arrays; the message says for what in a few words."""


class _NumberType:
    """A stand-in for numpy.dtype."""

    def __init__(self, name: Any, *_flags: Any) -> None:
        if name not in _NUMBERS:
            raise RefusedPickle("arrays of anything but integers and floating-point numbers")
        self._name, self._order = name, "="

    def set_state(self, state: Any) -> None:
        self._order = state[1]

    def made(self) -> "np.dtype[Any]":
        if self._order not in _BYTE_ORDERS:
            raise ValueError("a byte order that does not exist")
        found: np.dtype[Any] = np.dtype(self._order + self._name)
        return found


class PickledArray:
    """An array as a pickle states it; a stand-in for numpy.ndarray."""

    def __init__(self) -> None:
        self._state: tuple[Any, Any, Any, Any] | None = None

    def set_state(self, state: Any) -> None:
        """Stores the state that numpy pickled: version, shape, type, whether in Fortran's order, numbers."""
        _, shape, number_type, fortran, raw = state
        self._state = shape, number_type, "F" if fortran else "C", raw

    @property
    def stated_bytes(self) -> int:
        """The size of the numbers in the pickle.

        Raises:
            ValueError, TypeError: the pickle states none.
        """
        if self._state is None:
            raise ValueError("an array without numbers")
        return len(self._state[3])

    def made(self) -> NDArray[Any]:
        """Returns a new array in this machine's byte order.

        Raises:
            Exception: shape, type and size of the numbers do not fit each other. A damaged state can hold
                anything, so numpy may raise any of its exceptions.
        """
        if self._state is None:
            raise ValueError("an array without numbers")
        shape, number_type, order, raw = self._state
        # Python 2 pickled bytes as text in Latin-1, a character each.
        numbers = raw.encode("latin1") if isinstance(raw, str) else raw
        stored = number_type.made()
        if math.prod(shape) * stored.itemsize != len(numbers):
            raise ValueError("an array with another size than its shape")
        array = np.frombuffer(numbers, stored).reshape(shape, order=order)
        return array.astype(stored.newbyteorder("="), order="C", copy=True)


def _reconstruct(*_arguments: Any) -> PickledArray:
    # The arguments are those of an empty array; the state that follows has the real ones.
    return PickledArray()


def _from_buffer(raw: Any, number_type: Any, shape: Any, order: Any) -> PickledArray:
    array = PickledArray()
    array.set_state((1, shape, number_type, order == "F", raw))
    return array


def _encode(text: Any, encoding: Any = None) -> Any:
    # How Python 3 writes bytes in protocols that have only text. They stay text: a memoized text can stand
    # for many arrays, which together may be larger than memory.
    if encoding not in ("latin1", "latin-1"):
        raise RefusedPickle("_codecs.encode with another encoding than latin1")
    return text


def _ordered(items: Any = ()) -> dict[Any, Any]:
    return dict(items)


_STAND_INS: Final[Mapping[str, Callable[..., Any]]] = {
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _encode,
    "numpy.dtype": _NumberType,
    # An argument of _reconstruct.
    "numpy.ndarray": _reconstruct,
    **{
        f"numpy.{core}.{name}": stand_in
        for core in ("core", "_core")
        for name, stand_in in (
            ("multiarray._reconstruct", _reconstruct),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}

# Every operation that data, arrays and calls of a stand-in need. Objects of classes, references to other
# files and sets need others.
_OPERATIONS: Final = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE),
)


# The unpickler in Python: that in C lets no operation be left out, and allocates whatever size a file states.
class _Unpickler(pickle._Unpickler):
    read: Callable[[int], bytes]
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module}.{name}"
        if asked in _STAND_INS:
            return _STAND_INS[asked]
        if not all(part.isidentifier() for part in asked.split(".")):
            raise pickle.UnpicklingError("a name that is none")
        raise RefusedPickle(asked)

    def _set_state(self) -> None:
        """BUILD, for stand-ins alone: the plain one would set attributes of whatever is on the stack."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, PickledArray | _NumberType):
            target.set_state(state)
        elif not isinstance(target, dict):  # the state of an OrderedDict are attributes, without use here
            raise RefusedPickle("a change of objects that are no arrays")

    def _bytearray(self) -> None:
        """BYTEARRAY8, from the bytes that there are: the plain one allocates the stated size first."""
        self.stack.append(self.read(int.from_bytes(self.read(8), "little")))

    def _refuse(self) -> None:
        raise RefusedPickle("objects other than arrays")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **dict.fromkeys(pickle._Unpickler.dispatch, _refuse),
        **{operation[0]: pickle._Unpickler.dispatch[operation[0]] for operation in _OPERATIONS},
        pickle.BUILD[0]: _set_state,
        pickle.BYTEARRAY8[0]: _bytearray,
    }


def loads(data: bytes) -> object:
    """Returns what a pickle holds, with a `PickledArray` for each numpy array, and dicts for OrderedDicts.

    Pickles of Python 2 are read too, their text as Latin-1.

    Raises:
        RefusedPickle: the pickle asks for more than arrays. Nothing was run.
        Exception: it is not a pickle, or a damaged one; the unpickler raises many kinds.
    """
    if not data.startswith(_STARTS):
        raise pickle.UnpicklingError("not a pickle of a dict")
    return _Unpickler(io.BytesIO(data), encoding="latin1").load()
