"""What may be asked of a run between two of its steps: to save now, or to save and stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist


class Ask(IntEnum):
    """The larger one counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2  # after saving


Asked = Callable[[], Ask]  # what is asked now; a SAVE is told once


def nothing() -> Ask:
    """For runs that nobody asks."""
    return Ask.NOTHING


class Agreement:
    """What any worker is asked, known to all of them one step later; their steps do not wait for it."""

    def __init__(self, size: int) -> None:
        import torch
        import torch.distributed as dist

        self._group: Any = dist.new_group(backend="gloo") if size > 1 else None
        self._value = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def of_all(self, mine: Ask) -> Ask:
        """The largest of the asks that the workers had at their last call; with one worker, of this one."""
        if self._group is None:
            return mine
        import torch.distributed as dist

        agreed = Ask.NOTHING
        if self._work is not None:
            self._work.wait()
            agreed = Ask(int(self._value))
        self._value.fill_(mine)
        self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed


def raise_on_sigterm() -> None:
    """A polite kill ends a run like Ctrl-C: recorded as interrupted."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)


@contextmanager
def on_signals(first: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C or SIGTERM calls `first`, and a second one raises KeyboardInterrupt; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal told
        if told:
            raise KeyboardInterrupt
        told = True
        first()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say_stopping() -> None:
    """The line that answers the first signal."""
    print("bootvit: stops after this step, with a checkpoint (again: at once)", file=sys.stderr, flush=True)


@contextmanager
def deferring_signals(asked: Asked) -> Iterator[Asked]:
    """Ctrl-C and SIGTERM become an ask to stop, beside what `asked` says, as long as this lasts."""
    stop = False

    def note() -> None:
        nonlocal stop
        stop = True
        say_stopping()

    with on_signals(note):
        yield lambda: Ask.STOP if stop else asked()
    if stop:  # came too late to be looked at
        raise KeyboardInterrupt
