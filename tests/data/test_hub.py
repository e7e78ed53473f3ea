"""Parquet files on the Hugging Face Hub, or rather on a server of this machine that answers as it does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_making import data_config, write_small_parquet
from hub import Hub, serve_hub

from bootvit.addresses import public, public_address, wrong_with
from bootvit.data import DataSplits, open_splits
from bootvit.data.cache import mapped
from bootvit.errors import RunFailed, UserError

ROOT = "hf://datasets/me/small/data"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one data set."""
    write_small_parquet(tmp_path / "hub" / "data")
    monkeypatch.setenv("BOOTVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve_hub(tmp_path / "hub", "me/small") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def pixels(splits: DataSplits) -> dict[str, bytes]:
    """The encoded bytes of each training image."""
    found = mapped(splits.train).scan(np.arange(len(splits.train)))
    return {key: data for key, (_, data) in zip(splits.train.keys, found, strict=True)}


def test_the_hub_holds_the_same_data_set_as_a_folder(hub: Hub) -> None:
    there, here = (
        open_splits(data_config(source="parquet", root=root, fraction=0.5)) for root in (ROOT, hub.folder / "data")
    )
    for attribute in ("classes", "mean", "std", "fingerprint"):
        assert getattr(there, attribute) == getattr(here, attribute)
    assert there.train.digest == here.train.digest
    assert pixels(there) == pixels(here)
    assert "Bearer hf_secret" in hub.tokens
    assert there.train.table.where(0).startswith(f"{ROOT}/train-0000")


@pytest.mark.parametrize(
    ("root", "status", "kind", "words"),
    [
        (ROOT, 401, UserError, "the store refuses"),
        (ROOT, 403, UserError, "the store refuses"),
        (ROOT, 500, RunFailed, "does not answer as it should"),
        ("hf://datasets/me/none", 0, UserError, "no such data set, revision or folder; for a private one set HF_TOKEN"),
        (f"{ROOT}/none", 0, UserError, "no such data set, revision or folder"),
    ],
)
def test_trouble_is_one_line(hub: Hub, root: str, status: int, kind: type[Exception], words: str) -> None:
    hub.status = status
    with pytest.raises(kind, match=rf"^data\.root={re.escape(root)}: .*{words}") as caught:
        open_splits(data_config(source="parquet", root=root))
    assert "hf_secret" not in str(caught.value)


def test_an_address_of_the_hub() -> None:
    at = "hf://datasets/me/small@v1.0/data"
    assert wrong_with(at, "parquet") is None
    assert wrong_with("hf://datasets/me/small", "parquet") is None
    assert public_address(at) == at
    assert public(f"see {at}: gone") == f"see {at}: gone"
    for wrong in ("hf://me/small", "hf://datasets/me", "hf://datasets/me/small?token=x", "hf://models/me/small"):
        assert "expected hf://datasets/OWNER/NAME" in (wrong_with(wrong, "parquet") or "")
    assert "needs a folder" in (wrong_with(at, "imagefolder") or "")
