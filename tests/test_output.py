"""What is printed: a reader that leaves, a full disk below it, a poor encoding; and JSON that is JSON."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, tiny, write

from bootvit.__main__ import main
from bootvit.config import dump_config
from bootvit.load import make_config
from bootvit.output import print_json
from bootvit.progress import follow_progress
from bootvit.runs import RunFolder
from bootvit.tracking import Journal, Record

BOOTVIT = [sys.executable, "-m", "bootvit"]
TRAIN = ["train", "tiny.yaml", "--local", "schedule.epochs=1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    return tmp_path


def without_reader(arguments: list[str], here: Path, *, err: bool = False) -> tuple[int, str]:
    """Run a command into a pipe that nobody reads; its status and what it says on standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    out = {"stdout": writer, "stderr": writer if err else subprocess.PIPE}
    try:
        done = subprocess.run([*BOOTVIT, *arguments], cwd=here, text=True, check=False, **out)  # type: ignore[call-overload]
    finally:
        os.close(writer)
    return done.returncode, done.stderr or ""


def status(run: Path) -> Any:
    return json.loads((run / "result.json").read_text())["status"]


@pytest.mark.parametrize("err", [pytest.param(False, marks=pytest.mark.slow), True], ids=["stdout", "both"])
def test_a_run_outlives_the_reader_of_its_output(err: bool, here: Path) -> None:
    assert without_reader(TRAIN, here, err=err) == (0, "")
    assert status(here / "runs" / "tiny") == "finished"


@pytest.mark.parametrize("closed", [">&- 2>&-", pytest.param(">/dev/full", marks=pytest.mark.slow)])
def test_a_run_needs_no_output_at_all(closed: str, here: Path) -> None:
    command = " ".join([*BOOTVIT, *TRAIN, closed])
    done = subprocess.run(command, shell=True, cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert status(here / "runs" / "tiny") == "finished"


def test_a_run_outlives_its_terminal(here: Path) -> None:
    process = subprocess.Popen(
        [*BOOTVIT, *TRAIN[:3], "schedule.epochs=40"], cwd=here, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (here / "runs" / "tiny" / "lease.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=120)[1] == ""
    assert (process.returncode, status(here / "runs" / "tiny")) == (0, "finished")


@pytest.mark.parametrize("command", [["configs"], ["data", "fraction", "tiny.yaml", "--keys"]])
def test_a_command_that_only_prints_ends_with_its_reader(command: list[str], here: Path) -> None:
    assert without_reader(command, here) == (141, "")


def test_an_output_that_cannot_be_written_is_one_line(here: Path) -> None:
    line = " ".join([*BOOTVIT, "config", "tiny.yaml", ">/dev/full"])
    done = subprocess.run(line, shell=True, cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "bootvit: failed: [Errno 28] No space left on device\n")


@pytest.mark.slow
def test_a_name_that_the_encoding_lacks_is_replaced(here: Path) -> None:
    command = [*BOOTVIT, *TRAIN, "ray.storage_path=Käfer", "--resume"]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    for printed in (b"epoch 1/1", b"K\\xe4fer/tiny is finished; nothing to do"):
        done = subprocess.run(command, cwd=here, capture_output=True, env=env, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert printed in done.stdout
        assert b"| vit " in done.stdout


# ----------------------------------------------------------------------------------------------------- JSON


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_printed_json_is_json_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {
            "floats": [1.5, math.nan, math.inf, -math.inf, np.float32(0.5), np.float64("nan"), torch.tensor(0.25)],
            "array": np.array([[1, 2]]),
            np.int64(3): (np.int64(4), np.bool_(True), None, True),
            "path": Path("a/b"),
            "name": os.fsdecode(b"caf\xe9.png"),
        }
    )
    document = strict(capsys.readouterr().out)
    assert document == {
        "floats": [1.5, None, None, None, 0.5, None, 0.25],
        "array": [[1, 2]],
        "3": [4, True, None, True],
        "path": "a/b",
        "name": "caf\udce9.png",
    }
    assert os.fsencode(document["name"]) == b"caf\xe9.png"
    with pytest.raises(TypeError):
        print_json({"what": object()})


def test_a_report_of_a_result_that_is_not_finite_is_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TRAIN) == 0
    path = here / "runs" / "tiny" / "result.json"
    path.write_text(path.read_text().replace('"top1": ', '"top1": NaN, "was": '))
    capsys.readouterr()
    assert main(["report", "--json"]) == 0
    assert strict(capsys.readouterr().out)


# ---------------------------------------------------------------------------------------- one line, no traceback


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(20, "Not a directory", "x"), OSError(24, "Too many open files")]
)
def test_the_machines_errors_are_one_line(
    error: Exception, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_it(*_: object) -> None:
        raise error

    monkeypatch.setattr("bootvit.load.load_config", raise_it)
    assert main(["config", "tiny.yaml"]) == (2 if getattr(error, "errno", 0) == 20 else 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bootvit: ")


def test_ctrl_c_while_the_packages_are_imported_is_one_line(here: Path) -> None:
    write(here / "early" / "timm.py", "raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(here / "early"), *sys.path])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([*BOOTVIT, "models"], env=env, cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "bootvit: interrupted\n")


# ------------------------------------------------------------------------------------------------- progress


def test_progress_goes_on_in_a_journal_that_was_cut(tmp_path: Path) -> None:
    """As a resumed run cuts it, after its old lines were read; the new ones are of another length."""
    folder, out, stop = RunFolder(tmp_path), io.StringIO(), threading.Event()
    journal = Journal(folder.journal)
    journal.write([Record(step, step, "test/vit/top1", 10.0 + step, float(step)) for step in (1, 2)])
    thread = threading.Thread(target=follow_progress, args=(tiny(), folder, stop, 15, out))
    thread.start()
    while "epoch 2/" not in out.getvalue():
        time.sleep(0.01)
    journal.cut(1)
    journal.write([Record(step, step, "test/vit/top1", 40.12345678 + step, 10.0 + step) for step in (2, 3)])
    stop.set()
    thread.join()
    assert [line.split("  ")[1:3] for line in out.getvalue().splitlines()] == [
        ["epoch 2/3", "test vit 11.0%"],
        ["epoch 3/3", "test vit 42.1%"],
        ["epoch 4/3", "test vit 43.1%"],
    ]


def test_the_bar_moves_with_the_steps_within_an_epoch_and_fits_80_columns() -> None:
    from rich.console import Console

    from bootvit.progress import _Bar

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    with _Bar(tiny(name="a-rather-long-name-of-a-run"), 300, console) as view:
        view.show([Record(20, 0, "train/vit/loss", 1.25, 0.0), Record(20, 0, "train/images_per_second", 310.4, 0.0)])
        assert view.bar.tasks[0].completed == 20
        losses = [Record(40, 0, f"train/{net}/loss", 11.0625, 1.0) for net in ("vit", "agent")]
        view.show([*losses, Record(40, 0, "train/lr", 0.00036, 1.0)])
        assert view.bar.tasks[0].completed == 40
        scores = [
            Record(100, 0, f"{split}/vit/top1", top1, 2.0) for split, top1 in (("test", 45.0), ("held_out", 44.0))
        ]
        view.show([*scores, Record(100, 0, "epoch", 1.0, 2.0)])
        view.live.refresh()
    text = out.getvalue()
    assert "epoch 2/3" in text
    assert "310 images/s loss vit 11.062 agent 11.062 rate 0.00036" in " ".join(text.split())
    assert "epoch 1/3  test vit 45.0%  held-out vit 44.0%" in text
    assert "100/300" in text
    assert max(map(len, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines())) <= 80
