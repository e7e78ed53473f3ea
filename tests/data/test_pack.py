"""Packing: the same subsets and pixels before and after, and fractions that read only their share."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_making import config, data_config, write_folder, write_small_parquet

from bootvit.config import Config
from bootvit.data import open_splits
from bootvit.data.batches import EvalBatches, TrainBatches
from bootvit.data.pack import pack
from bootvit.data.table import ParquetImages
from bootvit.errors import UserError


def everything(run: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """(an epoch of training images, all evaluation images)."""
    splits = open_splits(run.data)
    subset = splits.test or splits.held_out
    assert subset is not None
    trained = TrainBatches(splits.train, run, rank=0, world=1, device="cpu").epoch(0)
    seen = EvalBatches(subset, run, rank=0, world=1, device="cpu")
    return torch.cat([b.images for b in trained]), torch.cat([b.images for b in seen])


@pytest.mark.parametrize("kind", ["digits", "small parquet", "folder", "fake"])
def test_a_packed_set_is_the_same_data_set(tmp_path: Path, kind: str) -> None:
    values: dict[str, object] = {"source": "digits", "image_size": 8}
    if kind == "small parquet":
        write_small_parquet(tmp_path / "in")
        values = {"source": "parquet", "root": tmp_path / "in", "image_size": 20}
    if kind == "folder":
        write_folder(tmp_path / "in", "train", {"a": 12, "b": 7})
        write_folder(tmp_path / "in", "val", {"a": 2, "b": 2})
        values = {"source": "imagefolder", "root": tmp_path / "in", "image_size": 32}
    if kind == "fake":
        values = {"source": "fake", "image_size": 100, "num_classes": 2}
    written = pack(data_config(**values), tmp_path / "out", group_bytes=4000)
    changed = {"source": "parquet", "root": tmp_path / "out"}
    for more in ({"fraction": 0.3, "held_out": 0.1}, {}):
        before, after = config(**values, **more, batch_size=5), config(**values | changed, **more, batch_size=5)
        one, two = open_splits(before.data), open_splits(after.data)
        assert one.train.keys == two.train.keys
        assert (one.train.digest, one.fingerprint, one.classes) == (two.train.digest, two.fingerprint, two.classes)
        assert (one.mean, one.std) == (two.mean, two.std)
        for left, right in zip(everything(before), everything(after), strict=True):
            assert torch.equal(left, right)
    assert written["train"] == len(open_splits(config(**values).data).train)


def test_every_fraction_is_a_prefix_of_the_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", "train", {"a": 40, "b": 17, "c": 3}, size=(16, 16))
    pack(data_config(source="imagefolder", root=tmp_path / "in"), tmp_path / "out", group_bytes=2000, file_bytes=9000)
    files = sorted((tmp_path / "out").glob("train-*.parquet"))
    assert len(files) > 2
    keys = pa.concat_tables([pq.read_table(path, columns=["key"]) for path in files])["key"].to_pylist()
    for percent in range(1, 100):
        chosen = open_splits(data_config(source="parquet", root=tmp_path / "out", fraction=percent / 100)).train.keys
        assert set(chosen) == set(keys[: len(chosen)])
    by_class = Counter(key.split("/")[0] for key in keys)
    first_a = next(key for key in keys if key.startswith("a/"))
    assert by_class == {"a": 40, "b": 17, "c": 3}
    assert first_a == min((k for k in keys if k.startswith("a/")), key=lambda k: hashlib.sha256(k.encode()).hexdigest())


def test_a_fraction_reads_only_its_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "in", "train", {"a": 50, "b": 50}, size=(16, 16))
    pack(data_config(source="imagefolder", root=tmp_path / "in"), tmp_path / "out", group_bytes=2000)
    run = config(source="parquet", root=tmp_path / "out", image_size=16, fraction=0.1)
    total = sum(pq.read_metadata(path).num_row_groups for path in (tmp_path / "out").glob("train*"))
    read: list[int] = []
    original = ParquetImages._read

    def counted(self: ParquetImages, group: int) -> pa.ChunkedArray:
        read.append(group)
        return original(self, group)

    monkeypatch.setattr(ParquetImages, "_read", counted)
    TrainBatches(open_splits(run.data).train, run, rank=0, world=1, device="cpu")
    assert total >= 15
    assert len(read) == len(set(read)) <= 0.1 * total + 1
    assert max(read) == len(read) - 1  # the first ones


def test_packing_refuses_what_would_mislead(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.fraction=0\.5: pack writes the whole training split"):
        pack(data_config(source="digits", fraction=0.5), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        pack(data_config(source="digits"), tmp_path / "full")
    write_folder(tmp_path / "in", "train", {"a": 2, "b": 2}, size=(8, 8))
    (tmp_path / "in" / "train" / "a" / "img_0001.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"img_0001\.jpg: no bytes"):
        pack(data_config(source="imagefolder", root=tmp_path / "in"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "in"]  # nothing half-written


def test_real_jpegs_give_the_same_pixels_packed(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "imagenet-sample"
    pack(data_config(source="imagefolder", root=root), tmp_path / "out")
    values = {"image_size": 224, "held_out": 0.2, "batch_size": 32}
    before = config(source="imagefolder", root=root, **values)
    after = config(source="parquet", root=tmp_path / "out", **values)
    for left, right in zip(everything(before), everything(after), strict=True):
        assert torch.equal(left, right)
