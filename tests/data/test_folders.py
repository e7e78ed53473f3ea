"""Image folders as people have them: spellings of splits, flat folders, droppings, links, odd names."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_making import data_config, picture, write_folder
from PIL import Image

from bootvit.data import DataSplits, open_splits
from bootvit.data.splits import disguised, split_of_file, split_of_folder
from bootvit.errors import UserError

SMALL = (8, 8)


def write(root: Path, *splits: str, classes: str = "ab", count: int = 2) -> None:
    """split/class/img_0000.jpg and so on."""
    for split in splits:
        write_folder(root, split, dict.fromkeys(classes, count), size=SMALL)


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(0, *SMALL))


def opened(root: Path, source: str = "imagefolder", **values: object) -> DataSplits:
    return open_splits(data_config(source=source, root=root, **values))


def sizes(splits: DataSplits) -> tuple[int, int]:
    return len(splits.train), len(splits.test) if splits.test else 0


def refused(root: Path, source: str = "imagefolder") -> str:
    """The one line without the root."""
    with pytest.raises(UserError) as caught:
        opened(root, source)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


# ------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"), ("train", "valid"), ("train", "Evaluation")],
)
def test_splits_are_found_in_every_usual_spelling(tmp_path: Path, train: str, test: str) -> None:
    write(tmp_path, train, count=2)
    write(tmp_path, test, count=1)
    splits = opened(tmp_path)
    assert (splits.classes, *sizes(splits)) == (("a", "b"), 4, 2)


def test_imagenet_finds_its_validation_part_and_no_test_part(tmp_path: Path) -> None:
    write(tmp_path, "Train", "validation", count=1)
    write(tmp_path, "test", count=3)
    assert sizes(opened(tmp_path, "imagenet")) == (2, 2)


def test_test_comes_before_val_and_what_is_not_used_is_said(tmp_path: Path) -> None:
    write(tmp_path, "train", "test", "docs")
    write(tmp_path, "val", count=1)
    splits = opened(tmp_path)
    assert sizes(splits) == (4, 4)
    assert list(splits.notes) == [
        f"{tmp_path}: folders passed over: 'docs', 'val'".replace(", 'val'", ""),
        f"{tmp_path}/val: not used, because test/ is there",
    ]


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["test", "val"], "no folder 'train' there (found 'test', 'val'): images lie in train/CLASS/"),
        (["Test"], "no folder 'train' there (found 'Test')"),
        (["train", "Train"], "'Train', 'train' are names of one split"),
        (["train", "val", "validation"], "'val', 'validation' are names of one split"),
        (["images/train", "images/val"], "'images' holds 'train', 'val': set data.root=ROOT/images"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "but 'cat' holds 'test', 'train'"),
        (["seg_train", "seg_test"], "no folder 'train' there (found 'seg_test', 'seg_train')"),
        (["train2017", "val2017"], "no folder 'train' there"),
        (["training_set", "test_set"], "no folder 'train' there"),
        (["train_images"], "no folder 'train' there"),
        (["train/train", "train/val"], "ROOT/train: holds 'train', 'val' instead of class folders"),
    ],
)
def test_split_folders_are_never_taken_for_classes(tmp_path: Path, folders: list[str], words: str) -> None:
    write(tmp_path, *folders)
    assert words in refused(tmp_path)


@pytest.mark.parametrize("names", [["train station", "test tube"], ["trainer", "tester"], ["cat", "valve"]])
def test_classes_that_begin_as_splits_are_classes(tmp_path: Path, names: list[str]) -> None:
    write_folder(tmp_path, ".", dict.fromkeys(names, 1), size=SMALL)
    assert opened(tmp_path).classes == tuple(sorted(names))
    write_folder(tmp_path / "deep", "train", {"valid": 1, "invalid": 1}, size=SMALL)
    assert opened(tmp_path / "deep").classes == ("invalid", "valid")


def test_one_place_knows_the_spellings() -> None:
    assert [split_of_folder(name) for name in ("Train", "dev", "EVAL", "trainset")] == ["train", "val", "eval", None]
    names = ("Train-0.parquet", "validation.parquet", "testset.parquet", "trainer.parquet", "my-train.parquet")
    assert [split_of_file(name) for name in names] == ["train", "val", "test", None, None]
    assert disguised(["x-train", "x-dev", "other"])
    assert not disguised(["x-train", "y-dev", "other"])


# --------------------------------------------------------------------------------------------------------- flat


@pytest.mark.parametrize("source", ["imagefolder", "imagenet"])
def test_a_flat_evaluation_folder_is_said_to_be_flat(tmp_path: Path, source: str) -> None:
    write(tmp_path, "train")
    put(tmp_path / "val" / "val_00000001.jpg")
    assert refused(tmp_path, source) == (
        "ROOT/val: its images lie in no class folders, so they have no labels: move each into val/CLASS/, or set "
        "data.held_out, such as 0.1, to evaluate on training images"
    )
    splits = opened(tmp_path, source, held_out=0.5)
    assert splits.test is None
    assert splits.notes == (f"{tmp_path}/val: passed over, because its images lie in no class folders",)


def test_a_flat_test_folder_is_passed_over_where_val_has_classes(tmp_path: Path) -> None:
    write(tmp_path, "train", "val")
    put(tmp_path / "test" / "1.jpg")
    splits = opened(tmp_path)
    assert sizes(splits) == (4, 4)
    assert splits.notes == (f"{tmp_path}/test: passed over, because its images lie in no class folders",)


def test_a_flat_training_folder_is_said_to_be_flat(tmp_path: Path) -> None:
    put(tmp_path / "train" / "1.jpg")
    assert "no class folders in ROOT/train, but images: each belongs into a folder of its class" in refused(tmp_path)
    put(tmp_path / "car" / "1.jpg")
    assert "if ROOT/train is itself a class" in refused(tmp_path)


# --------------------------------------------------------------------------------------------------- droppings


def test_droppings_are_passed_over_at_every_depth_and_counted(tmp_path: Path) -> None:
    write(tmp_path, "train", "test")
    before = opened(tmp_path)
    droppings = [
        *("train/a/.ipynb_checkpoints/0.jpg", "train/a/._img_0000.jpg", "train/a/@eaDir/img_0000.jpg/THUMB.jpg"),
        *("train/__MACOSX/a/0.jpg", "train/lost+found/0.jpg", "train/b/deep/.hidden/0.jpg", "train/.hidden/0.jpg"),
        *("test/a/.ipynb_checkpoints/0.jpg", "__MACOSX/train/a/0.jpg", ".git/0.jpg"),
    ]
    for name in droppings:
        put(tmp_path / name)
    after = opened(tmp_path)
    assert (after.train.keys, after.classes) == (before.train.keys, before.classes)
    assert after.fingerprint == before.fingerprint
    assert after.notes == (
        f"{tmp_path}/train: passed over: hidden files, and what systems leave behind (7, such as .hidden)",
        f"{tmp_path}/test: passed over: hidden files, and what systems leave behind (1, such as a/.ipynb_checkpoints)",
    )


def test_other_files_and_loose_images_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "train", "test")
    put(tmp_path / "train" / "loose.jpg")
    put(tmp_path / "train" / "a" / "1.heic")
    assert sizes(splits := opened(tmp_path)) == (4, 4)
    assert splits.notes == (
        f"{tmp_path}/train: passed over: images outside of class folders (1, such as loose.jpg)",
        f"{tmp_path}/train: passed over: files that are no images by their endings (1, such as a/1.heic)",
    )


# -------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("a/again", "."),
        ("a/up", ".."),
        ("a/root", "../.."),
        ("itself", "."),
        ("a/deep/back", "../.."),
        ("a/deep/twin", "."),
        ("a/copy", "deep"),
    ],
)
def test_a_link_lists_no_image_twice_and_no_other_classes(tmp_path: Path, link: str, target: str) -> None:
    write(tmp_path, "train", "test")
    put(tmp_path / "train" / "a" / "deep" / "x.jpg")
    before = opened(tmp_path)
    (tmp_path / "train" / link).symlink_to(target)
    after = opened(tmp_path)
    assert (after.classes, after.train.keys) == (before.classes, before.train.keys)
    assert any(link in note and "links to" in note for note in after.notes)


def test_links_to_each_other_end(tmp_path: Path) -> None:
    write(tmp_path, "train", "test", count=1)
    (tmp_path / "train/a/x").symlink_to("../b")
    (tmp_path / "train/b/y").symlink_to("../a")
    (tmp_path / "train/a/p").symlink_to("q")
    (tmp_path / "train/a/q").symlink_to("p")
    keys = sorted(opened(tmp_path).train.keys)
    assert keys == ["a/img_0000.jpg", "a/x/img_0000.jpg", "b/img_0000.jpg", "b/y/img_0000.jpg"]


def test_links_out_of_the_data_set_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "store", "all", "more", classes="abc")
    (tmp_path / "store/more/c/up").symlink_to("..")  # to a folder above its own: other classes
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for name in "ab":
            (tmp_path / "set" / split / name).symlink_to(tmp_path / "store/all" / name)
    (tmp_path / "set/train/a/more").symlink_to(tmp_path / "store/more/c")
    counts = Counter(opened(tmp_path / "set").train.labels.tolist())
    assert counts == {0: 4, 1: 2}


def test_a_class_whose_link_leads_nowhere_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train", "test")
    (tmp_path / "train" / "c").symlink_to("/nowhere/c")
    assert refused(tmp_path) == "ROOT/train/c: this link leads nowhere: mend or remove it"


def test_an_image_behind_a_dead_link_is_listed_and_broken_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, "train", "test")
    (tmp_path / "train" / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "train" / "a" / "round.jpg").symlink_to("round.jpg")
    table = opened(tmp_path).train.table
    rows = np.array(
        [table.rows["key"].to_pylist().index("a/gone.jpg"), table.rows["key"].to_pylist().index("a/img_0000.jpg")]
    )
    assert [len(data) > 0 for _, data in table.images.scan(rows)] == [False, True]
    assert len(table) == 6
    before = table.images.stamp(rows)
    put(tmp_path / "train" / "a" / "nowhere.jpg")
    assert table.images.stamp(rows) != before


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    write(tmp_path, "train", "test")
    os.mkfifo(tmp_path / "train" / "a" / "pipe.jpg")
    assert sizes(opened(tmp_path)) == (4, 4)


# -------------------------------------------------------------------------------------------------------- names


def test_names_that_are_not_utf8_are_used_and_printable(tmp_path: Path) -> None:
    write(tmp_path, "train", "test")
    folder = os.fsencode(tmp_path / "train") + b"/caf\xe9"
    os.mkdir(folder)
    put(Path(os.fsdecode(folder + b"/\xff1.jpg")))
    put(tmp_path / "train" / "a" / "two\nlines.jpg")
    splits = opened(tmp_path)
    table = splits.train.table
    assert splits.classes == ("a", "b", "caf\\xe9")
    assert {"caf\\xe9/\\xff1.jpg", "a/two\\x0alines.jpg"} <= set(table.rows["key"].to_pylist())
    json.dumps([splits.train.keys, splits.notes], ensure_ascii=False).encode()
    row = table.rows["key"].to_pylist().index("caf\\xe9/\\xff1.jpg")
    assert table.images.open(row).size == SMALL  # type: ignore[union-attr]
    assert table.where(row) == f"{tmp_path}/train/caf\\xe9/\\xff1.jpg"
    assert b"(" in table.images.stamp(np.array([row]))


def test_two_names_that_read_alike_are_named(tmp_path: Path) -> None:
    write(tmp_path, "train", "test")
    put(Path(os.fsdecode(os.fsencode(tmp_path / "train/a") + b"/\xe9.jpg")))
    put(tmp_path / "train/a/\\xe9.jpg")
    assert refused(tmp_path) == ("ROOT/train: two images read 'a/\\\\xe9.jpg': rename the one whose name is not UTF-8")


def test_a_test_class_that_training_lacks_counts_only_with_images(tmp_path: Path) -> None:
    write(tmp_path, "train", "test")
    (tmp_path / "test" / "c" / "deep").mkdir(parents=True)
    assert sizes(opened(tmp_path)) == (4, 4)
    put(tmp_path / "test" / "c" / "deep" / "1.jpg")
    assert "ROOT/test/c: there is no class 'c' among the training classes" in refused(tmp_path)


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A data set whose folder train/a/deep this process may not list."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write(root, "train", "test")
        (root / "train/a/deep").mkdir(mode=0o000)
        root.chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield root
        finally:
            os.seteuid(user)


def test_a_folder_that_may_not_be_listed_is_named(locked_folder: Path) -> None:
    assert refused(locked_folder) == "ROOT/train/a/deep: this folder cannot be listed: Permission denied"


# -------------------------------------------------------------------------------------------------------- notes


def test_what_is_assumed_is_said(tmp_path: Path) -> None:
    write(tmp_path, "train", "test")
    (tmp_path / "test/b/img_0000.jpg").unlink()
    (tmp_path / "test/b/img_0001.jpg").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", SMALL).save(out, "JPEG", exif=exif)
    (tmp_path / "train/a/turned.jpg").write_bytes(out.getvalue())
    assert opened(tmp_path).notes == (
        f"{tmp_path}/train: 1 of the first 5 images have an EXIF orientation, which is left alone",
        f"{tmp_path}/test: classes without a test image: 'b'",
    )
    write_folder(tmp_path / "one", "train", {"a": 2}, size=SMALL)
    assert opened(tmp_path / "one").notes == (f"{tmp_path}/one/train: all images are of one class, 'a'",)


def test_sound_data_need_no_notes(tmp_path: Path) -> None:
    write(tmp_path, "train", "test")
    assert opened(tmp_path).notes == ()
    assert open_splits(data_config(source="digits", num_classes=12)).notes == ()


# ---------------------------------------------------------------------------------------------- a run's classes


def test_labels_count_in_the_classes_of_a_run(tmp_path: Path) -> None:
    write(tmp_path, "train", "test", classes="abc")
    splits = open_splits(data_config(source="imagefolder", root=tmp_path), classes=("c", "x", "b", "a"))
    assert splits.classes == ("c", "x", "b", "a")
    assert splits.test is not None
    for part in (splits.train, splits.test):
        assert {(key[0], splits.classes[label]) for key, label in zip(part.keys, part.labels, strict=True)} == {
            ("a", "a"),
            ("b", "b"),
            ("c", "c"),
        }
    assert splits.fingerprint == opened(tmp_path).fingerprint
    with pytest.raises(UserError, match=r"there is no class 'c' \(2 images\) among 'a', 'b'"):
        open_splits(data_config(source="imagefolder", root=tmp_path), classes=("a", "b"))
