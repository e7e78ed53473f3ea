"""The map of the gain goes on where it was and tables what is there; the paper's rows start with one command each."""

import json
from pathlib import Path

import pytest

from benchmarks import cifar10
from benchmarks.gain import __main__ as gain
from benchmarks.gain.cells import Cell, cells
from bootvit.__main__ import main as bootvit
from bootvit.load import load_config

SMALL = ["data.source=fake", "data.num_classes=10", "model.vit={width: 18, depth: 2, mlp_width: 24}"]
SHORT = ["schedule.max_steps=2", "precision=fp32"]


def test_cells_see_as_many_images_at_every_fraction_and_can_be_trained() -> None:
    every = list(cells(2))
    assert len(every) == len(set(every)) == 3 * 2 * 2 * 2 * 4 * 2
    assert {round(cell.epochs * cell.fraction * 50_000) for cell in every} == {100_000, 400_000}
    for cell in every[:16]:
        config = load_config(str(gain.HERE / f"{cell.recipe}.yaml"), [*cell.overrides(), "data.root=."])
        assert (config.data.mixup > 0) == (config.optim.ema is not None) == (cell.recipe == "strong")


def test_a_second_start_trains_what_is_left_and_the_table_has_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def here(cell: Cell, runs: Path, root: Path, deadline: float, more: list[str]) -> int:
        trained.append(cell.name)
        words = [*cell.overrides(), f"ray.storage_path={runs}", f"data.root={root}", *more]
        return bootvit(["train", str(gain.HERE / f"{cell.recipe}.yaml"), "--local", "--resume", *words])

    monkeypatch.setattr(gain, "run", here)
    command = ["--root", str(tmp_path), "--runs", str(tmp_path / "runs"), "--seeds", "1"]
    assert gain.main([*command, "--cells", "1", "--set", *SMALL, *SHORT]) == 0
    assert gain.main([*command, "--cells", "3", "--set", *SMALL, *SHORT]) == 0
    assert trained == [cell.name for cell in list(cells(1))[:3]]
    assert gain.main([*command, "--hours", "0"]) == 0
    table = capsys.readouterr().out.splitlines()[-1]
    assert table.startswith("| timm | 100,000 | 10% | plain | ")
    assert table.count("not measured") == 2  # shared, and its gain
    assert (tmp_path / "runs" / "gain.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_cell_that_the_time_ends_goes_on(tmp_path: Path) -> None:
    command = ["--root", str(tmp_path), "--runs", str(tmp_path / "runs"), "--seeds", "1", "--cells", "1"]
    endless = ["--set", *SMALL, "schedule.epochs=1000000"]
    run, saved = tmp_path / "runs" / next(cells(1)).name, [""]
    for _ in range(2):
        assert gain.main([*command, "--hours", "0.01", *endless]) == 0
        assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
        saved.append(max(path.name for path in run.glob("checkpoints/step-*.json")))
    assert "" < saved[1] < saved[2]
    assert not (tmp_path / "runs" / "gain.png").exists()


@pytest.mark.parametrize(("row", "recipe"), [("vit-small", "reference"), ("joint-small", "strong")])
def test_a_row_of_the_paper_takes_two_steps(
    row: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = "data={source: digits, root: null, image_size: 32, batch_size: 6, fraction: 0.05, eval_batch_size: 64}"
    command = [row, "--recipe", recipe, "--root", str(tmp_path), "--runs", str(tmp_path)]
    assert cifar10.main([*command, tiny, *SHORT]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["name"], told["steps"]) == (f"{row}-{recipe}", 2)
    assert ("ema_top1" in told["final"]["vit"]) == (recipe == "strong")
