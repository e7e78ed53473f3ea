"""Measures against scikit-learn's own, and against a slow calibration error, however the images are divided."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import ONE, batch, tiny
from sklearn import metrics

from bootvit.learner import Learner
from bootvit.loop import fit
from bootvit.measures import NAMES, Tally, mean_auroc, of_counts
from bootvit.runs import claim
from bootvit.tracking import read_journal

CLASSES = 5


def said(images: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels; class 4 is guessed now and then, but has no images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES - 1, (images,), generator=generator)
    logits = torch.randn(images, CLASSES, generator=generator, dtype=torch.float64)
    logits[torch.arange(images), labels] += 1.0
    return logits, labels


def tally(rank: int = 0, size: int = 1) -> Tally:
    """Of this worker's images, in batches of seven."""
    logits, labels = said()
    rows = torch.arange(len(labels))[rank::size]
    found = Tally(CLASSES, torch.device("cpu"))
    for part in rows.split(7):
        found.add(logits[part], labels[part])
    return found


def test_they_are_scikit_learns() -> None:
    logits, labels = said()
    chances, guesses = logits.softmax(1).numpy(), logits.argmax(1).numpy()
    y = labels.numpy()
    found, per_class = tally().measures(1)
    assert set(found) == set(NAMES)
    there = list(range(CLASSES - 1))
    recalls = metrics.recall_score(y, guesses, labels=there, average=None)
    assert found["balanced_accuracy"] == pytest.approx(100 * recalls.mean())
    assert found["macro_f1"] == pytest.approx(100 * metrics.f1_score(y, guesses, labels=there, average="macro"))
    assert per_class == [*(pytest.approx(100 * own) for own in recalls), None]
    four = chances[:, :4] / chances[:, :4].sum(1, keepdims=True)
    same = metrics.roc_auc_score(y, four, multi_class="ovr")
    assert mean_auroc(four.astype(np.float32), y) == pytest.approx(same)
    bins = [[] for _ in range(15)]  # type: ignore[var-annotated]
    for row, guess, label in zip(chances, guesses, y, strict=True):
        place = next(i for i in range(15) if row[guess] <= (i + 1) / 15)
        bins[place].append((float(guess == label), row[guess]))
    slow = sum(abs(sum(right - sure for right, sure in own)) for own in bins) / len(y)
    assert found["ece"] == pytest.approx(slow)


def test_balanced_accuracy_where_all_classes_are_there() -> None:
    true, guessed = np.repeat([0, 0, 1, 1], [3, 1, 2, 4]), np.repeat([0, 1, 0, 1], [3, 1, 2, 4])
    assert of_counts(np.array([[4, 5, 3], [6, 5, 4]]))["balanced_accuracy"] == pytest.approx(
        100 * metrics.balanced_accuracy_score(true, guessed)
    )


def worker(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.save(tally(rank, size).measures(size), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    mp.spawn(worker, args=(2, str(tmp_path)), nprocs=2)
    alone, per_class = tally().measures(1)
    for rank in range(2):
        found, own = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx(alone, rel=1e-12)
        assert own == per_class


def test_one_class_has_no_auroc() -> None:
    assert mean_auroc(np.ones((3, 2), np.float32), np.zeros(3, np.int64)) is None


def test_the_evaluation_and_the_run_have_them(tmp_path: Path) -> None:
    learner = Learner(tiny(), 10, ONE)
    data = batch(50)
    counts = learner.evaluate([data])
    logits = learner.networks.features(data.images)["vit"].logits.detach()
    loss = metrics.log_loss(data.labels.numpy(), logits.double().softmax(1).numpy(), labels=range(10))
    assert counts["vit"].loss == pytest.approx(loss, rel=1e-5)
    config = tiny(ray__storage_path=str(tmp_path), schedule__epochs=1, data__held_out=0.2)
    result: Any = fit(config, ONE, claim(config, resume=False, overwrite=False)[0])
    assert {*NAMES, "top1", "top5", "loss"} == set(result["final"]["vit"]) == set(result["held_out"]["agent"])
    assert set(result["per_class"]["vit"]) == set(map(str, range(10)))
    names = {r.name for r in read_journal(tmp_path / "tiny" / "metrics.jsonl")[0]}
    assert {f"held_out/vit/{name}" for name in NAMES} <= names
