"""A config for one's own images: it follows their sizes and their number, says why, and trains."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bootvit.__main__ import main
from bootvit.config import parse_yaml
from bootvit.load import load_config


def images(folder: Path, count: int, low: int, high: int, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """`count` images of every class, their sides between two numbers of pixels."""
    rng = np.random.default_rng(0)
    for shade, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rows, cols = rng.integers(low, high + 1, 2)
            pixels = rng.integers(100 * shade, 100 * shade + 100, (rows, cols, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def suggested(place: Path | str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[str, dict]:  # type: ignore[type-arg]
    capsys.readouterr()
    assert main(["data", "suggest", str(place), *more]) == 0
    text = capsys.readouterr().out
    return text, parse_yaml(text, "suggested")


def test_what_is_printed_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, found = suggested(images(tmp_path / "pets", 12, 20, 40), capsys)
    assert found["extends"] == "imagefolder/joint"
    assert found["data"]["held_out"] == 0.1
    assert "there is no test folder" in text
    (tmp_path / "pets.yaml").write_text(text)
    assert main(["train", "pets.yaml", "--local", "schedule.max_steps=3", "tracking.enabled=false"]) == 0
    assert (tmp_path / "runs" / "pets" / "result.json").is_file()
    assert load_config("pets.yaml").method == "joint"


@pytest.mark.parametrize(
    ("low", "high", "side", "patch"),
    [(9, 9, 8, 2), (33, 40, 32, 4), (70, 70, 64, 8), (230, 300, 224, 16), (700, 700, 224, 16)],
)
def test_the_size_is_that_of_the_images_and_the_patch_divides_it(
    low: int, high: int, side: int, patch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = suggested(images(tmp_path / "x", 4, low, high), capsys)
    assert (found["data"]["image_size"], found["model"]["vit"]["patch"]) == (side, patch)
    assert found["data"].get("dct_scaling", False) == (high == 700)


def test_more_images_get_a_wider_network_and_fewer_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    _, few = suggested("digits/joint", capsys)
    _, many = suggested("imagefolder/joint", capsys, "data.source=fake")
    assert few["model"]["vit"]["width"] <= many["model"]["vit"]["width"]
    assert few["schedule"]["epochs"] == 67  # 3,000 steps of 32 of 1,438 images


def test_a_folder_without_images_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "suggest", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
