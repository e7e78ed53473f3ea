"""Checkpoints: what is written is what is read, and damage is seen."""

import pickle
from pathlib import Path

import pytest
import torch

from bootvit import checkpoint, files
from bootvit.errors import UserError
from bootvit.files import write_atomic


def save(folder: Path, epoch: int) -> checkpoint.Saved:
    return checkpoint.save(folder, {"x": torch.full((3,), epoch)}, epoch=epoch, step=10 * epoch, final=False)


def test_the_newest_two_are_kept_and_read_back(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"epoch-000{e}.{kind}" for e in (2, 3) for kind in ("json", "pt")
    ]
    newest = checkpoint.newest(tmp_path)
    assert newest == checkpoint.Saved(tmp_path / "epoch-0003.pt", 3, 30, False)
    assert torch.equal(checkpoint.load(newest.path)["x"], torch.full((3,), 3))


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2).path
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.epoch == 1
    assert "epoch-0002.pt is damaged" in capsys.readouterr().err


def test_a_checkpoint_without_its_description_does_not_exist(tmp_path: Path) -> None:
    save(tmp_path, 1).path.with_suffix(".json").unlink()
    assert checkpoint.newest(tmp_path) is None


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "ran"),))

    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", b"old")

    def crash(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]
