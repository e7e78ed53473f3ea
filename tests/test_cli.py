"""The command line: every kind of bad input is one line on stderr and status 2, and nothing is started."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY, write
from PIL import Image

from bootvit.__main__ import main
from bootvit.config import dump_config, merge
from bootvit.load import make_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    return tmp_path


def image(path: Path, size: tuple[int, int] = (8, 8), shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)
    return path


def folder_of_images(root: Path) -> Path:
    for label in ("a", "b"):
        for split in ("train", "test"):
            for i in range(3):
                image(root / split / label / f"{i}.png", shade=40 * i)
    return root


FOLDER = "data={source: imagefolder, root: images, image_size: 8, augment: crop, fraction: 1.0}"


def broken_jpeg(here: Path) -> None:
    folder_of_images(here / "images")
    good = image(here / "x.jpg", (64, 64)).read_bytes()
    (here / "images" / "train" / "a" / "0.png").write_bytes(good[: len(good) // 2])


def unequal_sizes(here: Path) -> None:
    folder_of_images(here / "images")
    image(here / "images" / "train" / "a" / "9.png", (9, 8))


def empty_class(here: Path) -> None:
    folder_of_images(here / "images")
    (here / "images" / "train" / "c").mkdir()


def other_classes(here: Path) -> None:
    folder_of_images(here / "images")
    image(here / "images" / "test" / "z" / "0.png")


def finished_run(here: Path) -> None:
    assert main(["train", "tiny.yaml", "--local", "schedule.epochs=1"]) == 0


def broken_result(here: Path) -> None:
    write(here / "runs" / "tiny" / "config.yaml", (here / "tiny.yaml").read_text())
    write(here / "runs" / "tiny" / "result.json", "{")


def no_checkpoint(here: Path) -> None:
    write(here / "runs" / "tiny" / "config.yaml", (here / "tiny.yaml").read_text())


def text_as_image(here: Path) -> None:
    finished_run(here)
    write(here / "cat.jpg", "not a cat")


def nothing(here: Path) -> None: ...


BAD = [
    (nothing, ["train"], "Missing argument"),
    (nothing, ["trian", "tiny.yaml"], "trian"),
    (nothing, ["train", "tiny.yaml", "--lokal"], "--lokal"),
    (nothing, ["train", "nowhere.yaml", "--local"], "nowhere.yaml: no such config file"),
    (nothing, ["train", "tiny.yaml", "--local", "data.fractoin=1"], "did you mean 'data.fraction'"),
    (nothing, ["train", "tiny.yaml", "--local", "data.fraction=0"], "data.fraction=0"),
    (nothing, ["train", "tiny.yaml", "--local", "seed=x"], "seed"),
    (nothing, ["train", "tiny.yaml", "--local", "data.batch_size"], "expected KEY=VALUE"),
    (nothing, ["train", "tiny.yaml", "--local", "model.vit.patch=3"], "does not divide data.image_size"),
    (nothing, ["train", "tiny.yaml", "--local", "model.vit.heads=7"], "does not divide the width"),
    (nothing, ["train", "tiny.yaml", "--local", "model.vit.heads=2", "method=shared"], "cannot place 2 heads"),
    (nothing, ["train", "tiny.yaml", "--local", "ray.num_workers=2"], "--local is one process"),
    (nothing, ["train", "tiny.yaml", "--local", "ray.use_gpu=true"], "no CUDA device"),
    (nothing, ["train", "tiny.yaml", "--local", "data.source=parquet"], "data.root"),
    (nothing, ["train", "tiny.yaml", "--local", "data.source=cifar10", "data.root=gone"], "gone"),
    (nothing, ["train", "tiny.yaml", "--local", "data.num_classes=3"], "num_classes"),
    (broken_jpeg, ["train", "tiny.yaml", "--local", FOLDER], "0.png"),
    (unequal_sizes, ["train", "tiny.yaml", "--local", FOLDER], "9.png"),
    (empty_class, ["train", "tiny.yaml", "--local", FOLDER], "train/c: the class folder holds no images"),
    (other_classes, ["train", "tiny.yaml", "--local", FOLDER], "z"),
    (finished_run, ["train", "tiny.yaml", "--local"], "a run of this name exists"),
    (finished_run, ["eval", "tiny", "--local", "data.fractoin=1"], "did you mean 'data.fraction'"),
    (broken_result, ["train", "tiny.yaml", "--local", "--resume"], "result.json: not readable as JSON"),
    (no_checkpoint, ["eval", "tiny", "--local"], "no usable checkpoint"),
    (nothing, ["eval", "gone", "--local"], "gone: no run is there"),
    (text_as_image, ["predict", "tiny", "cat.jpg", "dog.jpg"], "dog.jpg: no such file"),
    (nothing, ["report"], "runs"),
    (nothing, ["data", "info", "tiny.yaml", "data.source=imagefolder", "data.root=none"], "none"),
]


@pytest.mark.parametrize(("prepare", "command", "expected"), BAD, ids=lambda v: None)
def test_bad_input(prepare, command: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
    prepare(here)
    before = sorted((here / "runs").rglob("*")) if (here / "runs").exists() else []
    capsys.readouterr()
    status = main(command)
    seen = capsys.readouterr()
    assert status == 2
    lines = seen.err.strip().splitlines()
    assert len(lines) == 1, seen.err
    assert lines[0].startswith("bootvit: error: ")
    assert expected in lines[0]
    if prepare not in (broken_jpeg, unequal_sizes):  # found when training has been announced
        assert seen.out == ""
    after = sorted((here / "runs").rglob("*")) if (here / "runs").exists() else []
    if "train" not in command or prepare in (nothing, finished_run, broken_result):
        assert after == before


def test_train_evaluate_and_predict(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.yaml", "--local", "schedule.epochs=2"]) == 0
    result = json.loads((here / "runs" / "tiny" / "result.json").read_text())
    capsys.readouterr()
    documents = []
    for size in (7, 64, 997):
        assert main(["eval", "tiny", "--local", "--json", f"data.eval_batch_size={size}"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0] == documents[1] == documents[2]
    for net in ("vit", "agent"):
        assert set(documents[0][net]) > {"correct", "correct5", "total", "top1", "top5"}
        assert documents[0][net]["top1"] == result["final"][net]["top1"]
    image(here / "seven.png", (20, 30))
    assert main(["predict", "tiny", "seven.png", "--json"]) == 0
    guesses = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [g["network"] for g in guesses] == ["vit", "agent"]
    assert len(guesses[0]["classes"]) == 5
    assert main(["train", "tiny.yaml", "--local", "--resume", "schedule.epochs=2"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_failed_run_is_status_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.yaml", "--local", "optim.lr=1e30", "optim.clip_norm=null"]) == 1
    assert "not finite at step" in capsys.readouterr().err.splitlines()[-1]
    result = json.loads((here / "runs" / "tiny" / "result.json").read_text())
    assert result["status"] == "failed"
    assert "not finite" in result["reason"]


def test_a_full_disk_is_one_line_that_names_the_file_and_resume_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sync = os.fsync

    def full(fd: int) -> None:
        if os.fstat(fd).st_size > 20_000:  # of all that a run writes only its checkpoints are so large
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(fd)

    command = ["train", "tiny.yaml", "name=full", "--local"]
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        assert main(command) == 1
    error = capsys.readouterr().err
    assert "--resume goes on" in error
    assert "Traceback" not in error
    path = here / "runs" / "full" / "checkpoints" / "step-00000004.safetensors"
    assert error.splitlines()[-1] == f"bootvit: failed: [Errno 28] No space left on device: '{path}'"
    assert json.loads((here / "runs" / "full" / "result.json").read_text())["status"] == "failed"
    assert main([*command, "--resume"]) == 0


def test_an_error_that_is_not_the_machines_is_not_made_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(fd: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(os, "fsync", wrong)
    with pytest.raises(OSError, match="Bad file descriptor"):
        main(["train", "tiny.yaml", "name=wrong", "--local"])


def test_the_printed_config_is_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "tiny.yaml", "data.fraction=0.2"]) == 0
    printed = capsys.readouterr().out
    write(here / "again.yaml", printed)
    assert main(["config", "again.yaml"]) == 0
    assert capsys.readouterr().out == printed
    assert make_config(merge(TINY, {"data": {"fraction": 0.2}}), "x").data.fraction == 0.2


def test_local_training_imports_neither_ray_nor_mlflow(here: Path) -> None:
    code = (
        "import sys\n"
        "from bootvit.__main__ import main\n"
        "status = main(['train', 'tiny.yaml', '--local', 'schedule.epochs=1'])\n"
        "assert not {'ray', 'mlflow'} & set(sys.modules), 'imported'\n"
        "sys.exit(status)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here)


# --------------------------------------------------------------------------------------------- light imports

HEAVY = "torch torchvision timm ray mlflow pandas matplotlib pyarrow sklearn"
IMPORTED = """
import sys
from bootvit.__main__ import main
assert main(sys.argv[2:]) == 0
print([name for name in sys.argv[1].split() if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "command", [["--help"], ["train", "--help"], ["config", "digits/joint"], ["config", "imagenet/shared-base-5pct"]]
)
def test_what_only_prints_imports_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED, HEAVY, *command], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    "order",
    ["bootvit, timm", "timm, bootvit", "bootvit, importlib.util; importlib.util.find_spec('timm'); import timm"],
)
def test_importing_bootvit_registers_its_models_with_timm_whichever_comes_first(order: str) -> None:
    code = f"import {order}; timm.create_model('bootvit_small_distilled_patch16_224', depth=1)"
    subprocess.run([sys.executable, "-c", code], check=True)
