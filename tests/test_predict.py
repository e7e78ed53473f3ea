"""`predict`: the pixels and the answers of the evaluation, a batch at a time, whatever single files are like."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ONE, TINY
from PIL import Image

from bootvit import checkpoint
from bootvit.__main__ import main
from bootvit.config import Config, merge
from bootvit.data import DataFacts, open_splits
from bootvit.data.batches import EvalBatches
from bootvit.data.decode import RGB_READING
from bootvit.driver import train
from bootvit.errors import UserError
from bootvit.evaluate import read_checkpoint
from bootvit.learner import Learner
from bootvit.load import make_config
from bootvit.predict import of_files, predict
from bootvit.runs import open_run

MakeRun = Callable[..., tuple[Config, Path]]


def picture(kind: int, number: int, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng([kind, number]).normal(0, 15, (*size, 3))
    return Image.fromarray(np.clip(np.eye(3)[kind] * 200 + noise, 0, 255).astype(np.uint8))


def folders(root: Path, size: Callable[[int], tuple[int, int]]) -> None:
    for kind, name in enumerate(("cat", "dog")):
        for split, first in (("train", 0), ("test", 100)):
            for number in range(first, first + 4):
                path = root / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(kind, number, size(number % 100)).save(path)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """Trains a tiny run on pictures of these sizes and returns its config and folder."""
    monkeypatch.chdir(tmp_path)

    def make(size: Callable[[int], tuple[int, int]] = lambda number: (16, 16), **data: Any) -> tuple[Config, Path]:
        folders(tmp_path / "images", size)
        section = {"source": "imagefolder", "root": "images", "image_size": 16, "batch_size": 4, "fraction": 1.0}
        changes = {"data": section | data, "schedule": {"epochs": 1}, "model": {"vit": {"patch": 4}}}
        config = make_config(merge(TINY, changes), "test")
        train(config, local=True)
        return open_run("tiny")[0], tmp_path / "runs" / "tiny"

    return make


def sizes(number: int) -> tuple[int, int]:
    return 40 + 9 * number, 64


@pytest.mark.parametrize(
    ("size", "data", "kind"),
    [
        (sizes, {}, "centre_crop"),
        (lambda number: (16, 16), {}, "resize"),
        (lambda number: (120, 100), {}, "centre_crop"),
        (lambda number: (120, 100), {"augment": "crop"}, "resize"),
        (lambda number: (20, 30), {"augment": "none", "resize": "pil"}, "resize"),
    ],
    ids=["small and unequal", "small", "large", "large but cropped", "small, not augmented"],
)
def test_the_pixels_are_those_of_the_evaluation(trained: MakeRun, size: Any, data: dict[str, Any], kind: str) -> None:
    config, run_dir = trained(size, **data)
    facts = DataFacts.from_dict(read_checkpoint(run_dir)["data"])
    assert facts.preparation.kind == kind
    test = open_splits(config.data).test
    assert test is not None
    wanted = torch.cat([b.images for b in EvalBatches(test, config, rank=0, world=1, device="cpu")])
    paths = [Path("images/test") / key for key in test.keys]
    files = of_files(paths, facts, RGB_READING)
    got = torch.cat([b.images for b in EvalBatches(files, config, facts.preparation, rank=0, world=1, device="cpu")])
    assert torch.equal(got, wanted)


def test_the_answers_are_those_that_the_evaluation_counts(trained: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    config, run_dir = trained()
    capsys.readouterr()
    assert main(["eval", "tiny", "--local", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    rows = list(predict(config, run_dir, [Path("images/test")]))
    for net in ("vit", "agent"):
        right = [max(r["classes"], key=r["classes"].get) in r["image"] for r in rows if r["network"] == net]
        assert (len(right), sum(right)) == (8, counts[net]["correct"])


@pytest.mark.parametrize(("size", "data"), [(sizes, {}), (lambda number: (20, 30), {})], ids=["cropped", "resized"])
def test_the_probabilities_are_those_of_the_evaluations_pixels(trained: MakeRun, size: Any, data: Any) -> None:
    config, run_dir = trained(size, **data)
    test = open_splits(config.data).test
    assert test is not None
    learner = Learner(config, 2, ONE)
    learner.networks.load_state_dict(read_checkpoint(run_dir)["learner"]["networks"])
    learner.networks.eval()
    (batch,) = EvalBatches(test, config, rank=0, world=1, device="cpu")
    with torch.no_grad():
        wanted = learner.networks.features(batch.images)["agent"].logits.softmax(1)
    rows = predict(config, run_dir, [Path("images/test") / key for key in test.keys])
    got = [[row["classes"][name] for name in ("cat", "dog")] for row in rows if row["network"] == "agent"]
    torch.testing.assert_close(torch.tensor(got), wanted, atol=2e-6, rtol=0)


def test_bad_files_are_reported_and_the_others_answered(
    trained: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a.png").write_text("<!DOCTYPE html>")
    picture(0, 7, (30, 20)).save(tmp_path / "odd" / "b.png")
    (tmp_path / "odd" / "c.png").write_bytes(b"")
    for size in (1, 2, 128):
        (run_config := tmp_path / "runs/tiny/config.yaml").write_text(
            run_config.read_text().replace("eval_batch_size: 200", f"eval_batch_size: {size}")
        )
        capsys.readouterr()
        assert main(["predict", "tiny", "odd", "images/test/dog/100.png", "--json"]) == 1
        seen = capsys.readouterr()
        rows = [json.loads(line) for line in seen.out.splitlines()]
        assert [(Path(r["image"]).name, "error" in r) for r in rows] == [
            ("a.png", True),
            *[("b.png", False)] * 2,
            ("c.png", True),
            *[("100.png", False)] * 2,
        ]
        assert [line.split(": ")[3] for line in seen.err.splitlines()] == [
            "not an image, or one of an unknown format",
            "no bytes",
        ]
        assert all(line.startswith("bootvit: failed: odd/") for line in seen.err.splitlines())
    assert main(["predict", "tiny", "odd/a.png"]) == 1


def test_images_come_by_stdin_and_answers_as_csv(
    trained: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained()
    picture(0, 7, (30, 20)).save(tmp_path / "b, c.png")
    (tmp_path / "a.png").write_text("no image")

    def said(data: bytes, *words: str, status: int = 0) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        assert main(["predict", "tiny", *words]) == status
        return capsys.readouterr().out.splitlines()

    by_name = [json.loads(line) for line in said(b"", "b, c.png", "--json")]
    rows = list(csv.DictReader(said(b"a.png\n\nb, c.png\n", "-", "--csv", status=1)))
    assert rows[0]["error"] == "not an image, or one of an unknown format"
    assert [(row["image"], row["network"], row["rank"]) for row in rows[1:]] == [
        ("b, c.png", net, rank) for net in ("vit", "agent") for rank in ("1", "2")
    ]
    assert {row["class"]: float(row["probability"]) for row in rows[1:3]} == by_name[0]["classes"]
    by_bytes = [json.loads(line) for line in said((tmp_path / "b, c.png").read_bytes(), "-", "--json")]
    assert by_bytes == [row | {"image": "-"} for row in by_name]
    said(b"\n", "-", status=2)
    said(b"", "a.png", "--csv", "--json", status=2)


def test_a_path_that_is_not_there_is_said_before_anything_is_answered(
    trained: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained()
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for wrong in ("gone.png", "empty"):
        assert main(["predict", "tiny", "images/test/dog/100.png", wrong]) == 2
        seen = capsys.readouterr()
        assert seen.out == ""
        assert seen.err.startswith(f"bootvit: error: {wrong}: no ")


def test_one_batch_is_held_at_a_time(trained: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run_dir = trained(eval_batch_size=2)
    seen: list[int] = []
    real = EvalBatches.__iter__

    def counted(self: EvalBatches) -> Any:
        for batch in real(self):
            seen.append(len(batch.labels))
            yield batch

    monkeypatch.setattr(EvalBatches, "__iter__", counted)
    rows = predict(config, run_dir, [Path("images/test")])
    next(rows)
    assert seen == [2]
    assert len(list(rows)) == 15
    assert seen == [2] * 4


def test_weights_that_are_not_finite_give_no_numbers(trained: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    _, run_dir = trained()
    saved = checkpoint.newest(run_dir / "checkpoints")
    assert saved is not None
    state = checkpoint.load(saved)
    state["learner"]["networks"]["vit.head.bias"][0] = float("nan")
    checkpoint.write(run_dir / "checkpoints", checkpoint.pack(state), epoch=saved.epoch, step=saved.step, final=True)
    capsys.readouterr()
    assert main(["predict", "tiny", "images/test", "--json"]) == 1
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "the vit's predictions are not finite" in seen.err


# -------------------------------------------------------------------------------------- evaluation and resuming


def rename_classes(root: Path, names: dict[str, str]) -> None:
    for split in ("train", "test"):
        for old, new in names.items():
            (root / split / old).rename(root / split / f"{new}.new")
        for path in (root / split).glob("*.new"):
            path.rename(path.with_suffix(""))


def test_an_evaluation_of_other_data_matches_classes_by_name(
    trained: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained()
    folders(tmp_path / "other", lambda number: (16, 16))
    rename_classes(tmp_path / "other", {"cat": "ape", "dog": "cat"})  # as many classes, one of them at another place
    capsys.readouterr()
    assert main(["eval", "tiny", "--local", "data.root=other"]) == 2
    assert "ape" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override", ["model.vit.depth=3", "data.image_size=8", "optim.lr=1", "data.mean=[0.1, 0.1, 0.1]", "method=vit"]
)
def test_an_evaluation_takes_everything_else_from_the_run(
    trained: MakeRun, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained()
    capsys.readouterr()
    assert main(["eval", "tiny", "--local", override]) == 2
    error = capsys.readouterr().err
    assert override.partition("=")[0] in error
    assert "the run was trained with" in error


def test_resume_refuses_other_images_and_takes_a_moved_root(
    trained: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run_dir = trained()
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = make_config(merge(config.model_dump(mode="json"), {"data": {"root": "moved"}}), "test")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert train(moved, local=True, resume=True)["status"] == "finished"
    picture(1, 55, (16, 16)).save(tmp_path / "moved/train/cat/extra.png")
    with pytest.raises(UserError, match=r"cannot resume: data.root holds other images"):
        train(moved, local=True, resume=True)
    (tmp_path / "moved/train/cat/extra.png").unlink()
    rename_classes(tmp_path / "moved", {"cat": "zebra"})
    with pytest.raises(UserError, match=r"its classes are cat, dog, those of data.root dog, zebra"):
        train(moved, local=True, resume=True)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_finished_run_is_not_resumed_with_other_settings(trained: MakeRun) -> None:
    config, _ = trained()
    changed = make_config(merge(config.model_dump(mode="json"), {"optim": {"lr": 0.5}, "seed": 7}), "test")
    with pytest.raises(UserError, match=r"cannot resume with seed=7, optim\.lr=0\.5: .* seed=0, optim\.lr=0\.002"):
        train(changed, local=True, resume=True)
