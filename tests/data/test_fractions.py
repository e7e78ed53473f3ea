"""Fractions against sorted lists, their properties, and the reference's rule."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_making import config, data_config, write_folder, write_small_parquet

from bootvit.data import open_splits, open_table
from bootvit.data.fractions import largest_remainder, reference_picks
from bootvit.data.info import fraction_keys, fraction_report
from bootvit.errors import UserError


def sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def obvious_fraction(keys_by_label: dict[int, list[str]], fraction: float, held: dict[int, int]) -> set[str]:
    """Sort each class by hash; the front less what is held out at the back."""
    out = set()
    for label, keys in keys_by_label.items():
        ordered = sorted(keys, key=sha)
        front = ordered[: max(1, round(fraction * len(ordered)))]
        back = ordered[len(ordered) - held[label] :]
        out |= set(front) - set(back)
    return out


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.33, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("held_out", [0.0, 0.1, 0.25])
def test_a_fraction_is_the_front_of_each_class_in_hash_order(fraction: float, held_out: float) -> None:
    table = open_table(data_config(source="digits"), "train")
    assert table is not None
    by_label: dict[int, list[str]] = {}
    for key, label in zip(table.rows["key"].to_pylist(), table.labels.tolist(), strict=True):
        by_label.setdefault(label, []).append(key)
    held = largest_remainder([len(by_label[label]) for label in range(10)], held_out)
    splits = open_splits(data_config(source="digits", fraction=fraction, held_out=held_out))
    assert set(splits.train.keys) == obvious_fraction(by_label, fraction, dict(enumerate(held)))
    backs = {
        key for label in range(10) for key in sorted(by_label[label], key=sha)[len(by_label[label]) - held[label] :]
    }
    assert set(splits.held_out.keys if splits.held_out else []) == backs


def test_fractions_nest_and_the_held_out_part_stays() -> None:
    smaller: set[str] = set()
    held = None
    for fraction in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0):
        splits = open_splits(data_config(source="digits", fraction=fraction, held_out=0.2))
        assert splits.held_out is not None
        assert smaller <= set(splits.train.keys)
        assert held in (None, splits.held_out.digest)
        assert not set(splits.train.keys) & set(splits.held_out.keys)
        smaller, held = set(splits.train.keys), splits.held_out.digest


def test_classes_keep_their_share_to_within_one_image() -> None:
    table = open_table(data_config(source="digits"), "train")
    assert table is not None
    sizes = Counter(table.labels.tolist())
    for fraction in (0.01, 0.05, 0.1, 0.5):
        counts = Counter(open_splits(data_config(source="digits", fraction=fraction)).train.labels.tolist())
        assert all(abs(counts[label] - fraction * sizes[label]) <= 1 for label in sizes)


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder([10, 10, 10], 0.1) == [1, 1, 1]
    assert largest_remainder([7, 5, 3], 0.2) == [1, 1, 1]  # 1.4 1.0 0.6: 3 in all
    assert largest_remainder([1] * 10, 0.3) == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert largest_remainder([0, 4], 0.5) == [0, 2]
    assert largest_remainder([9, 9], 0.0) == [0, 0]


def test_the_subset_ignores_seed_batch_and_order_of_rows(tmp_path: Path) -> None:
    write_small_parquet(tmp_path / "a")
    write_small_parquet(tmp_path / "b", order=1)
    values = {"source": "parquet", "fraction": 0.3, "held_out": 0.2}
    one = open_splits(config(seed=0, root=tmp_path / "a", **values).data)
    two = open_splits(config(seed=5, root=tmp_path / "b", batch_size=7, **values).data)
    assert one.train.keys == two.train.keys  # in the same order, so training is the same too
    assert (one.train.digest, one.fingerprint) == (two.train.digest, two.fingerprint)
    assert one.held_out is not None
    assert two.held_out is not None
    assert one.held_out.digest == two.held_out.digest
    assert one.train.digest != one.held_out.digest


def test_reference_picks_are_numpys_permutation() -> None:
    # from the published reference: the golden picks of class 0 with 20 files, class 1 with 37
    assert reference_picks(20, 0, 0.1).tolist() == [4, 19]
    assert reference_picks(20, 0, 0.5).tolist() == [4, 19, 6, 2, 13, 16, 3, 11, 10, 8]
    assert reference_picks(37, 1, 0.05).tolist() == [6, 7]
    assert len(reference_picks(5, 0, 0.5)) == 2  # ties to even
    assert len(reference_picks(10, 0, 0.05)) == 0


def test_reference_rule_takes_files_by_name_in_sorted_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"class_01": 37, "class_00": 20}, size=(8, 8))
    data = data_config(source="imagefolder", root=tmp_path, fraction=0.1, fraction_rule="reference")
    golden = {"class_00/img_0004.jpg", "class_00/img_0019.jpg"}
    golden |= {f"class_01/img_{number:04d}.jpg" for number in (6, 7, 24, 9)}
    assert set(fraction_keys(data)) == golden


def test_report_counts_what_the_fraction_takes() -> None:
    data = data_config(source="digits", fraction=0.1)
    report = fraction_report(data)
    assert report["size"] == sum(report["classes"].values()) == len(fraction_keys(data))
    assert report["digest"] == open_splits(data).train.digest


def test_a_single_image_a_class_can_be_held_out(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {f"c{number}": 1 for number in range(10)}, size=(8, 8))
    splits = open_splits(data_config(source="imagefolder", root=tmp_path, held_out=0.2))
    assert splits.held_out is not None
    assert (len(splits.train), len(splits.held_out)) == (8, 2)
    assert splits.test is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fraction": 0.04, "fraction_rule": "reference"}, "data.fraction=0.04 leaves class 'a' (10 images)"),
        ({"held_out": 0.01}, "data.held_out=0.01 of 20 images is none"),
        ({"fraction": 0.05, "held_out": 0.99}, "leaves no training image of 20"),
    ],
)
def test_impossible_splits_are_one_line(tmp_path: Path, values: dict[str, object], words: str) -> None:
    write_folder(tmp_path, "train", {"a": 10, "b": 10}, size=(8, 8))
    with pytest.raises(UserError) as caught:
        open_splits(data_config(source="imagefolder", root=tmp_path, **values))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_real_cifar10_fractions_are_nested_and_stratified(shared_data: Path) -> None:
    before: set[str] = set()
    for fraction in (0.01, 0.05, 0.1, 0.5):
        splits = open_splits(data_config(source="parquet", root=shared_data / "cifar10", fraction=fraction))
        assert np.bincount(splits.train.labels).tolist() == [round(5000 * fraction)] * 10
        assert before < set(splits.train.keys)
        before = set(splits.train.keys)
    assert len(splits.classes) == 10
    assert splits.test is not None
    assert len(splits.test) == 10000
