"""A headless Chromium, spoken to through its two pipes: no port, no driver, nothing to install beside it."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
PATIENCE = 240.0  # seconds for one answer: the machine may be busy
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-zygote", "--single-process", "--disable-dev-shm-usage"),
    *("--in-process-gpu", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe"),
)


def chromium() -> str | None:
    """The browser's path: BOOTVIT_CHROMIUM, or one of the usual names on PATH."""
    return os.environ.get("BOOTVIT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._number, self._rest = read, write, 0, b""
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command's answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Load a page in a window of this size, and wait until its pictures are decoded."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Page.navigate", url=path.resolve().as_uri())
        until = time.monotonic() + PATIENCE
        while self.run("document.readyState + location.protocol") != "completefile:" and time.monotonic() < until:
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """What an expression evaluates to."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(until - time.monotonic(), 0))
            assert ready, "Chromium does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def page(browser: str) -> Iterator[Page]:
    """A tab of a browser that ends with it."""
    ours, theirs = os.pipe(), os.pipe()  # what we read, what it reads
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = f'exec "$0" "$@" 3<&{theirs[0]} 4>&{ours[1]}'
        process = subprocess.Popen(
            ["bash", "-c", command, browser, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs[0], ours[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs[0])
        os.close(ours[1])
        try:
            yield Page(ours[0], theirs[1])
        finally:
            process.kill()
            process.wait()
            os.close(ours[0])
            os.close(theirs[1])
