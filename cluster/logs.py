"""A job followed to its end: its log line by line, across lost connections, and what its end means."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from bootvit.addresses import public

LOST_S = 60.0  # without an answer while a job is followed, before it is given up as lost
PAUSE_S = 0.5  # between two attempts
CHATTER = re.compile(r"\S+ \S+\tINFO job_manager\.py:\d+ -- |Running entrypoint for job ")  # Ray's lines in a log


def follow(client: Any, name: str, out: Callable[[str], object] = sys.stdout.write) -> int:
    """Print the job's log until it ends; return 0, 2 for the user's mistake, 1 for any other failure.

    A lost connection is made again; after `LOST_S` seconds without an answer the client's error is raised
    (an `OSError` or a `RuntimeError`).
    """
    log = LogPrinter(out)
    answered = time.monotonic()
    while True:
        whole = asyncio.run(_tail(client, name, log))
        try:
            info = client.get_job_info(name)
            answered = time.monotonic()
            if info.status.is_terminal():
                if not whole:
                    log.rewind()
                    log.write(client.get_job_logs(name))
                log.close()
                return verdict(info, name)
        except (OSError, RuntimeError):
            if time.monotonic() - answered > LOST_S:
                raise
        time.sleep(PAUSE_S)


async def _tail(client: Any, name: str, log: LogPrinter) -> bool:
    """Print what comes until the log ends (True) or the connection is lost (False)."""
    from aiohttp import ClientError

    log.rewind()
    try:
        async for text in client.tail_job_logs(name):
            log.write(text)
    except (ClientError, OSError, RuntimeError):
        return False
    return True


class LogPrinter:
    """Prints a log that is sent from its beginning whenever the connection is made again, each line once."""

    def __init__(self, out: Callable[[str], object]) -> None:
        self._out = out
        self._seen = 0  # characters taken so far
        self._skip = 0  # characters that are sent again
        self._line = ""  # an incomplete last line, which may turn out to be Ray's

    def rewind(self) -> None:
        """The log begins again."""
        self._skip = self._seen

    def write(self, text: str) -> None:
        """Take the next piece of the log."""
        fresh = text[self._skip :]
        self._skip = max(0, self._skip - len(text))
        self._seen += len(fresh)
        *lines, self._line = (self._line + fresh).split("\n")
        self._print("".join(f"{line}\n" for line in lines if not CHATTER.match(line)))

    def close(self) -> None:
        """Print a last line that has no end."""
        self._print(f"{self._line}\n" if self._line else "")
        self._line = ""

    def _print(self, text: str) -> None:
        if text:
            self._out(text)
            sys.stdout.flush()


def verdict(info: Any, name: str) -> int:
    """The exit status for a job that has ended, with one line on stderr if it failed."""
    status, code = info.status.value, info.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        say(f"error: {name} was stopped before its end")
        return 1
    reason = " ".join((info.message or "no reason given").split())[:300]
    say(f"error: {name} failed: {reason if code is None else f'exit status {code}'}")
    return 2 if code == 2 else 1


def say(text: str) -> None:
    """One line on stderr."""
    print(f"bootvit: {public(text)}", file=sys.stderr, flush=True)
