"""The cache of decoded images: made again when it was damaged, and one line when it cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_making import config, write_folder, write_small_parquet

from bootvit.data import Subset, open_splits
from bootvit.data.cache import decoded, mapped
from bootvit.errors import RunFailed


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("BOOTVIT_CACHE", str(folder))
    return folder


@pytest.fixture
def subset(tmp_path: Path) -> Subset:
    write_small_parquet(tmp_path / "data")
    return open_splits(config(source="parquet", root=tmp_path / "data").data).train


@pytest.mark.parametrize("lost", ["pixels.npy", "places.npy", "broken.json", "sizes.json"])
@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_an_entry_that_lost_a_file_is_made_again(cache: Path, subset: Subset, lost: str, how: str) -> None:
    before = np.array(decoded(subset).pixels)
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    if how == "deleted":
        (entry / lost).unlink()
    else:
        (entry / lost).write_bytes((entry / lost).read_bytes()[:-1])
    np.testing.assert_array_equal(decoded(subset).pixels, before)
    assert [path for path in cache.iterdir() if path.is_dir()] == [entry]


def test_the_mapped_kind_is_made_again_too(cache: Path, subset: Subset) -> None:
    before = dict(mapped(subset).scan(np.arange(len(subset))))
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    (entry / "images.arrow").unlink()
    assert dict(mapped(subset).scan(np.arange(len(subset)))) == before


@pytest.mark.parametrize("make", [decoded, mapped])
def test_a_full_cache_is_one_line_and_leaves_nothing_half_made(
    cache: Path, subset: Subset, make: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bootvit.data.cache._begin_array", full)
    monkeypatch.setattr(pa, "OSFile", full)
    with pytest.raises(
        RunFailed, match=r"No space left on device; \d+ MiB are free there\): .*BOOTVIT_CACHE"
    ) as caught:
        make(subset)  # type: ignore[operator]
    assert str(cache) in str(caught.value)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_cache_that_is_a_file_is_one_line(tmp_path: Path, subset: Subset, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BOOTVIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RunFailed, match="set BOOTVIT_CACHE to another folder"):
        decoded(subset)


def test_pixels_are_those_of_the_files(cache: Path, tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"a": 3, "b": 3}, size=(16, 16))
    (tmp_path / "train" / "a" / "img_0001.jpg").write_bytes(b"broken")
    subset = open_splits(config(source="imagefolder", root=tmp_path).data).train
    found = decoded(subset)
    assert found.pixels.shape == (5, 16, 16, 3)
    for pixels, place in zip(found.pixels, found.places, strict=True):
        wanted = subset.table.images.open(int(subset.indices[place]))  # type: ignore[union-attr]
        np.testing.assert_array_equal(pixels, np.asarray(wanted))
    assert [place for place, _ in found.broken] == [subset.keys.index("a/img_0001.jpg")]
