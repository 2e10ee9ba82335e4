"""The standard streams of the command line: UTF-8, and usable when closed or broken.

PYTHONIOENCODING selects another encoding.

The exit code of a command is its own result. Where the reader of its output has closed the pipe (`| head`),
or the stream was closed from the start (`>&-`, a windowed launcher), the command continues and its output is
discarded.
"""

import codecs
import io
import json
import os
import sys
from typing import Any, Final

# Set in the environment of the restarted program, so that it does not restart again.
_RESTARTED_VARIABLE: Final = "FACEPRINT_RESTARTED_IN_UTF8"


# The error handler that writes characters missing in an encoding as JSON escapes: the output may be JSON.
_ERROR_HANDLER: Final = "faceprint-escaped"

# A line with characters that many encodings lack, and one that all lack; longer than a host name can be.
_SAMPLE_TEXT: Final = f"{'name..: ' * 16}\u00e9\u9854\U0001f642\udcff\n"


def restart_in_utf8() -> None:
    """Restarts the program in Python's UTF-8 mode where the locale has another encoding.

    Otherwise file names in UTF-8 could neither be distinguished from others nor be stored unchanged.
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
        # Continue in the encoding of the locale; ambiguous names are rejected one by one.
        return


def prepare() -> None:
    """Replaces closed streams, and makes the others survive the end of their readers."""
    for descriptor in range(3):
        _open_if_closed(descriptor)
    codecs.register_error(_ERROR_HANDLER, _escape)
    sys.stdout = _prepared(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _prepared(sys.stderr, sys.__stderr__, 2)


def lost() -> OSError | None:
    """Returns the error that lost a part of the output, such as a full disk; None where none is known.

    A closed pipe is not an error: its reader wanted no more.
    """
    stream: Any = sys.stdout
    try:
        stream.flush()
    except OSError as error:
        return error
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Output) else None


class _Output(io.FileIO):
    """A raw output stream; from the first failure on, writes are discarded."""

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
        # A stream that the embedding program or a test has set.
        if isinstance(stream, io.TextIOWrapper) and _escapes(stream.encoding):
            stream.reconfigure(errors=_ERROR_HANDLER)
        return stream
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        encoding=_encoding(stream),
        # A character that the encoding lacks is written as an escape instead of an error.
        errors=_ERROR_HANDLER,
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def _encoding(stream: Any) -> str:
    """Returns the encoding of a stream; UTF-8 in place of ASCII, which click overrules as a mistake too.

    It is also UTF-8 in place of a codec that is not for text, such as idna, which is for host names.
    """
    encoding: str = getattr(stream, "encoding", "utf-8")
    return encoding if codecs.lookup(encoding).name != "ascii" and _escapes(encoding) else "utf-8"


def _escapes(encoding: str) -> bool:
    """Returns whether an encoding accepts any text, with missing characters written by `_ERROR_HANDLER`."""
    try:
        codecs.getincrementalencoder(encoding)(_ERROR_HANDLER).encode(_SAMPLE_TEXT, True)
    except (UnicodeError, LookupError):
        return False
    return True


def _open_if_closed(descriptor: int) -> None:
    """Opens a closed standard descriptor on /dev/null, so that no later file gets it and receives output."""
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
