"""Checkpoints: what is written is what is read, damage is seen, and writing does not disturb what goes on."""

import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bootvit import checkpoint, files
from bootvit.config import CheckpointConfig
from bootvit.errors import RunFailed, UserError
from bootvit.files import write_atomic


def save(folder: Path, epoch: int) -> checkpoint.Saved:
    data = checkpoint.pack({"x": torch.full((3,), epoch)})
    return checkpoint.write(folder, data, epoch=epoch, step=10 * epoch)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_state_comes_back_as_it_was() -> None:
    state = {
        "weights": {"a.b": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "n": torch.tensor(3)},
        "groups": [{"lr": 0.1, "betas": [0.9, 0.999], "fused": None, "params": [0, 1]}],
        "skipped": {"a/b.png": "no image"},
        "step": 7,
    }
    found = checkpoint.unpack(checkpoint.pack(state), "here")
    assert {name: value.tolist() for name, value in found["weights"].items()} == {
        name: value.tolist() for name, value in state["weights"].items()
    }
    assert {key: found[key] for key in ("groups", "skipped", "step")} == {
        key: state[key] for key in ("groups", "skipped", "step")
    }


def test_an_optimisers_moments_lie_as_their_weights_do() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=False)
    layer(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    saved = checkpoint.unpack(checkpoint.pack(checkpoint.optimizer_state(optimizer)), "here")
    other = torch.optim.AdamW(layer.parameters(), fused=True)
    checkpoint.restore_optimizer(other, saved)
    assert [group["fused"] for group in other.param_groups] == [True]  # how it is computed is not what was saved
    other.step()
    optimizer.step()
    moment, again = (o.state[layer.weight]["exp_avg"] for o in (optimizer, other))
    torch.testing.assert_close(moment, again)
    assert again.stride() == layer.weight.stride()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3, 4):
        save(tmp_path, epoch)
    (tmp_path / "best.json").write_text('{"step": 10, "metric": "held_out/vit/top1", "value": 50.0}')
    (tmp_path / "step-00000020.json").unlink()  # as a process that was killed leaves it
    (tmp_path / ".step-00000050.safetensors.123.part").write_bytes(b"half")
    checkpoint.prune(tmp_path, 1)
    kept = [f"step-000000{step}.{kind}" for step in (10, 40) for kind in ("json", "safetensors")]
    assert names(tmp_path) == ["best.json", *kept]
    best = checkpoint.best_of(tmp_path)
    assert best is not None
    assert best.step == 10
    assert torch.equal(checkpoint.load(best)["x"], torch.full((3,), 1))


def cut(path: Path, marker: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, marker: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove(path: Path, marker: Path) -> None:
    path.unlink()


class Evil:
    """A pickle that would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (str(self.marker),))


def poison(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(marker)))


@pytest.mark.parametrize("damage", [cut, flip, remove, poison])
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path, Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    damaged, marker = save(tmp_path, 2), tmp_path / "ran"
    damage(damaged.path, marker)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.epoch == 1
    assert "step-00000020.safetensors is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"step-00000020.safetensors: is not there, or not what was written"):
        checkpoint.load(damaged)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"12345678", pickle.dumps(Evil(Path("ran"))), b"\xff" * 100])
def test_what_is_no_checkpoint_is_one_line(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^here: not a checkpoint of bootvit: "):
        checkpoint.unpack(content, "here")
    with pytest.raises(UserError, match=r"^here: not a checkpoint of bootvit: "):
        checkpoint.unpack(checkpoint.safetensors.torch.save({"a": torch.ones(1)}), "here")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_without_its_description_does_not_exist(tmp_path: Path) -> None:
    save(tmp_path, 1).path.with_suffix(".json").unlink()
    assert checkpoint.newest(tmp_path) is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", b"old")

    def crash(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def writer(folder: Path, **settings: Any) -> checkpoint.Writer:
    return checkpoint.Writer(folder, CheckpointConfig(**settings), lambda: None)


def test_what_is_trained_meanwhile_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, real = threading.Event(), checkpoint.pack

    def slow(state: checkpoint.State) -> bytes:
        assert go.wait(10)
        return real(state)

    monkeypatch.setattr(checkpoint, "pack", slow)
    one, weight = writer(tmp_path), torch.zeros(4)
    one.save({"w": weight}, step=1, epoch=0, batch=1, final=False)
    weight.fill_(9)  # training goes on
    go.set()
    one.wait()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert (newest.step, newest.epoch, newest.batch, newest.final) == (1, 0, 1, False)
    assert checkpoint.load(newest)["w"].tolist() == [0, 0, 0, 0]
    one.close()


def test_a_checkpoint_that_cannot_be_written_is_told_at_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    one = writer(tmp_path)
    monkeypatch.setattr(checkpoint, "write_atomic", full)
    one.save({"w": torch.zeros(1)}, step=1, epoch=0, batch=1, final=False)
    with pytest.raises(OSError, match="No space left"):
        one.save({"w": torch.zeros(1)}, step=2, epoch=0, batch=2, final=False)
    one.close()


def test_a_run_that_was_taken_over_writes_no_checkpoint(tmp_path: Path) -> None:
    def lost() -> None:
        raise RunFailed("taken over")

    one = checkpoint.Writer(tmp_path, CheckpointConfig(), lost)
    one.save({"w": torch.zeros(1)}, step=1, epoch=0, batch=1, final=False)
    with pytest.raises(RunFailed, match="taken over"):
        one.wait()
    assert names(tmp_path) == []
    one.close()


def test_the_best_is_named_only_where_it_is_asked_for_and_is_better(tmp_path: Path) -> None:
    writer(tmp_path).note_best(1, "held_out/vit/top1", 50.0)
    assert names(tmp_path) == []
    one = writer(tmp_path, best=True)
    for step, value in ((1, 50.0), (2, 49.0), (3, 50.0), (4, 51.0), (5, 10.0)):
        one.note_best(step, "held_out/vit/top1", value)
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 4,
        "metric": "held_out/vit/top1",
        "value": 51.0,
    }
