"""Policies, jitter, erasing and mixing: torchvision's and timm's own results, whatever the batch and the workers."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_making import config, write_folder
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.mixup import Mixup
from torchvision.transforms import RandomErasing
from torchvision.transforms.v2 import RandAugment, TrivialAugmentWide
from torchvision.transforms.v2 import functional as tv

from bootvit.config import Config, DataConfig
from bootvit.data import open_splits
from bootvit.data.batches import Batch, TrainBatches
from bootvit.data.randomness import balanced, permutation, repeated
from bootvit.data.vary import BINS, OPERATIONS, Mixing, Variation, apply, erased_box, strengths

CPU = torch.device("cpu")
ALL = {
    "policy": "rand",
    "policy_strength": 15,
    "color_jitter": 0.3,
    "erase": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "repeats": 2,
    "sampling": "balanced",
}


def noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("policy", ["rand", "trivial"])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", ["tensor", "pil"])
def test_every_operation_at_every_strength_is_torchvisions(policy: str, name: str, kind: str) -> None:
    whole = RandAugment() if policy == "rand" else TrivialAugmentWide()
    assert tuple(whole._AUGMENTATION_SPACE) == OPERATIONS
    image: Any = noise(3, 20, 26)
    if kind == "pil":
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
    theirs, signed = whole._AUGMENTATION_SPACE[name]
    for place in range(0, BINS, 3):
        sizes = theirs(BINS, 20, 26)
        size = 0.0 if sizes is None else float(sizes[place])
        assert strengths(policy, name, 20, 26)[place] == size
        for sign in (1, -1) if signed else (1,):
            wanted = whole._apply_image_or_video_transform(image, name, sign * size, whole.interpolation, whole._fill)
            np.testing.assert_array_equal(np.asarray(apply(image, name, sign * size)), np.asarray(wanted))


def numbers_of(variation: Variation, count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).random((count, variation.needs))


@pytest.mark.parametrize("policy", ["none", "rand", "trivial"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_batch_is_its_images_one_by_one(policy: str, channels: int) -> None:
    variation = Variation.of(DataConfig(policy=policy, color_jitter=0.4))  # type: ignore[arg-type]
    images, numbers = noise(40, channels, 12, 10), numbers_of(variation, 40)
    found = variation.batch(images, numbers)
    for image, own, one in zip(images, numbers.tolist(), found, strict=True):
        assert torch.equal(variation.one(image, own), one)
    assert (not torch.equal(found, images)) or (policy == "none" and channels == 4)


def test_the_operations_are_equally_frequent_and_signs_too() -> None:
    variation = Variation.of(DataConfig(policy="rand", policy_layers=1))
    drawn = Counter(variation._drawn(0, own, 3, 32, 32) for own in numbers_of(variation, 14_000).tolist())
    names = Counter[str]()
    for (name, _), count in drawn.items():
        names[name] += count
    assert min(names.values()) > 880
    assert len(drawn) == 14 + 9  # nine have a sign
    four = Counter(variation._drawn(0, own, 4, 32, 32)[0] for own in numbers_of(variation, 600).tolist())
    assert set(four) == set(OPERATIONS[:6])


def test_jitter_by_hand() -> None:
    image, numbers = noise(3, 9, 7), [0.1, 0.9, 0.6, 0.35, *[0.0] * 24]
    variation = Variation.of(DataConfig(color_jitter=0.5))
    wanted = tv.adjust_brightness(image, 0.6)  # order 2 of 6: contrast, brightness, saturation
    wanted = tv.adjust_saturation(tv.adjust_brightness(tv.adjust_contrast(image, 1.4), 0.6), 1.1)
    assert torch.equal(variation.one(image, numbers), wanted)


def test_erased_rectangles_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in np.random.default_rng(2).random((50, 24)).tolist():
        tries, places = iter(row[1:21]), iter(row[21:23])

        def uniform(self: torch.Tensor, low: float, high: float, tries: Any = tries) -> torch.Tensor:
            return self.double().fill_(low + (high - low) * next(tries))

        def integer(low: int, high: int, size: tuple[int], places: Any = places) -> torch.Tensor:
            return torch.tensor([int(next(places) * high)])

        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "uniform_", uniform)
            patched.setattr(torch, "randint", integer)
            top, left, rows, cols, _ = RandomErasing.get_params(torch.zeros(3, 12, 30), (0.02, 0.33), (0.3, 3.3), [0.0])
        found = erased_box([0.0, *row[1:]], 0.5, 12, 30)
        assert tuple(found) in {(top, top + rows, left, left + cols), (0, 0, 0, 0)}
    images = torch.ones(40, 3, 16, 16)
    variation = Variation.of(DataConfig(erase=0.5))
    found = variation.erased(images, numbers_of(variation, 40))
    assert 10 < int((found == images).flatten(1).all(1).sum()) < 30
    assert not found[found != images].any()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_timms(mixup: float, cutmix: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two images, each mixed with the other."""
    both = mixup > 0 and cutmix > 0
    labels = torch.tensor([0, 2])
    for seed in range(12):
        images = torch.randn(2, 3, 9, 14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        numbers = np.random.default_rng(seed).random((2, 8))
        numbers[:, 1] = numbers[:, 1].clip(0.05, 0.95)
        found, shares = Mixing(mixup, cutmix).mixed(images, images.flip(0), numbers)
        from scipy.stats import beta

        def drawn(a: float, b: float, size: int, numbers: Any = numbers) -> Any:
            return beta.ppf(numbers[:, 1], a, b)

        coins = iter([numbers[:, 0], np.zeros(2)] if both else [np.zeros(2)])
        cuts = [n for n in numbers if not (both and n[0] >= 0.5)]
        places = iter([int(x) for own in cuts for x in (own[2] * 9, own[3] * 14)])
        with monkeypatch.context() as patched:
            patched.setattr(np.random, "beta", drawn)
            patched.setattr(np.random, "rand", lambda *size, c=coins: next(c))
            patched.setattr(np.random, "randint", lambda *a, p=places, **k: next(p))
            timms = Mixup(mixup, cutmix, mode="elem", label_smoothing=0.0, num_classes=3)
            wanted, target = timms(images.clone(), labels)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        one_hot = torch.eye(3)[labels]
        torch.testing.assert_close(
            (one_hot * shares + one_hot.flip(0) * (1 - shares)).double(), target, rtol=1e-6, atol=1e-6
        )


def test_repeated_images_are_those_of_timms_sampler() -> None:
    order = permutation(0, 0, 96)
    found = repeated(order, 12, 3).reshape(-1, 12)

    class Ours(RepeatAugSampler):  # type: ignore[misc]
        pass

    sampler = Ours(range(96), num_replicas=1, rank=0, shuffle=False, num_repeats=3, selected_round=0)
    wanted = order[np.array(list(sampler))].reshape(-1, 12)
    np.testing.assert_array_equal(np.sort(found), np.sort(wanted))
    assert all((row[:-1] != row[1:]).all() for row in found)


def test_a_balanced_order_holds_classes_and_their_images_evenly() -> None:
    labels = np.repeat([0, 1, 3], [50, 9, 3])
    for epoch in range(3):
        order = balanced(0, epoch, labels)
        assert len(order) == 62
        assert sorted(Counter(labels[order].tolist()).values()) == [20, 21, 21]
        for label in (1, 3):
            times = Counter(order[labels[order] == label].tolist())
            assert max(times.values()) - min(times.values()) <= 1
    assert not np.array_equal(balanced(0, 0, labels), balanced(0, 1, labels))


# ----------------------------------------------------------------------------------------------- whole batches


@pytest.fixture(params=["memory", "processes"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    """Everything on; 7 does not divide the images, and is odd."""
    if request.param == "memory":
        return config(seed=1, source="digits", image_size=8, fraction=0.03, batch_size=7, augment="crop", **ALL)
    write_folder(tmp_path, "train", {"a": 11, "b": 6})
    return config(seed=1, source="imagefolder", root=tmp_path, image_size=(32, 24), batch_size=7, **ALL)


def training(run: Config, rank: int = 0, world: int = 1) -> TrainBatches:
    return TrainBatches(open_splits(run.data).train, run, rank=rank, world=world, device=CPU)


def test_one_two_and_three_workers_see_the_same_images_varied_the_same(run: Config) -> None:
    whole = list(training(run).epoch(2))
    for world in (2, 3):
        ranks = [list(training(run, rank, world).epoch(2)) for rank in range(world)]
        for step, batch in enumerate(whole):
            parts = [steps[step] for steps in ranks]
            assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
            assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
            assert {part.global_size for part in parts} == {7}


def test_an_epoch_goes_on_at_any_step(run: Config) -> None:
    whole = list(training(run).epoch(1))
    assert len(whole) >= 2
    for start in range(len(whole) + 1):
        for one, two in zip(training(run).epoch(1, start), whole[start:], strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.labels, two.labels)


def test_mixed_batches_by_hand(run: Config) -> None:
    plain = Config.model_validate(run.model_dump() | {"data": run.data.model_dump() | {"mixup": 0.0, "cutmix": 0.0}})
    before, after = (next(training(one).epoch(0)) for one in (plain, run))
    assert after.labels.shape == (7, len(open_splits(run.data).classes))
    torch.testing.assert_close(after.labels.sum(1), torch.ones(7))
    for place in range(6):  # position 6's partner is in the next batch
        share = float(after.labels[place, before.labels[place]])
        if before.labels[place] != before.labels[place ^ 1]:
            blend = share * before.images[place] + (1 - share) * before.images[place ^ 1]
            taken = (after.images[place] == before.images[place]) | (after.images[place] == before.images[place ^ 1])
            assert torch.allclose(after.images[place], blend, atol=1e-5) or bool(taken.all())


def test_training_leaves_the_global_generators_alone(run: Config) -> None:
    state, numpys = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    list(training(run).epoch(0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert (np.random.get_state()[1] == numpys).all()  # type: ignore[index]


def test_a_broken_partner_leaves_an_image_as_it_is(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"a": 6, "b": 6})
    path = sorted((tmp_path / "train" / "a").iterdir())[2]
    path.write_bytes(b"broken")
    data = {"source": "imagefolder", "root": tmp_path, "image_size": 16, "batch_size": 4, "on_error": "skip"}
    batches: list[Batch] = list(training(config(**data, mixup=0.4, workers=0)).epoch(0))
    assert sorted(len(batch.labels) for batch in batches) == [3, 4, 4]
    (alone,) = [b for b in batches if len(b.labels) == 3]
    assert int((alone.labels.max(1).values == 1).sum()) >= 1


def test_numbers_of_beta_are_those_of_its_distribution() -> None:
    shares = [Mixing(0.3, 0.0)._drawn([0.0, u, 0.0, 0.0], 8, 8)[0] for u in np.linspace(0.005, 0.995, 199)]
    assert math.isclose(float(np.mean(shares)), 0.5, abs_tol=1e-6)
    assert math.isclose(float(np.var(shares)), 0.25 / (2 * 0.3 + 1), rel_tol=0.02)
