"""Batches: exact sharding, resuming, the same pixels whatever the batch, the workers and the processes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_making import config, picture, write_folder, write_hugging_face, write_small_parquet

from bootvit.config import Config
from bootvit.data import Subset, open_splits
from bootvit.data.batches import Batch, EvalBatches, TrainBatches
from bootvit.data.cache import cache_folder, decoded
from bootvit.data.decode import Reading, decode
from bootvit.data.loaders import MemoryLoader, WorkerLoader
from bootvit.data.randomness import permutation, uniforms
from bootvit.data.resize import area_crop, normalise
from bootvit.errors import UserError

CPU = torch.device("cpu")


def training(run: Config, rank: int = 0, world: int = 1) -> TrainBatches:
    return TrainBatches(open_splits(run.data).train, run, rank=rank, world=world, device=CPU)


def evaluation(subset: Subset | None, run: Config, rank: int = 0, world: int = 1) -> EvalBatches:
    assert subset is not None
    return EvalBatches(subset, run, rank=rank, world=world, device=CPU)


def joined(batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    every = list(batches)
    return torch.cat([batch.images for batch in every]), torch.cat([batch.labels for batch in every])


@pytest.fixture(params=["digits", "small parquet", "large parquet", "folder"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    """One run per way of storing and loading."""
    common = {"batch_size": 7, "eval_batch_size": 6}
    if request.param == "digits":
        return config(seed=1, source="digits", image_size=8, fraction=0.02, **common)
    if request.param == "small parquet":
        write_small_parquet(tmp_path)
        return config(seed=1, source="parquet", root=tmp_path, image_size=24, held_out=0.2, **common)
    if request.param == "folder":
        write_folder(tmp_path, "train", {"a": 9, "b": 9})
        write_folder(tmp_path, "val", {"a": 4, "b": 5})
        return config(seed=1, source="imagefolder", root=tmp_path, image_size=(32, 24), **common)
    images = [picture(seed, 100 + seed, 130) for seed in range(20)]
    paths: list[str | None] = [f"{number}.jpg" for number in range(20)]
    write_hugging_face(tmp_path / "train-0.parquet", images, [number % 2 for number in range(20)], paths)
    return config(seed=1, source="parquet", root=tmp_path, image_size=32, held_out=0.3, **common)


def test_images_that_stay_on_the_device_are_the_same_batches(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = open_splits(run.data)
    subset = splits.held_out or splits.test
    apart = [joined(training(run).epoch(1, start=1)), joined(evaluation(subset, run, rank=1, world=2))]
    monkeypatch.setattr("bootvit.data.loaders.fits", lambda size, device: True)
    resident = [joined(training(run).epoch(1, start=1)), joined(evaluation(subset, run, rank=1, world=2))]
    for one, two in zip(apart, resident, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_two_and_three_ranks_together_equal_one(run: Config) -> None:
    whole = list(training(run).epoch(2))
    for world in (2, 3):
        ranks = [list(training(run, rank, world).epoch(2)) for rank in range(world)]
        for step, batch in enumerate(whole):
            pieces = [steps[step] for steps in ranks]
            assert torch.equal(torch.cat([part.images for part in pieces]), batch.images)
            assert torch.equal(torch.cat([part.labels for part in pieces]), batch.labels)
            assert {part.global_size for part in pieces} == {batch.global_size} == {7}
            sizes = [len(part.labels) for part in pieces]
            assert sizes == [len(part) for part in np.array_split(range(7), world)]


def test_an_epoch_resumed_at_any_step_goes_on_as_the_whole(run: Config) -> None:
    whole = list(training(run).epoch(1))
    assert len(whole) == training(run).steps_per_epoch >= 2
    for start in range(len(whole) + 1):
        rest = list(training(run).epoch(1, start))
        assert len(rest) == len(whole) - start
        for one, two in zip(rest, whole[start:], strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.labels, two.labels)


def test_epochs_and_seeds_differ(run: Config) -> None:
    first = joined(training(run).epoch(0))[0]
    assert not torch.equal(first, joined(training(run).epoch(1))[0])
    other = run.model_copy(update={"seed": 2})
    assert not torch.equal(first, joined(training(other).epoch(0))[0])


def test_training_leaves_the_global_generators_alone(run: Config) -> None:
    state = torch.random.get_rng_state()
    joined(training(run).epoch(0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_evaluation_sees_every_image_once_whatever_batch_and_world(run: Config) -> None:
    splits = open_splits(run.data)
    subset = splits.test or splits.held_out
    assert subset is not None
    images, labels = joined(evaluation(subset, run))
    assert labels.tolist() == subset.labels.tolist()
    for batch in (1, 4, 1000):
        other = run.model_copy(update={"data": run.data.model_copy(update={"eval_batch_size": batch})})
        assert torch.equal(joined(evaluation(subset, other))[0], images)
    for world in (2, 3):
        ranks = [list(evaluation(subset, run, rank, world)) for rank in range(world)]
        assert sum(len(batch.labels) for steps in ranks for batch in steps) == len(subset)
        parts = [image for steps in ranks for batch in steps for image in batch.images]
        assert {image.numpy().tobytes() for image in parts} == {image.numpy().tobytes() for image in images}


def test_more_ranks_than_images_evaluate_without_padding() -> None:
    run = config(source="digits", image_size=8, held_out=0.002)
    subset = open_splits(run.data).held_out
    assert subset is not None
    assert len(subset) == 3
    ranks = [list(evaluation(subset, run, rank, 5)) for rank in range(5)]
    assert [sum(len(batch.labels) for batch in steps) for steps in ranks] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_any_number_of_loading_processes_gives_the_same_batches(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path, "train", {"a": 9, "b": 9})
    run = config(source="imagefolder", root=tmp_path, image_size=32, batch_size=4, workers=workers)
    plain = config(source="imagefolder", root=tmp_path, image_size=32, batch_size=4, workers=2)
    assert torch.equal(joined(training(run).epoch(0))[0], joined(training(plain).epoch(0))[0])


def test_a_training_batch_by_hand() -> None:
    run = config(seed=3, source="digits", image_size=8, batch_size=5, fraction=0.05)
    subset = open_splits(run.data).train
    batch = list(training(run).epoch(4))[1]
    places = permutation(3, 4, len(subset))[5:10]
    assert batch.labels.tolist() == subset.labels[places].tolist()
    raw = subset.table.images.pixels[subset.indices[places]]  # type: ignore[union-attr]
    wanted = (raw / 255 - np.array(subset.table.mean)) / np.array(subset.table.std)  # digits are not augmented
    np.testing.assert_allclose(batch.images.permute(0, 2, 3, 1).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("augment", ["crop", "none"])
def test_resizing_by_pillow_and_on_the_device_agree(tmp_path: Path, augment: str) -> None:
    write_small_parquet(tmp_path)
    runs = [
        config(source="parquet", root=tmp_path, image_size=40, batch_size=9, augment=augment, resize=resize)
        for resize in ("device", "pil")
    ]
    one, two = (joined(training(run).epoch(0))[0] for run in runs)
    assert torch.equal(one, two)
    assert one.shape[1:] == (3, 40, 40)


def test_augment_none_trains_on_what_evaluation_sees(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"a": 4, "b": 4})
    run = config(source="imagefolder", root=tmp_path, image_size=32, batch_size=8, augment="none", workers=0)
    subset = open_splits(run.data).train
    trained = joined(training(run).epoch(0))[0]
    seen = joined(evaluation(subset, run))[0]
    assert torch.equal(trained, seen[permutation(0, 0, 8)])


@pytest.mark.parametrize("source", ["imagefolder", "parquet"])
def test_only_training_decodes_less_of_a_large_jpeg(tmp_path: Path, source: str) -> None:
    if source == "imagefolder":
        write_folder(tmp_path, "train", {"a": 3, "b": 3}, size=(300, 400))
    else:
        images = [picture(seed, 300, 400) for seed in range(6)]
        write_hugging_face(tmp_path / "train-0.parquet", images, [0, 0, 0, 1, 1, 1], [f"{n}.jpg" for n in range(6)])
    given = {"source": source, "root": tmp_path, "image_size": 24, "batch_size": 3}
    plain, scaled = (config(**given, dct_scaling=on) for on in (False, True))
    subset = open_splits(scaled.data).train
    trained = joined(training(scaled).epoch(0))[0]
    places = permutation(0, 0, 6)
    for position, place in enumerate(places.tolist()):
        (_, data), *_ = subset.table.images.scan(subset.indices[place : place + 1])
        small = decode(data, Reading(crops=(24, 24)))
        assert small.size == (50, 38)
        numbers = uniforms(0, 0, position, position + 1, 24)[0].tolist()
        cut = torch.from_numpy(np.array(area_crop(small, (24, 24), numbers, flip=True)))
        wanted = normalise(cut.permute(2, 0, 1)[None], subset.table.mean, subset.table.std)[0]
        assert torch.equal(trained[position], wanted)
    assert not torch.equal(trained, joined(training(plain).epoch(0))[0])
    assert torch.equal(*(joined(evaluation(subset, run))[0] for run in (plain, scaled)))


def test_a_subset_smaller_than_a_batch_is_one_short_batch() -> None:
    run = config(source="digits", image_size=8, fraction=0.01, batch_size=64)
    (batch,) = training(run).epoch(0)
    assert len(batch.labels) == batch.global_size == len(open_splits(run.data).train) < 64
    with pytest.raises(UserError, match=r"ray\.num_workers=40"):
        training(run, 0, 40)


def test_small_images_are_decoded_once_per_node(tmp_path: Path) -> None:
    write_small_parquet(tmp_path)
    subset = open_splits(config(source="parquet", root=tmp_path).data).train
    before = set(os.listdir(cache_folder()))
    first = decoded(subset)
    made = set(os.listdir(cache_folder())) - before
    assert len([name for name in made if not name.endswith(".lock")]) == 1
    second = decoded(subset)
    assert set(os.listdir(cache_folder())) - before == made
    assert isinstance(second.pixels, np.memmap)
    np.testing.assert_array_equal(first.pixels, second.pixels)


def test_small_images_are_evaluated_from_memory_and_large_ones_by_processes(tmp_path: Path) -> None:
    write_small_parquet(tmp_path / "small")
    write_folder(tmp_path / "large", "train", {"a": 4, "b": 4})
    for source, name, kind in (("parquet", "small", MemoryLoader), ("imagefolder", "large", WorkerLoader)):
        run = config(source=source, root=tmp_path / name, image_size=16, held_out=0.5)
        assert type(evaluation(open_splits(run.data).held_out, run)._loader) is kind


def test_changed_files_are_decoded_again(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"a": 3, "b": 3}, size=(16, 16))
    run = config(source="imagefolder", root=tmp_path, image_size=16, augment="none")
    before = joined(training(run).epoch(0))[0]
    for path in (tmp_path / "train").rglob("*.jpg"):
        path.write_bytes(picture(999, 16, 16))
    assert not torch.equal(before, joined(training(run).epoch(0))[0])


# ------------------------------------------------------------------------------------------- broken images


def break_one(root: Path) -> Path:
    """Cut a JPEG in half."""
    path = root / "train" / "a" / "img_0001.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("size", [(16, 16), None])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(tmp_path: Path, size: tuple[int, int] | None, workers: int) -> None:
    write_folder(tmp_path, "train", {"a": 6, "b": 6}, size=size)
    path = break_one(tmp_path)
    run = config(source="imagefolder", root=tmp_path, image_size=16, batch_size=4, workers=workers)
    with pytest.raises(UserError) as caught:
        joined(training(run).epoch(0))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(16, 16), None])
def test_a_broken_image_can_be_left_out_and_is_counted(tmp_path: Path, size: tuple[int, int] | None) -> None:
    write_folder(tmp_path, "train", {"a": 6, "b": 6}, size=size)
    path = break_one(tmp_path)
    run = config(source="imagefolder", root=tmp_path, image_size=16, batch_size=12, on_error="skip")
    subset = open_splits(run.data).train
    batches = training(run)
    _, labels = joined(batches.epoch(0))
    joined(batches.epoch(1))
    assert list(batches.broken) == [str(path)]
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 6
    seen = evaluation(subset, run)
    assert len(joined(seen)[1]) == 11
    assert seen.broken == batches.broken
    with pytest.raises(UserError, match=path.name):  # what was skipped once is still an error elsewhere
        joined(training(config(source="imagefolder", root=tmp_path, image_size=16)).epoch(0))


def test_a_broken_row_of_a_parquet_file_is_named_by_its_key(tmp_path: Path) -> None:
    images = [picture(seed, 16, 16) for seed in range(8)]
    images[5] = b"not an image"
    paths: list[str | None] = [f"{number}.jpg" for number in range(8)]
    write_hugging_face(tmp_path / "train.parquet", images, [0, 1] * 4, paths)
    run = config(source="parquet", root=tmp_path, image_size=16)
    with pytest.raises(UserError, match=r"train\.parquet, key '5\.jpg': not an image"):
        training(run)


def test_images_of_several_sizes_do_not_fit_the_memory(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"a": 4, "b": 4})
    run = config(source="imagefolder", root=tmp_path, image_size=16, augment="crop")
    with pytest.raises(UserError, match=r"images of several sizes need data\.augment=area"):
        training(run)
