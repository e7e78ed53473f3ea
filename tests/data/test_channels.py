"""Images of one, two and four channels: read, trained on, evaluated, exported and predicted."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator
from PIL import Image

import bootvit
from bootvit.__main__ import main
from bootvit.config import DataConfig
from bootvit.data import open_splits
from bootvit.data.decode import BrokenImage, Planes, Reading, decode
from bootvit.data.resize import area_crop
from bootvit.errors import UserError
from bootvit.standalone.images import centre_crop


def saved(values: np.ndarray[Any, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    if options:
        Image.fromarray(values, options.pop("mode", None)).save(out, **options)
    else:
        np.save(out, values)
    return out.getvalue()


def values(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_what_is_read() -> None:
    four = values(0, 5, 7, 4)
    tiff = decode(saved(four, format="TIFF"), Reading(4))
    assert isinstance(tiff, Planes)
    assert (tiff.height, tiff.width) == (5, 7)
    np.testing.assert_array_equal(tiff.pixels, four)
    np.testing.assert_array_equal(decode(saved(four), Reading(4)), four)
    grey = values(1, 5, 7)
    for data in (saved(grey), saved(grey[:, :, None]), saved(grey, format="PNG")):
        np.testing.assert_array_equal(decode(data, Reading(1)), grey[:, :, None])
    colour = values(2, 5, 7, 3)
    luminance = np.asarray(Image.fromarray(colour).convert("L"))[:, :, None]
    np.testing.assert_array_equal(decode(saved(colour, format="PNG"), Reading(1)), luminance)
    rgb = decode(saved(colour))
    assert isinstance(rgb, Image.Image)
    np.testing.assert_array_equal(rgb, colour)
    pages = [Image.fromarray(values(page, 5, 7)) for page in range(6)]
    out = io.BytesIO()
    pages[0].save(out, "TIFF", save_all=True, append_images=pages[1:])
    found = np.asarray(decode(out.getvalue(), Reading(6)))
    assert all((found[:, :, page] == np.asarray(one)).all() for page, one in enumerate(pages))


def test_ranges_of_values() -> None:
    deep = np.array([[[0], [3000], [12000], [65535]]], np.uint16)
    assert np.asarray(decode(saved(deep), Reading(1))).ravel().tolist() == [0, 12, 47, 255]
    assert np.asarray(decode(saved(deep), Reading(1, (0, 3000)))).ravel().tolist() == [0, 255, 255, 255]
    shares = np.array([[[-0.5], [0.5], [1.0]]], np.float32)
    assert np.asarray(decode(saved(shares), Reading(1))).ravel().tolist() == [0, 128, 255]
    assert np.asarray(decode(saved(shares), Reading(1, (-0.5, 0.5)))).ravel().tolist() == [0, 255, 255]


@pytest.mark.parametrize(
    ("data", "reading", "expected"),
    [
        (saved(values(0, 5, 7, 2)), Reading(4), "it holds 5x7x2 values, but data.channels=4"),
        (saved(values(0, 5, 7, 3), format="PNG"), Reading(4), "it holds 5x7x3 values, but data.channels=4"),
        (saved(np.array([[[np.nan]]])), Reading(1), "its values of type float64 are no finite numbers"),
        (saved(np.array([["a"]])), Reading(1), "are no finite numbers"),
        (b"\x93NUMPY broken", Reading(1), ""),
    ],
)
def test_what_is_no_image_of_these_channels(data: bytes, reading: Reading, expected: str) -> None:
    with pytest.raises(BrokenImage, match=expected.replace("[", ".")):
        decode(data, reading)


def test_planes_are_cut_as_pillow_cuts_each() -> None:
    pixels = values(3, 90, 70, 4)
    numbers = np.random.default_rng(0).random(24).tolist()
    for place in range(4):
        alone = Image.fromarray(pixels[:, :, place])
        for flip in (True, False):
            found = area_crop(Planes(pixels), (32, 24), numbers, flip=flip)
            assert (np.asarray(found)[:, :, place] == np.asarray(area_crop(alone, (32, 24), numbers, flip=flip))).all()
        found = centre_crop(Planes(pixels), (32, 32))
        assert (np.asarray(found)[:, :, place] == np.asarray(centre_crop(alone, (32, 32)))).all()


# ------------------------------------------------------------------------------------------------ whole runs


def write(root: Path, kind: str) -> None:
    """Two classes that differ in their last channel; large images have sizes of their own."""
    for split, count in (("train", 10), ("test", 3)):
        for label, name in enumerate(("dark", "light")):
            for number in range(count):
                folder = root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                if kind == "tiff":
                    pixels = values(number + 100 * label, 100 + number, 120 - number, 4)
                    pixels[:, :, 3] = pixels[:, :, 3] // 2 + 127 * label
                    Image.fromarray(pixels).save(folder / f"{number}.tif")
                else:
                    np.save(folder / f"{number}.npy", values(number + 100 * label, 16, 16) // 2 + 127 * label)


@pytest.mark.parametrize(("kind", "channels", "method"), [("tiff", 4, "joint"), ("npy", 1, "shared")])
def test_a_folder_is_trained_on_evaluated_exported_and_predicted(
    kind: str, channels: int, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "images", kind)
    data = ["data.source=imagefolder", "data.root=images", f"data.channels={channels}", "data.batch_size=5"]
    recipe = ["data.policy=rand", "data.color_jitter=0.2", "data.erase=0.5", "data.mixup=0.2", "data.image_size=16"]
    short = ["schedule.epochs=2", "tracking.enabled=false", "data.workers=0", "schedule.warmup_epochs=0"]
    command = ["train", f"digits/{method}", "--local", "name=run", "model.vit.patch=4", *data, *recipe, *short]
    assert main(command) == 0
    capsys.readouterr()
    assert main(["eval", "run", "--local", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vit"]["total"] == 6
    for form in ("timm", "onnx"):
        assert main(["export", "run", "--format", form]) == 0
    run = bootvit.load_run("runs/run")
    images = torch.randn(2, channels, 16, 16)
    mine = run.networks["vit"](images).detach()
    plain = timm.create_model(f"local-dir:{tmp_path}/runs/run/export/run-vit", pretrained=True).eval()
    assert tuple(plain.pretrained_cfg["input_size"]) == (channels, 16, 16)
    torch.testing.assert_close(plain(images).detach(), mine)
    graph = ReferenceEvaluator(f"{tmp_path}/runs/run/export/run-vit.onnx")
    np.testing.assert_allclose(graph.run(None, {"images": images.numpy()})[0], mine.numpy(), rtol=1e-3, atol=1e-4)
    path = sorted((tmp_path / "images" / "test" / "light").iterdir())[0]
    capsys.readouterr()
    assert main(["predict", "run", str(path), "--json"]) == 0
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert {row["network"] for row in rows} == {"vit", "agent"}
    if kind == "npy":
        array = np.load(path)[:, :, None]
        assert run.predict(array)[0]["vit"] == pytest.approx(rows[0]["classes"], abs=1e-6)


def test_mean_and_deviation_are_measured(tmp_path: Path) -> None:
    write(tmp_path, "tiff")
    splits = open_splits(DataConfig(source="imagefolder", root=str(tmp_path), channels=4, image_size=16))
    pixels = np.concatenate([np.asarray(Image.open(p)).reshape(-1, 4) for p in tmp_path.glob("train/*/*.tif")]) / 255
    assert splits.mean == pytest.approx(pixels.mean(0), abs=1e-3)
    assert splits.std == pytest.approx(pixels.std(0), abs=1e-3)


def test_a_source_of_other_channels_and_wrong_numbers_are_one_line() -> None:
    with pytest.raises(UserError, match=r"data.channels=4: the images of source 'digits' have 3"):
        open_splits(DataConfig(source="digits", channels=4))
    assert open_splits(DataConfig(source="digits", channels=1)).train.table.images.open(0).width == 8
    with pytest.raises(ValueError, match=r"data.mean has 3 numbers for data.channels=1"):
        DataConfig(channels=1, mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="the smaller one comes first"):
        DataConfig(channels=1, value_range=(1.0, 0.0))
