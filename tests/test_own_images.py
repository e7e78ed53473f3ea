"""README's five lines on one's own images: each is run, as it stands there, on a small generated folder."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bootvit.__main__ import main

README = Path(__file__).resolve().parent.parent / "README.md"
QUICK = ["schedule.epochs=1", "schedule.warmup_epochs=0", "tracking.enabled=false"]


def lines() -> list[str]:
    """The commands of the section, one each."""
    block = README.read_text().partition("## Your own images in five lines")[2].partition("```bash\n")[2]
    return [part for line in block.partition("```")[0].splitlines() for part in line.split(" && ")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for shade, name in enumerate(("circle", "square")):
        (tmp_path / "shapes" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(100 * shade, 100 * shade + 100, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "shapes" / name / f"{number}.png")
    return tmp_path


def run(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """A line's output; quick where it trains, and in a file where it says so."""
    command, _, file = line.partition(" > ")
    words = shlex.split(command)[1:]
    capsys.readouterr()
    assert main([*words, *(QUICK if words[0] in ("train", "sweep") else [])]) == 0
    out = capsys.readouterr().out
    if file:
        Path(file).write_text(out)
    return out


def test_suggest_train_predict_export(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suggest, train, _, _, predict, export = lines()
    for line in (suggest, train):
        run(line, capsys)
    assert run(predict, capsys).count("vit: ") == 10
    written = run(export, capsys).strip()
    assert (Path(written) / "model.safetensors").is_file()


@pytest.mark.slow
def test_sweep_and_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suggest, _, sweep, report, _, _ = lines()
    for line in (suggest, sweep, report):
        run(line, capsys)
    assert "shared.vit" in (here / "shapes-report" / "report.md").read_text()
