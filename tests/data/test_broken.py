"""Broken images: one kind of error whatever Pillow raises, left out everywhere with on_error=skip, named rightly."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_making import config, data_config, picture, write_folder
from PIL import Image

from bootvit.config import Config
from bootvit.data import open_splits
from bootvit.data.batches import EvalBatches, TrainBatches
from bootvit.data.decode import BrokenImage, decode
from bootvit.data.facts import Preparation
from bootvit.data.loaders import Cut
from bootvit.data.pack import pack
from bootvit.errors import RunFailed, UserError
from bootvit.learner import Learner, World
from bootvit.loop import of_all_workers

CPU = torch.device("cpu")


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    out = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        out += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return out


def header(rows: int, cols: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", cols, rows, 8, 2, 0, 0, 0)


BODY = zlib.compress(bytes((1 + 3 * 64) * 64), 0)
NAMELESS = png(header(64, 64), (b"IDAT", BODY[:4000]), (b"\0\0\0\0", bytes(200)), (b"IEND", b""))
BOMB = png(header(30_000, 30_000), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
NOTHING = png(header(0, 5), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
HTML = b"<!DOCTYPE html><title>404</title>"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (NAMELESS, "broken PNG file"),
        (BOMB, "exceeds limit"),
        (NOTHING, ""),
        (HTML, "not an image"),
        (b"", "no bytes"),
        (picture(0, 64, 64)[:900], "truncated"),
    ],
    ids=["chunk", "bomb", "no pixels", "html", "empty", "cut"],
)
def test_every_damage_is_one_line_about_a_broken_image(data: bytes, words: str) -> None:
    with pytest.raises(BrokenImage) as caught:
        decode(data)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "object at" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), KeyError("Exif"), AttributeError("no tile")])
def test_whatever_a_format_raises_is_a_broken_image(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(BrokenImage):
        decode(picture(0, 16, 16))


def test_a_strip_that_would_fill_the_memory_is_broken_where_it_is_cropped() -> None:
    strip = Image.new("RGB", (200_000, 1))
    with pytest.raises(BrokenImage, match="1x200000 pixels"):
        Cut((224, 224), "centre_crop", flip=False)(strip, ())
    assert Cut((8, 8), "resize", flip=False)(strip, ()).shape == (8, 8, 3)


def damaged(root: Path, **changes: Any) -> Config:
    """Folders of 8 and 4 images in which train's a/img_0001 and val's b/img_0001 are broken."""
    write_folder(root, "train", {"a": 4, "b": 4})
    write_folder(root, "val", {"a": 2, "b": 2})
    for place in ("train/a", "val/b"):
        (root / place / "img_0001.jpg").write_bytes(HTML)
    return config(source="imagefolder", root=root, image_size=32, on_error="skip", **({"workers": 0} | changes))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_in_batches_of_one_leaves_out_only_the_broken_image(tmp_path: Path, workers: int) -> None:
    run = damaged(tmp_path, eval_batch_size=1, workers=workers)
    test = open_splits(run.data).test
    assert test is not None
    batches = EvalBatches(test, run, rank=0, world=1, device=CPU)
    seen = [batch.labels.tolist() for batch in batches]
    assert [len(labels) for labels in seen] == [1, 1, 1]  # no empty batch
    assert sorted(label for labels in seen for label in labels) == [0, 0, 1]
    assert list(batches.broken) == [str(tmp_path / "val/b/img_0001.jpg")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_step_of_one_broken_image_takes_the_next_sound_one(tmp_path: Path, workers: int) -> None:
    run = damaged(tmp_path, batch_size=1, workers=workers, augment="none")
    batches = TrainBatches(open_splits(run.data).train, run, rank=0, world=1, device=CPU)
    seen = list(batches.epoch(0))
    assert [len(batch.labels) for batch in seen] == [1] * 8  # a step for every image, and none is lost
    images = [batch.images.numpy().tobytes() for batch in seen]
    at = next(i for i in range(8) if images[i] == images[(i + 1) % 8])
    assert len(set(images)) == 7
    assert int(seen[at].labels) == int(seen[(at + 1) % 8].labels)
    assert list(batches.broken) == [str(tmp_path / "train/a/img_0001.jpg")]


def test_every_worker_of_a_step_has_an_image(tmp_path: Path) -> None:
    run = damaged(tmp_path, batch_size=2)
    train = open_splits(run.data).train
    ranks = [TrainBatches(train, run, rank=rank, world=2, device=CPU) for rank in (0, 1)]
    assert {len(batch.labels) for rank in ranks for batch in rank.epoch(0)} == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_that_is_wholly_broken_names_its_first_image(tmp_path: Path, workers: int) -> None:
    run = damaged(tmp_path, batch_size=4, workers=workers)
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(HTML)
    splits = open_splits(run.data)
    with pytest.raises(UserError, match=r"none of the 8 images can be read; the first: .*\.jpg: not an image"):
        list(TrainBatches(splits.train, run, rank=0, world=1, device=CPU).epoch(0))
    assert splits.test is not None
    tiny = {"model": {"vit": {"width": 18, "depth": 1, "heads": 9, "patch": 16}}, "method": "vit"}
    learner = Learner(Config.model_validate(run.model_dump() | tiny), 2, World(0, 1, CPU))
    with pytest.raises(RunFailed, match="none of the images of the evaluation can be read"):
        learner.evaluate(EvalBatches(splits.test, run, rank=0, world=1, device=CPU))


def test_the_broken_images_of_all_workers_are_one_list() -> None:
    assert of_all_workers({"a.jpg": "x"}, data_config(on_error="skip"), World(0, 1, CPU)) == {"a.jpg": "x"}


def test_a_dangling_link_is_a_broken_image_that_is_named(tmp_path: Path) -> None:
    run = damaged(tmp_path, batch_size=9)
    (tmp_path / "train/a/gone.png").symlink_to("nowhere/5.png")
    splits = open_splits(run.data)
    batches = TrainBatches(splits.train, run, rank=0, world=1, device=CPU)
    assert [len(batch.labels) for batch in batches.epoch(0)] == [7]
    assert {Path(where).name for where in batches.broken} == {"gone.png", "img_0001.jpg"}
    raising = run.model_copy(update={"data": run.data.model_copy(update={"on_error": "raise"})})
    with pytest.raises(UserError, match=r"(gone\.png: No such file|img_0001\.jpg: not an image)"):
        list(TrainBatches(splits.train, raising, rank=0, world=1, device=CPU).epoch(0))


# ---------------------------------------------------------------------------------------------- loading processes


def test_a_shared_memory_without_room_is_said_and_trained_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    write_folder(tmp_path, "train", {"a": 9, "b": 9})
    run = config(source="imagefolder", root=tmp_path, image_size=32, batch_size=4, workers=2)
    train = open_splits(run.data).train
    wanted = [b.images for b in TrainBatches(train, run, rank=0, world=1, device=CPU).epoch(0)]
    assert "shm" not in capsys.readouterr().err
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    got = [b.images for b in TrainBatches(train, run, rank=0, world=1, device=CPU).epoch(0)]
    assert all(torch.equal(one, two) for one, two in zip(wanted, got, strict=True))
    (line,) = capsys.readouterr().err.splitlines()
    assert "/dev/shm has no room" in line
    assert "--shm-size" in line


def test_a_long_tmpdir_does_not_lose_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tempfile

    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    write_folder(tmp_path, "train", {"a": 9, "b": 9})
    run = config(source="imagefolder", root=tmp_path, image_size=32, batch_size=4, workers=2)
    batches = TrainBatches(open_splits(run.data).train, run, rank=0, world=1, device=CPU)
    assert [len(batch.labels) for batch in batches.epoch(0)] == [4] * 4
    assert "TMPDIR is too long" in capsys.readouterr().err


def test_a_loading_process_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    def die(self: Cut, image: Image.Image, numbers: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write_folder(tmp_path, "train", {"a": 4, "b": 4})
    run = config(source="imagefolder", root=tmp_path, image_size=32, batch_size=4, workers=1)
    monkeypatch.setattr(Cut, "__call__", die)
    with pytest.raises(RunFailed, match=r"data\.workers=1: a process that loads images has died") as caught:
        list(TrainBatches(open_splits(run.data).train, run, rank=0, world=1, device=CPU).epoch(0))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- packing


def test_packing_leaves_broken_images_out_or_names_them_before_it_writes(tmp_path: Path) -> None:
    run = damaged(tmp_path / "in")
    raising = run.data.model_copy(update={"on_error": "raise"})
    with pytest.raises(UserError, match=r"train/a/img_0001\.jpg: not an image"):
        pack(raising, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = pack(run.data, tmp_path / "out")
    assert (done["train"], done["test"], done["left_out"]) == (7, 3, 2)
    packed = open_splits(data_config(source="parquet", root=tmp_path / "out"))
    plain = open_splits(run.data)
    assert set(packed.train.keys) == set(plain.train.keys) - {"a/img_0001.jpg"}
    assert packed.classes == ("a", "b")
    again = pack(data_config(source="parquet", root=tmp_path / "out"), tmp_path / "again")
    assert (again["train"], again["left_out"]) == (7, 0)


def test_packing_a_parquet_set_with_broken_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": picture(i, 20, 20) if i != 3 else HTML, "path": f"{i}.jpg"} for i in range(8)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "in").mkdir()
    table = pa.table({"image": pa.array(cells, kind), "label": [i % 2 for i in range(8)]})
    pq.write_table(table, tmp_path / "in" / "train.parquet")
    done = pack(data_config(source="parquet", root=tmp_path / "in", on_error="skip"), tmp_path / "out")
    assert (done["train"], done["left_out"]) == (7, 1)
    packed = open_splits(data_config(source="parquet", root=tmp_path / "out")).train
    assert set(packed.keys) == {f"{i}.jpg" for i in range(8)} - {"3.jpg"}
    by_key = dict(zip(packed.table.rows["key"].to_pylist(), range(7), strict=True))
    for place, data in packed.table.images.scan(np.arange(7)):
        key = packed.table.rows["key"].to_pylist()[place]
        assert data == cells[int(key.removesuffix(".jpg"))]["bytes"], key
    assert len(by_key) == 7


def test_pillows_warnings_about_sound_images_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.BytesIO()
    Image.new("P", (8, 8)).save(out, "PNG", transparency=bytes([0, 128]))
    assert decode(out.getvalue()).mode == "RGB"
    assert capsys.readouterr().err == ""
    assert "PIL" in sys.modules


def test_a_preparation_is_what_cuts() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8))
    for kind in ("resize", "centre_crop"):
        preparation = Preparation(kind, (16, 16), (0.5,) * 3, (0.5,) * 3)  # type: ignore[arg-type]
        assert Cut(preparation.size, preparation.kind, flip=False)(image, ()).shape == (16, 16, 3)
