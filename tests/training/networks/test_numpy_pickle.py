"""Pickles give numpy arrays, as every protocol writes them, and whatever else they ask for is refused."""

import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from training.networks.numpy_pickle import PickledArray, RefusedPickle, loads

# The bytes 0 to 255 are among the numbers, and so are a line end and a quote.
NUMBERS = np.arange(256, dtype=np.uint8).view(np.float32)


def by_python_2(array: NDArray[Any], name: bytes = b"w", *, protocol: int = 2) -> bytes:
    """The pickle of {name: array} as Python 2 wrote it: bytes are strings, in protocol 0 quoted."""
    number_type, shape = array.dtype.str[1:].encode(), array.shape
    raw = array.tobytes()
    if protocol == 0:
        sizes = b"".join(b"I%d\n" % size for size in shape)
        # Python 2 wrote the `repr` of bytes, without a b before it.
        quoted = repr(raw)[1:].encode()
        return (
            b"(dp0\nS'" + name + b"'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n"
            b"(I0\ntp4\nS'b'\np5\ntp6\nRp7\n(I1\n(" + sizes + b"tp8\ncnumpy\ndtype\np9\n(S'" + number_type +
            b"'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'<'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\nS" + quoted +
            b"\np15\ntp16\nbs."
        )  # fmt: skip
    sizes = b"".join(b"M" + struct.pack("<H", size) for size in shape)
    return (
        b"\x80\x02}q\x00U" + bytes([len(name)]) + name + b"q\x01cnumpy.core.multiarray\n_reconstruct\nq\x02"
        b"cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87Rq\x04(K\x01(" + sizes + b"tcnumpy\ndtype\nq\x05U\x02" +
        number_type +
        b"K\x00K\x01\x87Rq\x06(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" +
        struct.pack("<I", len(raw)) + raw + b"tbs."
    )  # fmt: skip


def only(data: bytes) -> NDArray[Any]:
    state = loads(data)
    assert isinstance(state, dict)
    (array,) = state.values()
    assert isinstance(array, PickledArray)
    return array.made()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        NUMBERS,
        NUMBERS.reshape(4, 16),
        np.asfortranarray(NUMBERS.reshape(4, 16)),
        np.arange(24.0).reshape(2, 3, 4)[:, ::2],
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.arange(6, dtype=np.float16),
        np.array(7),
        np.zeros(1, np.int32),
    ],
    ids=["plain", "matrix", "fortran", "strided", "big-endian", "half", "scalar", "int"],
)
def test_an_array_is_read_from_every_protocol(array: NDArray[Any], protocol: int) -> None:
    found = only(pickle.dumps({"w": array}, protocol))
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.shape == array.shape
    assert found.tobytes() == array.astype(found.dtype).tobytes()
    assert found.flags.writeable


@pytest.mark.parametrize("protocol", [0, 2])
def test_an_array_is_read_from_a_pickle_of_python_2(protocol: int) -> None:
    array = NUMBERS.reshape(4, 4, 2, 2)
    data = by_python_2(array, protocol=protocol)
    assert pickle.loads(data, encoding="latin1")["w"].tobytes() == array.tobytes()
    assert only(data).tobytes() == array.tobytes()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_an_ordered_dict_with_attributes_is_a_dict(protocol: int) -> None:
    """As torch's state dicts are: their attribute `_metadata` is left out."""
    state = OrderedDict(a=NUMBERS, b=NUMBERS)
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    found = loads(pickle.dumps(state, protocol))
    assert isinstance(found, dict)
    assert [*found] == ["a", "b"]


class Calls:
    """Its pickle calls a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


class Plain:
    """An object with attributes."""


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, getattr, np.load, np.fromfile])
def test_a_pickle_that_calls_a_function_is_refused_and_calls_nothing(
    tmp_path: Path, function: Any, protocol: int
) -> None:
    trap = tmp_path / "trap"
    data = pickle.dumps({"w": Calls(function, str(trap))}, protocol)
    with pytest.raises(RefusedPickle) as caught:
        loads(data)
    assert str(caught.value).endswith(function.__name__)
    assert not trap.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [Plain(), {1, 2}, np.array([Plain()]), np.array(["a"]), np.zeros(2, "f4,i4"), Path("a"), os.system],
)
def test_objects_that_are_no_arrays_of_numbers_are_refused(value: Any, protocol: int) -> None:
    with pytest.raises(RefusedPickle):
        loads(pickle.dumps({"w": value}, protocol))


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'false'\ntR.",
        b"(S'false'\nios\nsystem\n.",
        b"(cos\nsystem\nS'false'\no.",
        b"\x80\x02cos\nsystem\nS'false'\n\x85\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05false\x85R.",
        b"\x80\x04\x8c\x05numpy\x8c\x0ddtype.__new__\x93)R.",
        b"\x80\x02c__builtin__\neval\nS'1'\n\x85R.",
        # Attributes of a function, a class and a dict's class.
        b"\x80\x02cnumpy\ndtype\n}S'a'\nK\x01sb.",
        b"\x80\x02cnumpy\nndarray\n(N}S'__defaults__'\nNstb.",
        b"\x80\x02ccollections\nOrderedDict\nN}S'get'\nNs\x86b.",
        b"\x80\x02c_codecs\nencode\nS'a'\nS'zlib'\n\x86R.",
        b"\x80\x02\x82\x01.",
        b"(S'id'\nQ.",
        b"\x80\x05\x97.",
    ],
    ids=lambda program: repr(program[:40]),
)
def test_programs_by_hand_are_refused(program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda _command: pytest.fail("it was run"))
    with pytest.raises(RefusedPickle):
        loads(program)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"city,name\nOslo,Ada\n",
        b"import os\n",
        b"\x80\x02",
        b"\x80\x63}.",
        b"\x80\x02}h\x07.",
        pickle.dumps({"w": NUMBERS})[:-20],
        # Sizes that no memory has: a string, bytes, bytes that change, a frame, an entry of the memo.
        b"\x80\x02T\xff\xff\xff\x7fabc",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc",
        b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"abc",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"abc",
        b"\x80\x02}r\xff\xff\xff\xff",
    ],
    ids=lambda data: repr(data[:30]),
)  # fmt: skip
def test_what_is_damaged_or_no_pickle_is_an_error(data: bytes) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the unpickler raises many kinds
        loads(data)
    assert not isinstance(caught.value, (MemoryError, RefusedPickle))


def test_an_array_with_a_larger_shape_than_its_numbers_is_an_error() -> None:
    data = pickle.dumps({"w": NUMBERS.reshape(4, 16)}, 2)
    assert data.count(b"K\x04K\x10\x86") == 1
    large = data.replace(b"K\x04K\x10\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86")
    with pytest.raises(ValueError, match="another size than its shape"):
        only(large)


def test_an_array_without_its_state_is_an_error() -> None:
    data = b"\x80\x02}S'w'\ncnumpy.core.multiarray\n_reconstruct\n)Rs."
    with pytest.raises(ValueError, match="without numbers"):
        only(data)


WHOLE = pickle.dumps({"a": np.arange(6.0), "b": {"c": NUMBERS}}, 4)


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=4))
def test_no_changed_pickle_gives_anything_but_data_or_an_error(place: int, change: bytes) -> None:
    changed = WHOLE[:place] + change + WHOLE[place + len(change) :]
    try:
        found = loads(changed)
    except Exception:
        return
    assert isinstance(found, (dict, list, tuple, str, bytes, int, float, type(None), PickledArray)) or (
        callable(found) and found.__module__ == "training.networks.numpy_pickle"
    )
