"""Sources: what is read, under which keys and classes, and what is refused."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_making import data_config, picture, write_folder, write_hugging_face, write_small_parquet
from PIL import Image

from bootvit.data import open_splits, open_table
from bootvit.data.decode import BrokenImage, decode
from bootvit.data.info import describe
from bootvit.data.table import ImageTable
from bootvit.errors import UserError


def train_table(**values: object) -> ImageTable:
    table = open_table(data_config(**values), "train")
    assert table is not None
    return table


def test_digits_are_scikit_learns_with_a_fifth_for_testing() -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    splits = open_splits(data_config(source="digits"))
    assert splits.test is not None
    keys = splits.train.keys + splits.test.keys
    assert sorted(map(int, keys)) == list(range(1797))
    for label in range(10):
        size = int((raw.target == label).sum())
        assert int((splits.test.labels == label).sum()) == round(size / 5)
        ordered = sorted((str(row) for row in np.flatnonzero(raw.target == label)), key=_sha)
        assert set(ordered[-round(size / 5) :]) <= set(splits.test.keys)
    table = splits.train.table
    row = table.rows["key"].to_pylist().index(splits.train.keys[0])
    pixels = table.images.pixels[row]  # type: ignore[union-attr]
    np.testing.assert_array_equal(pixels[..., 0], np.round(raw.images[int(splits.train.keys[0])] * 255 / 16))
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])
    assert splits.train.table.auto == "none"  # a mirrored digit is another digit


def _sha(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_measured_constants_are_the_training_pixels() -> None:
    table = train_table(source="digits")
    pixels = table.images.pixels / 255  # type: ignore[union-attr]
    first = sorted(range(len(table)), key=lambda row: _sha(table.rows["key"].to_pylist()[row]))[:1000]
    np.testing.assert_allclose(table.mean, pixels[first].mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(table.std, pixels[first].std((0, 1, 2)), atol=1e-4)
    assert train_table(source="digits", mean=(0.1, 0.2, 0.3)).mean == (0.1, 0.2, 0.3)


def write_cifar(root: Path, source: str) -> np.ndarray:
    """Ten images a file, as torchvision unpacks them; returns the training pixels (N, 32, 32, 3)."""
    generator = np.random.default_rng(0)
    ten = source == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    pixels = []
    for name in names:
        data = generator.integers(0, 256, (10, 3072), dtype=np.uint8)
        labels = list(range(10)) if ten else list(range(0, 100, 10))
        batch = {"data": data, "labels" if ten else "fine_labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        pixels.append(data.reshape(10, 3, 32, 32).transpose(0, 2, 3, 1))
    meta = {"label_names" if ten else "fine_label_names": [f"name {i}" for i in range(10 if ten else 100)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return np.concatenate(pixels[:-1])


@pytest.mark.parametrize(("source", "mean"), [("cifar10", 0.4914), ("cifar100", 0.5071)])
@pytest.mark.parametrize("below", [True, False])
def test_cifar_files_are_read_as_torchvision_leaves_them(tmp_path: Path, source: str, mean: float, below: bool) -> None:
    wanted = write_cifar(tmp_path, source)
    splits = open_splits(data_config(source=source, root=tmp_path if below else next(tmp_path.iterdir())))
    np.testing.assert_array_equal(splits.train.table.images.pixels, wanted)  # type: ignore[union-attr]
    assert splits.train.table.rows["key"].to_pylist() == [str(row) for row in range(len(wanted))]
    assert splits.classes[3] == "name 3"
    assert (splits.mean[0], splits.std) == (mean, (0.2023, 0.1994, 0.2010))
    assert splits.test is not None
    assert len(splits.test) == 10


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "owned"),))  # type: ignore[return-value]

    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(UserError, match="data_batch_3: not a CIFAR file"):
        train_table(source="cifar10", root=tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"data": np.zeros((10, 3072), np.uint8), "labels": [0] * 9}, "not a whole CIFAR file: 10 images and 9 labels"),
        ({"data": np.zeros((10, 3071), np.uint8), "labels": [0] * 10}, "not a CIFAR file: cannot reshape"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}, "not a CIFAR file: invalid literal"),
        ({"labels": [0]}, "not a CIFAR file: 'data' is missing"),
        ([1], "not a CIFAR file: 'data' is missing"),
    ],
)
def test_a_cifar_file_that_is_not_whole_is_named(tmp_path: Path, batch: object, words: str) -> None:
    write_cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(UserError) as caught:
        train_table(source="cifar10", root=tmp_path)
    assert str(caught.value).startswith(f"{path}: {words}")


def test_a_damaged_pickle_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    sound = path.read_bytes()
    failed = 0
    for place in range(0, 200, 3):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 0x55]) + sound[place + 1 :])
        try:
            train_table(source="cifar10", root=tmp_path)
        except UserError as err:
            failed += 1
            assert "\n" not in str(err)  # noqa: PT017
    assert failed > 20


def test_folders_are_listed_once_with_nested_files(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"b": 2, "a": 1}, size=(8, 8))
    deep = tmp_path / "train" / "a" / "more" / "deep"
    deep.mkdir(parents=True)
    (deep / "x.PNG").write_bytes(picture(0, 8, 8))
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    write_folder(tmp_path, "val", {"a": 1}, size=(8, 8))
    table = train_table(source="imagefolder", root=tmp_path)
    assert table.classes == ("a", "b")
    assert table.rows["key"].to_pylist() == ["a/img_0000.jpg", "a/more/deep/x.PNG", "b/img_0000.jpg", "b/img_0001.jpg"]
    assert table.labels.tolist() == [0, 0, 1, 1]
    assert table.mean == (0.485, 0.456, 0.406)
    test = open_splits(data_config(source="imagenet", root=tmp_path)).test
    assert test is not None
    assert test.keys == ["a/img_0000.jpg"]


def test_class_folders_in_the_root_are_a_training_split(tmp_path: Path) -> None:
    write_folder(tmp_path, ".", {"a": 1, "b": 1}, size=(8, 8))
    splits = open_splits(data_config(source="imagefolder", root=tmp_path))
    assert (splits.classes, splits.test) == (("a", "b"), None)


def test_a_test_folder_without_classes_is_no_split(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"a": 1, "b": 1}, size=(8, 8))
    write_folder(tmp_path, "val", {"b": 1}, size=(8, 8))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "unlabelled.jpg").write_bytes(picture(0, 8, 8))
    test = open_splits(data_config(source="imagefolder", root=tmp_path)).test
    assert test is not None
    assert test.labels.tolist() == [1]


def test_parquet_keys_are_paths_where_unique_else_hashes(tmp_path: Path) -> None:
    images = [picture(seed, 8, 8) for seed in range(4)]
    write_hugging_face(tmp_path / "a" / "train.parquet", images, [0, 1, 0, 1], ["w", "x", "y", "z"], ["cat", "dog"])
    table = train_table(source="parquet", root=tmp_path / "a")
    assert (table.rows["key"].to_pylist(), table.classes) == (["w", "x", "y", "z"], ("cat", "dog"))
    for folder, paths in (("b", ["w", "w", "y", "z"]), ("c", [None] * 4)):
        write_hugging_face(tmp_path / folder / "train.parquet", images, [0, 1, 0, 1], paths)
        table = train_table(source="parquet", root=tmp_path / folder)
        assert table.rows["key"].to_pylist() == [hashlib.sha256(data).hexdigest() for data in images]
        assert table.classes == ("0", "1")


def test_equal_images_have_different_keys_whatever_the_order(tmp_path: Path) -> None:
    images = [picture(0, 8, 8), picture(1, 8, 8), picture(0, 8, 8)]
    write_hugging_face(tmp_path / "a" / "train.parquet", images, [1, 0, 0], [None] * 3)
    write_hugging_face(tmp_path / "b" / "train.parquet", images[::-1], [0, 0, 1], [None] * 3)
    one, two = (train_table(source="parquet", root=tmp_path / name) for name in "ab")
    pairs = [set(zip(table.labels.tolist(), table.rows["key"].to_pylist(), strict=True)) for table in (one, two)]
    assert pairs[0] == pairs[1]
    assert len(set(one.rows["key"].to_pylist())) == 3


def test_val_files_stand_in_for_an_unlabelled_test_split(tmp_path: Path) -> None:
    images = [picture(seed, 8, 8) for seed in range(2)]
    write_hugging_face(tmp_path / "train.parquet", images, [0, 1], ["a", "b"])
    write_hugging_face(tmp_path / "test.parquet", images, [-1, -1], ["c", "d"])
    write_hugging_face(tmp_path / "validation.parquet", images, [1, 0], ["e", "f"])
    test = open_splits(data_config(source="parquet", root=tmp_path)).test
    assert test is not None
    assert set(test.keys) == {"e", "f"}


def test_fake_images_are_the_same_every_time_and_of_both_kinds() -> None:
    small, again = train_table(source="fake", image_size=16), train_table(source="fake", image_size=16)
    assert (len(small), small.native, small.auto) == (160, (16, 16), "crop")
    assert small.fingerprint == again.fingerprint
    large = train_table(source="fake", image_size=100, num_classes=2)
    assert (len(large), large.native, large.auto) == (80, None, "area")


def test_more_classes_than_the_source_has_can_be_asked_for() -> None:
    assert len(open_splits(data_config(source="digits", num_classes=12)).classes) == 12


# -------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "LA", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 256)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    out = io.BytesIO()
    image.save(out, "TIFF")
    pixels = np.asarray(decode(out.getvalue()))
    assert (pixels.shape, pixels.dtype) == ((9, 7, 3), np.uint8)
    if mode in ("L", "RGBA", "LA", "I;16"):
        np.testing.assert_array_equal(pixels, np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("data", [b"", b"abc", picture(0, 64, 64)[:900], b"\x89PNG\r\n\x1a\n" + b"0" * 40])
def test_broken_bytes_are_a_broken_image(data: bytes) -> None:
    with pytest.raises(BrokenImage):
        decode(data)


# ------------------------------------------------------------------------------------------------- refused


def _no_label(root: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "name": ["a"]}), root / "train.parquet")


def _no_image(root: Path) -> None:
    pq.write_table(pa.table({"picture": [b"x"], "label": [0]}), root / "train.parquet")


def _null_label(root: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": pa.array([None], pa.int64())}), root / "train.parquet")


def _not_parquet(root: Path) -> None:
    (root / "train.parquet").write_bytes(b"nonsense")


def _negative_label(root: Path) -> None:
    write_hugging_face(root / "train.parquet", [picture(0, 8, 8)] * 2, [0, -1], ["a", "b"])


def _label_beyond_names(root: Path) -> None:
    write_hugging_face(root / "train.parquet", [picture(0, 8, 8)] * 2, [0, 2], ["a", "b"], ["cat", "dog"])


def _empty_class(root: Path) -> None:
    write_folder(root, "train", {"a": 1, "b": 0}, size=(8, 8))


def _unknown_test_class(root: Path) -> None:
    write_folder(root, "train", {"a": 1, "b": 1}, size=(8, 8))
    write_folder(root, "val", {"c": 1}, size=(8, 8))


def _nothing(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("source", "make", "words"),
    [
        ("parquet", _nothing, "no train*.parquet there"),
        ("parquet", _no_label, "no label column"),
        ("parquet", _no_image, "no image column"),
        ("parquet", _null_label, "1 rows without a label"),
        ("parquet", _not_parquet, "not a readable Parquet file"),
        ("parquet", _negative_label, "image 'b' has label -1"),
        ("parquet", _label_beyond_names, "image 'b' has label 2, but there are 2 classes"),
        ("imagefolder", _nothing, "no class folders in"),
        ("imagefolder", _empty_class, "the class folder holds no images"),
        ("imagefolder", _unknown_test_class, "no class 'c' among the training classes"),
        ("imagenet", _nothing, "imagenet needs train/ and val/"),
        ("cifar10", _nothing, "does not exist; source 'cifar10' reads"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, source: str, make: object, words: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError) as caught:
        open_splits(data_config(source=source, root=tmp_path))
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"source": "parquet"}, "data.root: source 'parquet' needs the folder"),
        ({"source": "imagenet", "root": "/does/not/exist"}, "data.root=/does/not/exist: no such folder"),
        ({"source": "digits", "num_classes": 4}, "data.num_classes=4: the source has 10 classes"),
    ],
)
def test_impossible_settings_are_one_line(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_splits(data_config(**values))
    assert words in str(caught.value)


def test_describe_tells_what_is_there(tmp_path: Path) -> None:
    write_small_parquet(tmp_path)
    facts = describe(data_config(source="parquet", root=tmp_path, held_out=0.1))
    assert (facts["train"], facts["train_of"], facts["held_out"], facts["test"]) == (54, 60, 6, 15)
    assert (facts["image_size"], facts["augment"], facts["notes"]) == ([16, 16], "crop", [])
