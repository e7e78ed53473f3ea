"""What the last evaluation has answered, image by image, against the networks asked again."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ONE, TINY
from PIL import Image

from bootvit.api import Run
from bootvit.config import Config, merge
from bootvit.data import open_splits
from bootvit.data.batches import EvalBatches
from bootvit.driver import train
from bootvit.load import make_config
from bootvit.predictions import SHOWN, SIDE, Answers, most_wrong, thumbnail
from bootvit.report.answers import answer_blocks, confusion, read_predictions
from bootvit.report.answers import most_wrong as shown_wrong
from bootvit.report.page import Gallery, Grid, Picture
from bootvit.report.rows import read_run
from bootvit.report.tables import tables


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("predictions")
    changes = {"ray": {"storage_path": str(folder)}, "data": {"held_out": 0.1}, "schedule": {"epochs": 1}}
    config = make_config(merge(TINY, changes), "test")
    train(config, local=True)
    return Run(folder / "tiny")


def test_every_image_of_both_splits_has_its_answer(run: Run) -> None:
    splits = open_splits(run.config.data)
    for name, subset, scores in (
        ("test", splits.test, run.result["final"]),
        ("held_out", splits.held_out, run.result["held_out"]),
    ):
        assert subset is not None
        assert scores is not None
        found = read_predictions(run.path, name)
        assert found is not None
        answers, classes = found
        assert classes == splits.classes
        assert answers["key"].to_pylist() == subset.keys
        assert answers["label"].to_pylist() == subset.labels.tolist()
        batches = EvalBatches(subset, run.config, run.data.preparation, rank=0, world=1, device="cpu")
        pixels = torch.cat([batch.images for batch in batches])
        for net, module in run.networks.items():
            with torch.no_grad():
                chances = module(pixels).double().softmax(1)
            guess = chances.argmax(1)
            assert answers[f"{net}_class"].to_pylist() == guess.tolist()
            assert 100 * np.mean(guess.numpy() == subset.labels) == pytest.approx(scores[net]["top1"], abs=1e-3)
            rows = torch.arange(len(guess))
            assert answers[f"{net}_probability"].to_pylist() == pytest.approx(chances[rows, guess].tolist(), abs=1e-5)
            of_label = chances[rows, torch.from_numpy(subset.labels)]
            assert answers[f"{net}_label_probability"].to_pylist() == pytest.approx(of_label.tolist(), abs=1e-5)


def test_the_result_says_how_many_images_and_on_what(run: Run) -> None:
    splits = open_splits(run.config.data)
    assert splits.held_out is not None
    assert splits.test is not None
    assert run.result["images"] == {"train": len(splits.train), "held_out": len(splits.held_out), "test": 359}
    assert str(run.result["machine"]).startswith("1 x ")


def test_the_most_wrong_images_have_pictures_and_no_others(run: Run) -> None:
    found = read_predictions(run.path, "test")
    assert found is not None
    rows = found[0].to_pylist()
    wanted: set[str] = set()
    for net in ("vit", "agent"):
        wrong = [row for row in rows if row[f"{net}_class"] != row["label"]]
        wanted |= {row["key"] for row in sorted(wrong, key=lambda row: row[f"{net}_label_probability"])[:SHOWN]}
    assert {row["key"] for row in rows if row["thumbnail"]} == wanted
    test = open_splits(run.config.data).test
    assert test is not None
    for row in rows:
        if row["thumbnail"]:
            image = test.table.images.open(int(test.indices[test.keys.index(row["key"])]))
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["thumbnail"]))), np.asarray(image))


def test_the_confusion_counts_each_image_once_and_its_diagonal_is_the_accuracy(run: Run, tmp_path: Path) -> None:
    row = read_run(run.path)
    answers = pq.read_table(run.path / "predictions.parquet")
    tested = answers.filter(pc.equal(answers["split"].cast(pa.string()), "test"))
    slow = np.zeros((10, 10), int)
    for one in tested.to_pylist():
        slow[one["label"], one["agent_class"]] += 1
    found = confusion([row, row], "agent", "test")
    assert found is not None
    np.testing.assert_array_equal(found.counts, 2 * slow)
    assert 100 * slow.trace() / slow.sum() == pytest.approx(row.test["agent"], abs=1e-3)
    np.testing.assert_allclose(found.accuracy, 100 * slow.diagonal() / slow.sum(1))
    wrong = shown_wrong(row, "agent", "test")
    assert [one.of_label for one in wrong] == sorted(one.of_label for one in wrong)
    assert all(one.label != one.guess for one in wrong)
    blocks = answer_blocks(tables([row]).parts, tmp_path)
    (grid,) = [block for block in blocks if isinstance(block, Grid)]
    assert [one[0] for one in grid.rows] == [str(digit) for digit in range(10)]
    assert sum(int(str(one[1])) for one in grid.rows) == 359
    assert len([block for block in blocks if isinstance(block, Gallery)]) == 2
    assert all(block.path.exists() for block in blocks if isinstance(block, Picture))


def test_a_run_of_an_earlier_version_is_reported_without(run: Run, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("config.yaml", "result.json", "metrics.jsonl"):
        (tmp_path / "old" / name).write_bytes((run.path / name).read_bytes())
    result = json.loads((tmp_path / "old" / "result.json").read_text())
    del result["images"], result["machine"]
    (tmp_path / "old" / "result.json").write_text(json.dumps(result))
    row = read_run(tmp_path / "old")
    assert confusion([row], "vit", "test") is None
    assert answer_blocks(tables([row]).parts, tmp_path) == []


def test_a_broken_image_moves_no_other_answer(tmp_path: Path) -> None:
    """Through the processes that load images of several sizes."""
    random = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 5)):
        for label in "ab":
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                side = 100 + number
                Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "data" / "test" / "a" / "3.png").write_bytes(b"no image")
    data = {"source": "imagefolder", "root": str(tmp_path / "data"), "fraction": 1, "on_error": "skip"}
    config: Config = make_config(merge(TINY, {"data": data | {"workers": 0, "eval_batch_size": 3}}), "test")
    splits = open_splits(config.data)
    assert splits.test is not None
    answers = Answers()
    for batch in EvalBatches(splits.test, config, rank=0, world=1, device=ONE.device):
        answers.add(batch, {"vit": torch.nn.functional.one_hot(1 - batch.labels, 2).float()})
    table = answers.table("test", splits.test, 0, 1)
    assert table is not None
    assert table["key"].to_pylist() == [key for key in splits.test.keys if key != "a/3.png"]
    assert [key[0] == "ab"[label] for key, label in zip(*(table[n].to_pylist() for n in ("key", "label")), strict=True)]
    assert all(max(Image.open(io.BytesIO(data)).size) <= SIDE for data in table["thumbnail"].to_pylist())


def test_most_wrong_is_what_a_sort_finds() -> None:
    label, guess = np.array([0, 1, 1, 0]), np.array([1, 1, 0, 1])
    assert most_wrong(label, guess, np.array([0.3, 0.9, 0.1, 0.2]), 2).tolist() == [2, 3]


def test_a_thumbnail_keeps_the_shape_of_its_image() -> None:
    made = Image.open(io.BytesIO(thumbnail(Image.new("RGB", (400, 200)))))
    assert (made.size, made.format) == ((SIDE, SIDE // 2), "JPEG")
