"""Resizing and cutting against Pillow and torchvision; padding and cropping against loops."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bootvit.data import Preparation
from bootvit.data.areas import area_box, least_area_side
from bootvit.data.augment import pad_crop_flip
from bootvit.data.batches import preprocess
from bootvit.data.decode import Reading, decode
from bootvit.data.randomness import permutation, uniforms
from bootvit.data.resize import area_crop, resize_batch
from bootvit.standalone.images import centre_crop


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((32, 32), (224, 224)),
        ((8, 8), (32, 32)),
        ((28, 28), (224, 112)),
        ((64, 64), (32, 32)),
        ((33, 47), (20, 61)),
        ((96, 5), (31, 7)),
        ((7, 9), (7, 9)),
        ((1, 1), (5, 5)),
    ],
)
def test_resizing_on_the_device_is_pillows_to_the_bit(source: tuple[int, int], target: tuple[int, int]) -> None:
    images = noise(0, 6, *source, 3)
    images[0], images[1] = 0, 255
    images[2] = images[2] // 128 * 255  # extremes next to one another
    wanted = [np.asarray(Image.fromarray(i).resize(target[::-1], Image.Resampling.BILINEAR)) for i in images]
    got = resize_batch(torch.from_numpy(images).permute(0, 3, 1, 2), target).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(got.numpy(), np.stack(wanted))


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [True, False])
def test_pad_crop_flip_equals_loops(padding: int, flip: bool) -> None:
    images, numbers = noise(1, 9, 6, 5, 3), uniforms(0, 0, 0, 9, 4)
    got = pad_crop_flip(torch.from_numpy(images).permute(0, 3, 1, 2), numbers, padding, flip=flip)
    mirrored = 0
    for i in range(9):
        padded = np.zeros((6 + 2 * padding, 5 + 2 * padding, 3), np.uint8)
        padded[padding : padding + 6, padding : padding + 5] = images[i]
        top, left = int(numbers[i, 0] * (2 * padding + 1)), int(numbers[i, 1] * (2 * padding + 1))
        wanted = padded[top : top + 6, left : left + 5]
        if flip and numbers[i, 2] < 0.5:
            wanted, mirrored = wanted[:, ::-1], mirrored + 1
        np.testing.assert_array_equal(got[i].permute(1, 2, 0).numpy(), wanted)
    assert (0 < mirrored < 9) is flip


def test_every_crop_is_reached_equally_often() -> None:
    numbers = uniforms(3, 0, 0, 8100, 4)
    places = (numbers[:, :2] * 9).astype(int) @ [9, 1]
    counts = np.bincount(places, minlength=81)
    assert len(counts) == 81
    assert abs(counts - 100).max() < 60


@pytest.mark.parametrize("size", [(120, 180), (180, 120), (100, 100), (20, 400), (400, 20), (3, 2)])
def test_area_boxes_are_torchvisions_for_the_same_numbers(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.transforms import RandomResizedCrop

    image = Image.fromarray(noise(2, *size, 3))
    fallbacks = 0
    for position in range(40):
        numbers = uniforms(1, 0, position, position + 1, 24)[0].tolist()
        uniform = iter(numbers[:20])
        places = iter(numbers[20:22])

        def draw(tensor: torch.Tensor, low: float, high: float, it: object = uniform) -> torch.Tensor:
            return torch.full((1,), float(low) + (float(high) - float(low)) * next(it), dtype=torch.float64)  # type: ignore[call-overload]

        def integer(low: int, high: int, size: object, it: object = places) -> torch.Tensor:
            return torch.tensor([low + int(next(it) * (high - low))])  # type: ignore[call-overload]

        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "uniform_", draw)
            patched.setattr(torch, "randint", integer)
            wanted = RandomResizedCrop.get_params(image, [0.6, 1.0], [3 / 4, 4 / 3])
        box = area_box(*size, numbers)
        assert (box.top, box.left, box.rows, box.cols) == tuple(wanted)
        assert box.top + box.rows <= size[0]
        assert box.left + box.cols <= size[1]
        fallbacks += next(places, None) is not None
    assert (fallbacks == 40) == (max(size) / min(size) > 4)


def test_area_crop_cuts_resizes_and_mirrors() -> None:
    from torchvision.transforms import functional

    image = Image.fromarray(noise(3, 90, 120, 3))
    for position in range(6):
        numbers = uniforms(0, 0, position, position + 1, 24)[0].tolist()
        top, left, rows, cols = area_box(90, 120, numbers)
        wanted = functional.resized_crop(image, top, left, rows, cols, [48, 32])
        if numbers[22] < 0.5:
            wanted = functional.hflip(wanted)
        np.testing.assert_array_equal(np.asarray(area_crop(image, (48, 32), numbers, flip=True)), np.asarray(wanted))


def test_no_area_has_a_side_below_the_least() -> None:
    for rows, cols in ((300, 400), (100, 900), (900, 100), (640, 480)):
        boxes = [area_box(rows, cols, uniforms(0, 0, at, at + 1, 24)[0].tolist()) for at in range(2000)]
        least = min(min(box.rows, box.cols) for box in boxes)
        assert least_area_side(rows, cols) - 1 <= least <= 1.15 * least_area_side(rows, cols)


def photograph(rows: int, cols: int) -> Image.Image:
    """Smooth colours with an edge, as JPEGs have them."""
    y, x = np.mgrid[:rows, :cols]
    planes = [127 + 100 * np.sin(x / (90 + 9 * i)) * np.cos(y / (131 - 5 * i)) for i in range(3)]
    pixels = np.stack(planes, axis=2).astype(np.uint8)
    pixels[rows // 3 : rows // 2, cols // 4 :] //= 2
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("size", "crops", "scale"),
    [
        ((900, 1200), (64, 64), 8),
        ((900, 1200), (64, 200), 2),
        ((901, 1203), (128, 96), 4),
        ((200, 1200), (101, 101), 1),
    ],
)
def test_a_large_jpeg_is_decoded_at_the_smallest_size_that_suffices(
    size: tuple[int, int], crops: tuple[int, int], scale: int
) -> None:
    data = io.BytesIO()
    photograph(*size).save(data, "JPEG", quality=92)
    whole, reduced = decode(data.getvalue()), decode(data.getvalue(), Reading(crops=crops))
    assert (reduced.height, reduced.width) == (-(-size[0] // scale), -(-size[1] // scale))
    assert (scale == 1) == np.array_equal(np.asarray(whole), np.asarray(reduced))
    for position in range(8):
        numbers = uniforms(0, 0, position, position + 1, 24)[0].tolist()
        cuts = [np.asarray(area_crop(image, crops, numbers, flip=True)).astype(int) for image in (whole, reduced)]
        assert cuts[0].shape == cuts[1].shape
        assert np.abs(cuts[0] - cuts[1]).mean() < 5  # of 255: an area begins at a pixel of the smaller image


def test_what_is_no_jpeg_is_decoded_whole() -> None:
    png = io.BytesIO()
    photograph(300, 400).save(png, "PNG")
    assert decode(png.getvalue(), Reading(crops=(8, 8))).size == (400, 300)


@pytest.mark.parametrize("source", [(270, 300), (300, 270), (500, 375), (64, 64), (333, 1000), (257, 256)])
@pytest.mark.parametrize("side", [224, 112, 33])
def test_centre_crop_is_torchvisions(source: tuple[int, int], side: int) -> None:
    from torchvision.transforms import CenterCrop, Resize

    image = Image.fromarray(noise(4, *source, 3))
    wanted = CenterCrop(side)(Resize(round(side * 256 / 224))(image))
    np.testing.assert_array_equal(np.asarray(centre_crop(image, (side, side))), np.asarray(wanted))


@pytest.mark.parametrize("source", [(100, 100), (50, 300), (300, 50)])
def test_centre_crop_of_a_rectangle_keeps_the_aspect(source: tuple[int, int]) -> None:
    image = Image.fromarray(np.full((*source, 3), 200, np.uint8))
    assert np.asarray(centre_crop(image, (64, 96))).shape == (64, 96, 3)
    assert np.asarray(centre_crop(image, (64, 96))).min() == 200  # nothing but the image


def test_preprocess_scales_and_normalises_like_torchvision() -> None:
    from torchvision.transforms import functional

    mean, std = (0.5071, 0.4867, 0.4408), (0.2023, 0.1994, 0.2010)
    image = Image.fromarray(noise(5, 32, 32, 3))
    wanted = functional.normalize(functional.to_tensor(image.resize((56, 56), Image.Resampling.BILINEAR)), mean, std)
    got = preprocess([image], Preparation("resize", (56, 56), mean, std))[0]
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    grey = Image.fromarray(noise(6, 300, 200))
    assert preprocess([grey], Preparation("centre_crop", (64, 64), mean, std)).shape == (1, 3, 64, 64)


def test_random_numbers_are_a_function_of_seed_epoch_and_position() -> None:
    whole = uniforms(7, 2, 0, 100, 24)
    np.testing.assert_array_equal(uniforms(7, 2, 37, 61, 24), whole[37:61])
    assert whole.min() >= 0
    assert whole.max() < 1
    assert abs(whole.mean() - 0.5) < 0.02
    assert not np.array_equal(uniforms(8, 2, 0, 100, 24), whole)
    assert not np.array_equal(uniforms(7, 3, 0, 100, 24), whole)
    assert sorted(permutation(0, 0, 50)) == list(range(50))
    assert not np.array_equal(permutation(0, 0, 50), permutation(0, 1, 50))
    # fixed for ever: a change here would change every run
    assert permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
