"""The loop under Ray Train: the command line on real workers, in one Ray for the whole file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from helpers import TINY, write

from bootvit import checkpoint
from bootvit.__main__ import main
from bootvit.config import dump_config, merge
from bootvit.load import make_config

SYNCED = {"model": {"agent": {"sync_norm": True}}, "data": {"batch_size": 31}, "precision": "fp64"}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(folder / "tiny.yaml", dump_config(make_config(merge(TINY, SYNCED), "tiny")))
        yield folder
    ray.shutdown()


def weights(run: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    return dict(checkpoint.load(saved)["learner"]["networks"])


def test_two_workers_train_the_model_of_one_process_and_count_alike(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "tiny.yaml", "ray.num_workers=2"]) == 0
    assert main(["train", "tiny.yaml", "name=alone", "--local"]) == 0
    two, one = weights(here / "runs" / "tiny"), weights(here / "runs" / "alone")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    results = [json.loads((here / "runs" / n / "result.json").read_text()) for n in ("tiny", "alone")]
    assert results[0]["final"] == results[1]["final"]

    capsys.readouterr()
    documents = []
    for arguments in (["--local", "data.eval_batch_size=997"], ["ray.num_workers=2", "data.eval_batch_size=7"]):
        assert main(["eval", "tiny", "--json", *arguments]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0] == documents[1]


def test_a_failure_on_the_workers_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.yaml", "name=bad", "optim.lr=1e300", "optim.clip_norm=null"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "not finite at step" in lines[0]
    assert json.loads((here / "runs" / "bad" / "result.json").read_text())["status"] == "failed"
    assert main(["train", "tiny.yaml", "name=greedy", "ray.num_workers=2", "ray.cpus_per_worker=4000"]) == 2
    assert "the cluster has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sent", "local"),
    [
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.cluster),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.cluster),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.cluster),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.cluster),
    ],
)
def test_ctrl_c_or_a_polite_kill_leaves_a_run_that_goes_on(
    sent: signal.Signals, local: bool, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        f"name={sent.name}-{local}",
        "schedule.epochs=100",
        "schedule.eval_every=100",
        *(["--local"] if local else []),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "bootvit", "train", "tiny.yaml", *arguments],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = here / "runs" / f"{sent.name}-{local}"
    while process.poll() is None and checkpoint.newest(run / "checkpoints") is None:
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    lines = err.splitlines()
    if lines[0] == "bootvit: stops after this step, with a checkpoint (again: at once)":  # else it was evaluating
        del lines[0]
    assert lines == [f"{run}: the same command with --resume goes on", "bootvit: interrupted"]
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert 0 < result["epochs"] < 100
    assert main(["train", "tiny.yaml", *arguments, *([] if local else ["--local"]), "--resume"]) == 0


@pytest.mark.cluster
def test_a_long_temporary_folder_is_no_obstacle(here: Path) -> None:
    long = here / ("x" * 100)
    long.mkdir()
    command = [sys.executable, "-m", "bootvit", "train", "tiny.yaml", "name=long", "schedule.epochs=1"]
    done = subprocess.run(
        command, cwd=here, env=os.environ | {"TMPDIR": str(long)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
