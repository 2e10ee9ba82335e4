"""The standard streams of the command: UTF-8, and usable when closed or broken.

Another encoding is used if PYTHONIOENCODING asks for it.

A command ends by its own outcome. Where the reader of its output has gone (`| head`), or none was there from
the beginning (`>&-`, a windowed launcher), it goes on, and what it prints goes nowhere.
"""

import codecs
import io
import json
import os
import sys
from typing import Any, Final

# Set for the program that is started anew, so that it is not started again.
_RESTARTED_VARIABLE: Final = "FACEPRINT_RESTARTED_IN_UTF8"


# How letters that an encoding lacks are written: as JSON writes them, since what is printed may be JSON.
_ERROR_HANDLER: Final = "faceprint-escaped"

# A line with letters that many encodings lack, and one that all do. It is longer than a host's name may be.
_SAMPLE_TEXT: Final = f"{'name..: ' * 16}\u00e9\u9854\U0001f642\udcff\n"


def restart_in_utf8() -> None:
    """Starts the program anew in Python's UTF-8 mode where the locale has another encoding.

    Otherwise names of files that are UTF-8 could neither be told from others nor be stored as they are.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8" or _RESTARTED_VARIABLE in os.environ:
        return
    if not sys.executable or getattr(sys, "frozen", False):
        return
    environment = {**os.environ, "PYTHONUTF8": "1", _RESTARTED_VARIABLE: "1"}
    arguments = [sys.orig_argv[0], "-X", "utf8", *sys.orig_argv[1:]]
    try:
        os.execve(sys.executable, arguments, environment)
    except OSError:
        # It goes on in the locale's encoding; names that cannot be told are rejected one by one.
        return


def prepare() -> None:
    """Puts streams in place of closed ones, and lets the others outlive their readers."""
    for descriptor in range(3):
        _open_if_closed(descriptor)
    codecs.register_error(_ERROR_HANDLER, _escape)
    sys.stdout = _prepared(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _prepared(sys.stderr, sys.__stderr__, 2)


def lost() -> OSError | None:
    """Why a part of what was printed was not written, such as for a full disk; None where nothing is known.

    A reader that has gone is no reason: it wanted no more.
    """
    stream: Any = sys.stdout
    try:
        stream.flush()
    except OSError as error:
        return error
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Output) else None


class _Output(io.FileIO):
    """A descriptor for writing; from the first failure on, what is written goes nowhere."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _discard(self.fileno())
        except OSError as error:
            self.error = error
            _discard(self.fileno())
        return memoryview(data).nbytes


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _prepared(stream: Any, original: Any, descriptor: int) -> Any:
    if stream is not original:
        # A program's own, or a test's.
        if isinstance(stream, io.TextIOWrapper) and _escapes(stream.encoding):
            stream.reconfigure(errors=_ERROR_HANDLER)
        return stream
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        encoding=_encoding(stream),
        # An encoding that lacks a letter of a name gets its code instead of an error.
        errors=_ERROR_HANDLER,
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def _encoding(stream: Any) -> str:
    """That of a stream; UTF-8 for ASCII, which click takes for a mistake too and overrules.

    It is UTF-8 too for a codec that is none for texts, such as idna, which is for names of hosts.
    """
    encoding: str = getattr(stream, "encoding", "utf-8")
    return encoding if codecs.lookup(encoding).name != "ascii" and _escapes(encoding) else "utf-8"


def _escapes(encoding: str) -> bool:
    """Whether an encoding takes any text, with letters that it lacks written as `_ERROR_HANDLER` has them."""
    try:
        codecs.getincrementalencoder(encoding)(_ERROR_HANDLER).encode(_SAMPLE_TEXT, True)
    except (UnicodeError, LookupError):
        return False
    return True


def _open_if_closed(descriptor: int) -> None:
    """Takes a closed descriptor, so that no file that is opened later gets it and is printed into."""
    try:
        os.fstat(descriptor)
    except OSError:
        _discard(descriptor)


def _discard(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == descriptor:
        os.set_inheritable(nowhere, True)
    else:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
