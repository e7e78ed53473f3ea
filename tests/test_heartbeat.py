"""One driver trains a run: a second one sees its heartbeat, whatever machine it is on."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tiny

from bootvit.errors import RunFailed, UserError
from bootvit.heartbeat import Heartbeat, check_nobody_writes
from bootvit.runs import claim, take_lease


def beat(folder: Path, number: int, host: str, pid: int) -> None:
    (folder / "alive.json").write_text(json.dumps({"beat": number, "host": host, "pid": pid}))


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_that_is_trained_now_is_refused(tmp_path: Path) -> None:
    refused = rf"process {os.getpid()} on .* is training this run: .*--take-over"
    with Heartbeat(tmp_path, every=0.1), pytest.raises(UserError, match=refused):
        check_nobody_writes(tmp_path, look=5)
    check_nobody_writes(tmp_path, look=5)  # it has ended


def test_what_a_killed_process_of_another_machine_left_is_looked_at_and_then_taken(tmp_path: Path) -> None:
    beat(tmp_path, 7, "elsewhere.example", os.getpid())
    began = time.monotonic()
    check_nobody_writes(tmp_path, look=0.5)
    assert time.monotonic() - began >= 0.5


def test_what_a_killed_process_of_this_machine_left_costs_no_time(tmp_path: Path) -> None:
    beat(tmp_path, 7, socket.gethostname(), ended_process())
    began = time.monotonic()
    check_nobody_writes(tmp_path, look=30)
    assert time.monotonic() - began < 10


def test_workers_that_were_given_up_stop_when_others_have_started(tmp_path: Path) -> None:
    driver, _ = claim(tiny(ray__storage_path=str(tmp_path)), resume=False, overwrite=False)
    first = driver.for_this_group()
    first.check_lease()
    second = driver.for_this_group()
    second.check_lease()
    driver.check_lease()
    with pytest.raises(RunFailed, match="another process has taken over"):
        first.check_lease()
    take_lease(driver.path)
    for lost in (driver, second):
        with pytest.raises(RunFailed, match="another process has taken over"):
            lost.check_lease()
    with pytest.raises(RunFailed, match="another process has taken over"):
        driver.for_this_group()
