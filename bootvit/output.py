"""What a command prints: it outlives its reader and its terminal's encoding, and JSON is JSON."""

from __future__ import annotations

import codecs
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

READER_GONE = 141  # 128 + SIGPIPE: what a shell reports of a tool whose reader has left
ENCODING_ERRORS = "bootvit-as-it-can"


def print_json(document: Any, *, line: bool = False) -> None:
    """One JSON document, indented or in one `line`.

    JSON has no nan and no infinities: they become null. NumPy's and torch's scalars are numbers.
    A name that is not UTF-8 keeps its bytes as escaped surrogates, from which Python gets them back.
    """
    print(json.dumps(_plain(document), indent=None if line else 2, allow_nan=False), flush=line)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return os.fspath(value)  # a path; a TypeError for what has no place in JSON


class LastingStream:
    """A text stream whose reader may leave: from then on what is written is dropped, or the command ends quietly."""

    def __init__(self, stream: TextIO, *, needed: bool) -> None:
        self._stream, self._needed = stream, needed
        self._failed: OSError | None = None  # raised again: typer swallows what its first look at a stream raises

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; `SystemExit(141)` where the output is all that the command is for, and nobody reads it."""
        self._raise_failed()
        try:
            return self._stream.write(text)
        except OSError as err:
            self._drop(err)
            return len(text)

    def flush(self) -> None:
        """The same for what is still held back."""
        self._raise_failed()
        try:
            self._stream.flush()
        except OSError as err:
            self._drop(err)

    def _drop(self, err: OSError) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())  # also for what Python flushes when it ends
        os.close(nothing)
        if self._needed and isinstance(err, BrokenPipeError):
            raise SystemExit(READER_GONE) from None
        if self._needed:  # such as a full disk under a redirected output
            self._failed = err
            raise err

    def _raise_failed(self) -> None:
        if self._failed is not None:
            raise self._failed


@contextmanager
def lasting_output(*, needed: bool) -> Iterator[None]:
    """Standard output and standard error that cannot end a command which does more than print.

    Where the output is `needed`, as by `models` or `predict`, its end is the command's end. Otherwise the command goes
    on without a reader, and also without its terminal (SIGHUP).
    """
    codecs.register_error(ENCODING_ERRORS, _as_it_can)
    before = sys.stdout, sys.stderr
    sys.stdout = _lasting(sys.stdout, 1, needed=needed)
    sys.stderr = _lasting(sys.stderr, 2, needed=False)
    hangup = None
    if not needed and threading.current_thread() is threading.main_thread():
        hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # for Ray's processes too, which inherit it
    try:
        yield
    finally:
        if hangup is not None:
            signal.signal(signal.SIGHUP, hangup)
        with suppress(OSError):  # one that matters was raised and told of before
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None, descriptor: int, *, needed: bool) -> TextIO:
    if stream is None:  # closed before we were started; a file opened now would get its descriptor
        stream = _opened(descriptor)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors=ENCODING_ERRORS)
    return cast(TextIO, LastingStream(stream, needed=needed))


def _opened(descriptor: int) -> TextIO:
    try:
        os.fstat(descriptor)
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        if nothing != descriptor:
            os.dup2(nothing, descriptor)
            os.close(nothing)
    return open(os.devnull, "w", encoding="utf-8")  # for the rest of the process


def _as_it_can(err: UnicodeError) -> tuple[str | bytes, int]:
    """A name that is not UTF-8 as its own bytes; what the encoding lacks as an escape, such as \\xe4."""
    try:
        return codecs.lookup_error("surrogateescape")(err)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(err)
