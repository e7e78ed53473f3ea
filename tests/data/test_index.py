"""The index of an image folder: made once, and again after any change; keys' order and digests against sorted lists."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_making import data_config, picture, write_folder

from bootvit.data import DataSplits, cache, folders, open_splits
from bootvit.data.keys import by_hash, digest_of, fingerprint_of
from bootvit.data.table import PixelImages


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose index has been made, in a data set below tmp_path and a cache of its own."""
    monkeypatch.setenv("BOOTVIT_CACHE", str(tmp_path / "elsewhere" / "cache"))
    monkeypatch.setattr(cache, "SETTLED_NS", 0)
    write_folder(tmp_path, "train", {"a": 4, "b": 3})
    write_folder(tmp_path, "train/a", {"deep": 2})
    write_folder(tmp_path, "test", {"a": 2})
    (tmp_path / "train" / "a" / "notes.txt").write_text("")
    (tmp_path / "elsewhere").mkdir()
    write_folder(tmp_path / "elsewhere", "one", {"x": 1})
    write_folder(tmp_path / "elsewhere", "two", {"x": 2})
    (tmp_path / "train" / "b" / "link").symlink_to(tmp_path / "elsewhere" / "one")
    calls: list[Path] = []
    make = folders._index

    def counted(folder: Path, *args: object, **kwargs: object) -> pa.Table:
        calls.append(folder)
        return make(folder, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(folders, "_index", counted)
    return calls


def opened(root: Path) -> DataSplits:
    return open_splits(data_config(source="imagefolder", root=root, fraction=0.5, held_out=0.2))


def said(splits: DataSplits) -> list[object]:
    tables = [splits.train.table, splits.test.table if splits.test else splits.train.table]
    rows: list[object] = [(t.rows.to_pydict(), t.order.tolist(), t.images.paths.to_pylist()) for t in tables]  # type: ignore[union-attr]
    held = splits.held_out.digest if splits.held_out else ""
    return [*rows, splits.train.digest, held, splits.fingerprint, splits.notes, splits.classes]


def test_folders_that_have_not_changed_are_listed_once(tmp_path: Path, made: list[Path]) -> None:
    first = opened(tmp_path)
    again = opened(tmp_path)
    assert [folder.name for folder in made] == ["train", "test"]
    assert said(first) == said(again)
    assert any("files that are no images by their endings" in note for note in again.notes)


def rewrite_an_image(root: Path) -> None:
    path = root / "train" / "a" / "img_0001.jpg"
    path.write_bytes(picture(77, 120, 110))


def point_a_link_elsewhere(root: Path) -> None:
    link = root / "train" / "b" / "link"
    link.unlink()
    link.symlink_to(root / "elsewhere" / "two")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file more": lambda root: (root / "train" / "b" / "new.png").write_bytes(b"x"),
    "a file less": lambda root: (root / "train" / "a" / "img_0000.jpg").unlink(),
    "a file renamed": lambda root: (root / "train/a/img_0000.jpg").rename(root / "train/a/other.jpg"),
    "a file more in a folder below": lambda root: (root / "train/a/deep/new.jpg").write_bytes(b"x"),
    "a file more behind a link": lambda root: (root / "elsewhere/one/x/new.jpg").write_bytes(b"x"),
    "a link that leads elsewhere": point_a_link_elsewhere,
    "other bytes in one of the first images": rewrite_an_image,
    "a class more": lambda root: write_folder(root, "train", {"c": 2}),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_after_any_change_the_index_is_made_again(tmp_path: Path, made: list[Path], change: str) -> None:
    before = opened(tmp_path)
    made.clear()
    CHANGES[change](tmp_path)
    now = opened(tmp_path)
    assert "train" in [folder.name for folder in made]
    assert now.fingerprint != before.fingerprint
    shutil.rmtree(tmp_path / "elsewhere" / "cache")
    assert said(opened(tmp_path)) == said(now)


def test_a_folder_that_has_just_changed_is_not_trusted(
    tmp_path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is added within the same tick of the clock leaves the folder's time as it was."""
    monkeypatch.setattr(cache, "SETTLED_NS", 3600 * 10**9)
    opened(tmp_path)
    opened(tmp_path)
    assert [folder.name for folder in made] == ["train", "test"] * 2


def test_without_a_cache_the_folders_are_listed_and_a_note_says_so(
    tmp_path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = said(opened(tmp_path))
    monkeypatch.setenv("BOOTVIT_CACHE", "/dev/null/cache")
    found = opened(tmp_path)
    assert said(found)[:5] == wanted[:5]
    assert sum("/dev/null/cache: the cache" in note and "BOOTVIT_CACHE" in note for note in found.notes) == 2


# ------------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize("chunks", [1, 3])
def test_order_and_digests_are_those_of_sorted_lists(chunks: int) -> None:
    rng = np.random.default_rng(0)
    texts = sorted(
        {f"{name}{rng.integers(10**6)}.jpg" for name in ("a/", "b", "ä/ö", "日本", "z z/") for _ in range(40)}
    )
    labels = rng.integers(0, 12, len(texts))  # 10 and 11 come before 2 as text
    parts = [part.tolist() for part in np.array_split(np.array(texts, object), chunks)]
    keys = pa.chunked_array([pa.array(part, pa.string()) for part in parts])
    hashes = [hashlib.sha256(key.encode()).digest()[:16] for key in texts]
    order = sorted(range(len(texts)), key=lambda row: hashes[row])
    assert by_hash(keys).tolist() == order
    rows = rng.permutation(len(texts))[:77]
    lines = "".join(sorted(f"{labels[row]} {texts[row]}\n" for row in rows))
    assert digest_of(keys, labels, rows) == hashlib.sha256(lines.encode()).hexdigest()[:32]
    pixels = rng.integers(0, 256, (len(texts), 2, 2, 3), dtype=np.uint8)
    sampled = np.array(order)[np.linspace(0, len(order) - 1, 16).astype(int)]
    lines = "".join(f"{labels[row]} {texts[row]}\n" for row in order)
    wanted = hashlib.sha256(lines.encode() + pixels[sampled].tobytes()).hexdigest()[:32]
    assert fingerprint_of(PixelImages(pixels), labels, keys, by_hash(keys)) == wanted


def test_choosing_images_needs_no_torch() -> None:
    code = "import bootvit.data, bootvit.data.info, sys; assert not {'torch', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
