"""The loop: resume is bitwise, a broken loss ends the run, and only one process writes to a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ONE, tiny
from PIL import Image

from bootvit import checkpoint
from bootvit.asks import Ask, Asked
from bootvit.config import Config
from bootvit.errors import RunFailed, UserError
from bootvit.evaluate import read_checkpoint
from bootvit.learner import Learner, Networks
from bootvit.loop import fit
from bootvit.result import EpochReport
from bootvit.runs import claim
from bootvit.tracking import read_journal


class Stop(Exception):
    """Ends a run after an epoch, as a kill would."""


def run(config: Config, stop_after: int | None = None, *, resume: bool = False, **options: Any) -> dict[str, Any]:
    folder, _ = claim(config, resume=resume, overwrite=False)

    def on_epoch(report: EpochReport) -> None:
        if report.epoch == stop_after:
            raise Stop

    return fit(config, ONE, folder, on_epoch=on_epoch, **options)


def final_weights(path: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.newest(path / "checkpoints")
    assert saved is not None
    state = checkpoint.load(saved)["learner"]
    moments = {f"moment {i}": m for o in state["optimizers"] for i, s in o["state"].items() for m in s.values()}
    return dict(state["networks"]) | moments


def measured(journal: Path) -> list[tuple[int, int, str, float]]:
    """Everything but the times and the speed."""
    return [(r.step, r.epoch, r.name, r.value) for r in read_journal(journal)[0] if "per_second" not in r.name]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "vit"},
        {"method": "joint", "model": {"vit": {"dropout": 0.1}, "agent": {"dropout": 0.1}}},
        {"method": "shared", "model": {"vit": {"dropout": 0.1}}},
        {"method": "vit", "optim": {"sam_rho": 0.1}},
        {"method": "agent", "optim": {"name": "sgd", "momentum": 0.9}, "precision": "bf16"},
    ],
    ids=["vit", "joint", "shared", "sam", "agent"],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(changes: dict[str, Any], tmp_path: Path) -> None:
    def config(name: str) -> Config:
        return tiny(name=name, ray__storage_path=str(tmp_path), **changes)

    whole = run(config("whole"))
    with pytest.raises(Stop):
        run(config("cut"), stop_after=2)
    resumed = run(config("cut"), resume=True)
    one, other = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert resumed["final"] == whole["final"]
    one_journal, other_journal = (measured(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert one_journal == other_journal


def after(calls: int) -> Asked:
    """Asks to stop at the call of this number."""
    made = 0

    def asked() -> Ask:
        nonlocal made
        made += 1
        return Ask.STOP if made >= calls else Ask.NOTHING

    return asked


@pytest.mark.parametrize("calls", [1, 2, 3, 5])  # of 4 steps an epoch, 3 are asked
@pytest.mark.parametrize("method", ["vit", "joint", "shared"])
def test_a_run_that_is_stopped_within_an_epoch_goes_on_with_the_next_batch(
    method: str, calls: int, tmp_path: Path
) -> None:
    def config(name: str) -> Config:
        dropout = {"vit": {"dropout": 0.1}, "agent": {"dropout": 0.1} if method == "joint" else {}}
        return tiny(name=name, method=method, model=dropout, ray__storage_path=str(tmp_path))

    whole = run(config("whole"))
    with pytest.raises(KeyboardInterrupt):
        run(config("cut"), asked=after(calls))
    saved = checkpoint.newest(tmp_path / "cut" / "checkpoints")
    assert saved is not None
    assert (saved.epoch, saved.batch) == ((calls - 1) // 3, (calls - 1) % 3 + 1)
    resumed = run(config("cut"), resume=True)
    one, other = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {key: resumed[key] for key in ("final", "steps", "best")} == {
        key: whole[key] for key in ("final", "steps", "best")
    }
    ends, again = (
        [row for row in measured(tmp_path / name / "metrics.jsonl") if not row[2].startswith("train/")]
        for name in ("whole", "cut")
    )
    assert ends == again


def test_every_image_is_seen_once_an_epoch_however_often_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    real = Learner.step

    def look(self: Learner, batch: Any, *args: Any) -> torch.Tensor:
        seen.extend(image.numpy().tobytes() for image in batch.images)
        return real(self, batch, *args)

    monkeypatch.setattr(Learner, "step", look)
    run(tiny(name="whole", ray__storage_path=str(tmp_path)))
    whole, seen = seen, []
    config = tiny(name="cut", ray__storage_path=str(tmp_path))
    for _ in range(9):
        with pytest.raises(KeyboardInterrupt):
            run(config, asked=after(1), resume=True)
    run(config, resume=True)
    assert seen == whole


def test_a_run_is_saved_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = checkpoint.write

    def note(folder: Path, data: bytes, **place: Any) -> checkpoint.Saved:
        written.append(place["step"])
        return real(folder, data, **place)

    monkeypatch.setattr(checkpoint, "write", note)
    config = tiny(ray__storage_path=str(tmp_path), schedule__epochs=2, checkpoint={"every_steps": 3, "keep": 1})
    run(config)
    assert written == [3, 4, 6, 8]
    assert [saved.step for saved in checkpoint.described(tmp_path / "tiny" / "checkpoints")] == [8]


def test_a_run_is_saved_every_so_many_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, int]] = []
    real = checkpoint.write

    def note(folder: Path, data: bytes, **place: Any) -> checkpoint.Saved:
        written.append((place["epoch"], place["batch"]))
        return real(folder, data, **place)

    monkeypatch.setattr(checkpoint, "write", note)
    run(tiny(name="often", ray__storage_path=str(tmp_path), schedule__epochs=1, checkpoint={"every_minutes": 1e-9}))
    assert written == [(0, 1), (0, 2), (0, 3), (1, 0)]
    written.clear()
    run(tiny(name="never", ray__storage_path=str(tmp_path), schedule__epochs=1, checkpoint={"every_minutes": None}))
    assert written == [(1, 0)]


@pytest.mark.parametrize("where", ["evaluation", "journal"])
def test_a_run_that_ends_in_its_evaluation_is_evaluated_when_it_goes_on(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny(name="whole", ray__storage_path=str(tmp_path)))
    config = tiny(name="cut", ray__storage_path=str(tmp_path))
    if where == "evaluation":

        def evaluate(self: Learner, batches: Any, answers: Any = None) -> Any:
            raise Stop

        with monkeypatch.context() as patched:
            patched.setattr(Learner, "evaluate", evaluate)
            with pytest.raises(Stop):
                run(config)
    else:  # killed while the evaluation is written down: its first record is there, its last is not
        with pytest.raises(Stop):
            run(config, stop_after=1)
        journal = tmp_path / "cut" / "metrics.jsonl"
        lines = journal.read_text().splitlines(keepends=True)
        first = next(i for i, line in enumerate(lines) if "test/" in line)
        journal.write_text("".join(lines[: first + 1]))
    reports: list[tuple[int, bool]] = []
    folder, _ = claim(config, resume=True, overwrite=False)
    fit(config, ONE, folder, on_epoch=lambda report: reports.append((report.epoch, bool(report.metrics))))
    assert reports == [(1, True), (2, True), (3, True)]
    one, other = (measured(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert one == other


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    data = {"held_out": 0.2}
    keep = {"best": True, "keep": 1}
    run(tiny(ray__storage_path=str(tmp_path), data=data, checkpoint=keep, schedule__epochs=6, optim__lr=2e-2))
    records, _ = read_journal(tmp_path / "tiny" / "metrics.jsonl")
    curve = {r.step: r.value for r in records if r.name == "held_out/vit/top1"}
    best = checkpoint.best_of(tmp_path / "tiny" / "checkpoints")
    assert best is not None
    assert best.step == max(curve, key=lambda step: (curve[step], -step))
    kept = [saved.step for saved in checkpoint.described(tmp_path / "tiny" / "checkpoints")]
    assert kept == sorted({best.step, max(curve)})
    taken = read_checkpoint(tmp_path / "tiny", best=True)
    assert taken["progress"]["step"] == best.step < max(curve)
    assert read_checkpoint(tmp_path / "tiny")["progress"]["step"] == max(curve)


def test_the_best_of_a_run_that_kept_none_is_one_line(tmp_path: Path) -> None:
    run(tiny(ray__storage_path=str(tmp_path), schedule__epochs=1))
    with pytest.raises(UserError, match=r"--best: no checkpoint was kept as the best: train with checkpoint.best=true"):
        read_checkpoint(tmp_path / "tiny", best=True)


def test_the_journal_tells_the_run(tmp_path: Path) -> None:
    result = run(tiny(ray__storage_path=str(tmp_path)))
    records, _ = read_journal(tmp_path / "tiny" / "metrics.jsonl")
    names = {r.name for r in records}
    assert {"train/vit/hint", "train/agent/kd", "train/lr", "test/vit/top1", "test/agent/loss"} <= names
    assert "train/agent/hint" not in names
    assert [r.epoch for r in records if r.name == "test/vit/top1"] == [0, 1, 2]
    last = [r.value for r in records if r.name == "test/vit/top1"][-1]
    assert result["final"]["vit"]["top1"] == pytest.approx(last, abs=1e-4)
    assert json.loads((tmp_path / "tiny" / "result.json").read_text()) == result


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(ray__storage_path=str(tmp_path), tracking__log_every=100)
    real = Learner.step

    def break_at_six(self: Learner, batch: Any, step: int, *args: Any) -> torch.Tensor:
        terms = real(self, batch, step, *args)
        return terms * float("nan") if step == 5 else terms

    monkeypatch.setattr(Learner, "step", break_at_six)
    with pytest.raises(RunFailed, match=r"not finite at step 6: vit/ce=nan"):
        run(config)
    saved = checkpoint.newest(tmp_path / "tiny" / "checkpoints")
    assert saved is not None
    assert (saved.epoch, saved.step) == (1, 4)


def test_an_infinite_rate_breaks_the_loss_for_real(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="not finite"):
        run(tiny(ray__storage_path=str(tmp_path), optim={"lr": 1e30, "clip_norm": None}))


@pytest.mark.parametrize("epoch", [1, 2])
def test_weights_that_break_at_the_last_step_of_an_epoch_end_the_run(
    epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(ray__storage_path=str(tmp_path))
    real = Learner.step

    def break_weights(self: Learner, batch: Any, step: int, *args: Any) -> torch.Tensor:
        terms = real(self, batch, step, *args)
        if step == 4 * epoch - 1:  # no later loss could tell
            with torch.no_grad():
                self.networks.state_dict()["vit.head.bias"][0] = float("inf")
        return terms

    monkeypatch.setattr(Learner, "step", break_weights)
    left = "the checkpoint of step 4 is kept" if epoch == 2 else "there is no checkpoint yet"
    with pytest.raises(RunFailed, match=rf"the weights are not finite after step {4 * epoch}: vit\.head\.bias; {left}"):
        run(config)
    saved = checkpoint.newest(tmp_path / "tiny" / "checkpoints")
    assert (saved.step if saved else 0) == 4 * (epoch - 1)


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(ray__storage_path=str(tmp_path))
    real = Networks.features

    def broken(self: Networks, images: torch.Tensor) -> Any:
        features = real(self, images)
        if not self.training:
            features["agent"] = features["agent"]._replace(logits=features["agent"].logits * float("nan"))
        return features

    monkeypatch.setattr(Networks, "features", broken)
    with pytest.raises(
        RunFailed, match=r"the evaluation's loss is not finite: agent=nan .*; the checkpoint of step 4 is kept"
    ):
        run(config)


def test_broken_images_are_in_the_journal_and_in_the_result(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        for name in ("a", "b"):
            for i in range(count):
                path = tmp_path / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.random.default_rng([i, len(name)]).integers(0, 255, (100, 100, 3), np.uint8)).save(
                    path
                )
    for broken in ("train/a/0.png", "train/b/3.png", "test/b/1.png"):
        (tmp_path / broken).write_bytes(b"broken")
    data = {"source": "imagefolder", "root": str(tmp_path), "fraction": 1.0, "image_size": 16, "on_error": "skip"}
    config = tiny(ray__storage_path=str(tmp_path / "runs"), data=data, model__vit__patch=4, schedule__epochs=2)
    with pytest.raises(Stop):
        run(config, stop_after=1)
    result = run(config, resume=True)
    assert result["skipped"] == 3
    named = [Path(line.split(": ")[0]).relative_to(tmp_path).as_posix() for line in result["skipped_images"]]
    assert named == ["test/b/1.png", "train/a/0.png", "train/b/3.png"]
    records, _ = read_journal(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    assert [(r.epoch, r.value) for r in records if r.name == "data/skipped"] == [(0, 3), (1, 3)]


def test_max_steps_ends_early_and_is_evaluated(tmp_path: Path) -> None:
    result = run(tiny(ray__storage_path=str(tmp_path), schedule__max_steps=2))
    assert (result["steps"], result["epochs"], result["status"]) == (2, 1, "finished")
    assert result["final"]["vit"]["top1"] >= 0


def test_held_out_images_are_used_for_selection_and_the_test_set_once(tmp_path: Path) -> None:
    result = run(tiny(ray__storage_path=str(tmp_path), data__held_out=0.2))
    records, _ = read_journal(tmp_path / "tiny" / "metrics.jsonl")
    assert [r.epoch for r in records if r.name == "held_out/vit/top1"] == [0, 1, 2]
    assert [r.epoch for r in records if r.name == "test/vit/top1"] == [2]
    assert result["held_out"] is not None
    never = run(tiny(name="never", ray__storage_path=str(tmp_path), data__held_out=0.2), test="never")
    assert never["final"] is None
    assert never["held_out"] == result["held_out"]


def test_a_run_that_was_taken_over_stops_writing(tmp_path: Path) -> None:
    config = tiny(ray__storage_path=str(tmp_path))
    folder, _ = claim(config, resume=False, overwrite=False)

    def take_over(report: EpochReport) -> None:
        claim(config, resume=True, overwrite=False)

    with pytest.raises(RunFailed, match="taken over"):
        fit(config, ONE, folder, on_epoch=take_over)
    assert not (tmp_path / "tiny" / "result.json").exists()


def test_a_name_that_exists(tmp_path: Path) -> None:
    config = tiny(ray__storage_path=str(tmp_path))
    run(config)
    with pytest.raises(UserError, match="a run of this name exists"):
        claim(config, resume=False, overwrite=False)
    assert claim(config, resume=True, overwrite=False)[1] == "finished"
    assert claim(config, resume=False, overwrite=True)[1] == "absent"


def test_resuming_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tiny(ray__storage_path=str(tmp_path)), stop_after=1)
    changed = tiny(ray__storage_path=str(tmp_path), optim__lr=0.5)
    with pytest.raises(UserError, match=r"optim.lr=0.5: the run was started with optim.lr=0.002"):
        claim(changed, resume=True, overwrite=False)


def test_a_strangers_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="is not a run"):
        claim(tiny(ray__storage_path=str(tmp_path)), resume=False, overwrite=True)
    assert (tmp_path / "tiny" / "thesis.tex").exists()
