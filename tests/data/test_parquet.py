"""Parquet files as people have them: names of files, labels of every type, names in other orders, damage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_making import data_config, picture, write_small_parquet

from bootvit.data import DataSplits, open_splits
from bootvit.data.table import ParquetImages
from bootvit.errors import UserError

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LABELS = [0, 1, 0, 1]


def images(count: int, first: int = 0) -> list[bytes]:
    return [picture(first + number, 8, 8) for number in range(count)]


def cells(count: int, first: int = 0) -> pa.Array:
    return pa.array([{"bytes": data, "path": f"{first + i}.jpg"} for i, data in enumerate(images(count, first))], CELL)


def table(labels: object, *, first: int = 0, names: list[str] | None = None, label: str = "label", **more: object):
    """Hugging Face's layout, with further columns; a column `image` takes the place of the usual one."""
    column = labels if isinstance(labels, pa.Array) else pa.array(labels)
    out = pa.table({"image": cells(len(column), first), label: column} | more)
    if names is None:
        return out
    info = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
    return out.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})


TEST = table([0, 1], first=50)


def write(root: Path, **files: pa.Table | bytes) -> Path:
    """`a__b=...` is written to a/b.parquet."""
    for name, content in files.items():
        path = root / f"{name.replace('__', '/')}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            pq.write_table(content, path)
    return root


def opened(root: Path, **values: object) -> DataSplits:
    return open_splits(data_config(source="parquet", root=root, **values))


def named(splits: DataSplits, part: str = "train") -> dict[str, str]:
    """The class name of each key."""
    subset = splits.train if part == "train" else splits.test
    assert subset is not None
    return {key: splits.classes[label] for key, label in zip(subset.keys, subset.labels, strict=True)}


def refused(root: Path, **values: object) -> str:
    """The one line without the root."""
    with pytest.raises(UserError) as caught:
        opened(root, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


# -------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train-0", "Test-0"),
        ("training", "valid"),
        ("train", "dev-0"),
        ("train__0000", "test__0000"),
        ("data__train-00000-of-00001", "data__validation-00000-of-00001"),
        ("default__train__0000", "default__test__0000"),
        ("train.parquet__part-0", "test.parquet__part-0"),
    ],
)
def test_splits_are_found_by_file_or_folder(tmp_path: Path, train: str, test: str) -> None:
    splits = opened(write(tmp_path, **{train: table(LABELS), test: TEST, "._train": b"junk"}))
    assert len(splits.train) == 4
    assert set(named(splits, "test")) == {"50.jpg", "51.jpg"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["part", "other"], "no train*.parquet there (Parquet files found: 'other.parquet', 'part.parquet')"),
        (["cifar-train", "cifar-test"], "no train*.parquet there (Parquet files found: 'cifar-test.parquet'"),
        (["test", "val"], "no train*.parquet there (Parquet files found: 'test.parquet', 'val.parquet')"),
        (["train", "train__0"], "both 'train.parquet' and 'train/' hold one split"),
        (["one__train", "two__train"], "but in 'one', 'two': set data.root to one of these folders"),
    ],
)
def test_files_that_name_no_split_are_named(tmp_path: Path, files: list[str], words: str) -> None:
    assert words in refused(write(tmp_path, **dict.fromkeys(files, table(LABELS))))


def test_files_passed_over_are_said(tmp_path: Path) -> None:
    splits = opened(write(tmp_path, train=table(LABELS), test=TEST, val=TEST, unsupervised=TEST))
    assert splits.notes == (
        f"{tmp_path}: files passed over, because they name no split: 'unsupervised.parquet'",
        f"{tmp_path}/val.parquet: not used, because {tmp_path}/test.parquet is there",
    )


def test_unlabelled_test_files_are_passed_over(tmp_path: Path) -> None:
    for name, labels in (("negative", [-1, -1]), ("null", pa.nulls(2, pa.int64()))):
        root = write(tmp_path / name, train=table(LABELS), test=table(labels, first=9))
        assert "ROOT/test.parquet: passed over, because its images have no labels: set data.held_out" in refused(root)
        splits = opened(root, held_out=0.5)
        assert splits.notes == (f"{root}/test.parquet: passed over, because its images have no labels",)
    root = write(tmp_path / "none", train=table(LABELS), test=TEST.drop_columns(["label"]), val=TEST)
    splits = opened(root)
    assert set(named(splits, "test")) == {"50.jpg", "51.jpg"}
    assert splits.notes == (f"{root}/test.parquet: passed over, because it has no label column",)


# ------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_labels_are_classes_sorted_by_name(tmp_path: Path, kind: pa.DataType) -> None:
    train = pa.array(["dog", "cat", "emu", "cat"]).cast(kind) if pa.types.is_dictionary(kind) else None
    train = pa.array(["dog", "cat", "emu", "cat"], kind) if train is None else train
    root = write(tmp_path, train=table(train, image_id=pa.array([3, 1, 1, 7])), test=table(["emu", "cat"], first=50))
    splits = opened(root)
    assert splits.classes == ("cat", "dog", "emu")
    assert named(splits) == {"0.jpg": "dog", "1.jpg": "cat", "2.jpg": "emu", "3.jpg": "cat"}
    assert named(splits, "test") == {"50.jpg": "emu", "51.jpg": "cat"}  # its own sorted names are others


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array([2, 0, 1], pa.uint64()), ("0", "1", "2")),
        (pa.array([1.0, 0.0, 1.0]), ("0", "1")),
        (pa.array([True, False, True]), ("false", "true")),
        (pa.array([1, 0, 1]).dictionary_encode(), ("0", "1")),
    ],
)
def test_labels_of_other_types(tmp_path: Path, labels: pa.Array, classes: tuple[str, ...]) -> None:
    splits = opened(write(tmp_path, train=table(labels)))
    wanted = [str(value).lower().removesuffix(".0") for value in labels.to_pylist()]
    assert (splits.classes, named(splits)) == (classes, {f"{i}.jpg": name for i, name in enumerate(wanted)})


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (pa.array([0, 2**63 + 5], pa.uint64()), "column 'label' has 9223372036854775813 in row 1"),
        (pa.array([1.0, 0.5]), "column 'label' has 0.5 in row 1"),
        (pa.array([1.0, float("nan")]), "column 'label' has nan in row 1"),
        (pa.array([1.0, 1e300]), "column 'label' has 1e+300 in row 1"),
        (pa.array([[0], [1]]), "column 'label' is of type list"),
        (pa.array([b"0", b"1"]), "column 'label' is of type binary"),
        (pa.array([0, -5]), "image '1.jpg' has label -5"),
        (pa.array([0, None]), "column 'label' has 1 rows without a label"),
        (pa.nulls(2), "column 'label' has 2 rows without a label"),
        (pa.array(["a", None]), "column 'label' has 1 rows without a label"),
        (
            pa.array([20240101001, 0]),
            "column 'label' has 20240101001, which would make 20240101002 classes for 2 images",
        ),
        (pa.array([0, 5000]), "5001 classes for 2 images: number the classes from 0, or set data.num_classes"),
        (pa.array([2**63 - 1, 0]), "which would make 9223372036854775808 classes"),
    ],
)
def test_labels_that_mean_no_class_are_one_line(tmp_path: Path, labels: pa.Array, words: str) -> None:
    line = refused(write(tmp_path, train=table(labels)))
    assert "ROOT/train.parquet" in line
    assert words in line


def test_an_absurd_number_of_classes_is_one_line(tmp_path: Path) -> None:
    root = write(tmp_path, train=table([0, 5000]))
    assert len(opened(root, num_classes=6000).classes) == 6000
    assert "data.num_classes=20000000000: the source has 5001 classes; at most 100000" in (
        refused(write(tmp_path / "x", train=table([0, 5000] * 300)), num_classes=20_000_000_000)
    )


def test_a_label_column_is_guessed_only_where_it_can_be_one_and_that_is_said(tmp_path: Path) -> None:
    splits = opened(write(tmp_path / "a", train=table(LABELS, label="species", width=pa.array([8] * 4))))
    note = "column 'species' is taken for the label, as the only one of integers"
    assert splits.notes == (f"{tmp_path}/a/train.parquet: {note}",)
    unique = write(tmp_path / "b", train=table([5, 6, 7, 8], label="number"))
    assert "no label column: the only column of integers, 'number', has another value in each row" in refused(unique)
    assert "no label column: expected one of label" in refused(
        write(tmp_path / "c", train=table(LABELS, label="image_id"))
    )
    both = write(tmp_path / "d", train=table(LABELS, label="a", b=pa.array(LABELS)))
    assert "no label column: expected one of label" in refused(both)
    told = write(tmp_path / "e", train=table(LABELS, label="animal", names=["x", "y"], n=pa.array(LABELS)))
    assert (opened(told).classes, opened(told).notes) == (("x", "y"), ())
    text = write(tmp_path / "f", train=table(["u", "v", "u", "v"], label="Class", n=pa.array(LABELS)))
    assert opened(text).classes == ("u", "v")


def test_ghost_classes_are_said(tmp_path: Path) -> None:
    one = opened(write(tmp_path / "a", train=table([1, 2, 1])))
    assert one.notes == (f"{tmp_path}/a/train.parquet: labels begin at 1, so class '0' has no image",)
    gap = opened(write(tmp_path / "b", train=table([0, 3, 0])))
    assert gap.notes == (f"{tmp_path}/b/train.parquet: classes without a training image: '1', '2'",)


# -------------------------------------------------------------------------------------------------- class names


def test_class_names_decide_and_not_their_order(tmp_path: Path) -> None:
    train = table([0, 1, 2], names=["cat", "dog", "emu"])
    test = table([0, 1, 2], first=50, names=["emu", "dog", "cat"])
    splits = opened(write(tmp_path, train=train, test=test))
    assert named(splits, "test") == {"50.jpg": "emu", "51.jpg": "dog", "52.jpg": "cat"}
    assert splits.classes == ("cat", "dog", "emu")


def test_each_file_counts_in_its_own_names(tmp_path: Path) -> None:
    parts = {
        "train-0": table([0, 1], names=["cat", "dog"]),
        "train-1": table([0, 0], first=10, names=["dog", "cat"]),
        "train-2": table([0, 1], first=20),
    }
    assert named(opened(write(tmp_path, **parts))) == {
        **{"0.jpg": "cat", "1.jpg": "dog", "10.jpg": "dog", "11.jpg": "dog", "20.jpg": "cat", "21.jpg": "dog"}
    }


def test_names_that_training_lacks_count_only_with_images(tmp_path: Path) -> None:
    train = table([0, 1], names=["cat", "dog"])
    more = ["cat", "ape", "dog"]
    splits = opened(write(tmp_path / "a", train=train, test=table([0, 2], first=50, names=more)))
    assert named(splits, "test") == {"50.jpg": "cat", "51.jpg": "dog"}
    line = refused(write(tmp_path / "b", train=train, test=table([0, 1], first=50, names=more)))
    assert "ROOT/test.parquet: there is no class 'ape' (1 images) among 'cat', 'dog'" in line


def test_numbers_without_names_are_those_of_training(tmp_path: Path) -> None:
    splits = opened(write(tmp_path / "a", train=table([0, 1], names=["cat", "dog"]), test=TEST))
    assert named(splits, "test") == {"50.jpg": "cat", "51.jpg": "dog"}
    splits = opened(write(tmp_path / "b", train=table([0, 1]), test=table([0, 1], first=50, names=["x", "y"])))
    assert named(splits, "test") == {"50.jpg": "0", "51.jpg": "1"}
    root = write(tmp_path / "c", train=table(["cat", "dog"]), test=TEST)
    assert "ROOT/test.parquet: column 'label' holds numbers, but that of the training files holds text" in refused(root)
    root = write(tmp_path / "d", **{"train-0": table(["cat", "dog"]), "train-1": table([0, 1], first=9)})
    assert "ROOT/train-1.parquet: column 'label' holds numbers, but text in train-0.parquet" in refused(root)


def test_labels_count_in_the_classes_of_a_run(tmp_path: Path) -> None:
    train = table([0, 1, 2], names=["cat", "dog", "emu"])
    root = write(tmp_path, train=train, test=table([0, 1], first=50, names=["emu", "cat"]), unnamed__train=train)
    data = data_config(source="parquet", root=root)
    splits = open_splits(data, classes=("emu", "ape", "cat", "dog"))
    assert splits.classes == ("emu", "ape", "cat", "dog")
    assert named(splits) == {"0.jpg": "cat", "1.jpg": "dog", "2.jpg": "emu"}
    assert named(splits, "test") == {"50.jpg": "emu", "51.jpg": "cat"}
    with pytest.raises(UserError, match=r"there is no class 'emu' \(1 images\) among 'cat', 'dog', 'ape'"):
        open_splits(data, classes=("cat", "dog", "ape"))
    unnamed = data_config(source="parquet", root=write(tmp_path / "n", train=table([0, 1]), test=TEST))
    with pytest.raises(UserError, match=r"there is no class '0', '1' \(2 images\) among 'cat', 'dog'"):
        open_splits(unnamed, classes=("cat", "dog"))
    assert open_splits(unnamed, classes=("1", "0")).train.labels.tolist() == [
        int(key == "0.jpg") for key in open_splits(unnamed).train.keys
    ]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({b"huggingface": b"{not json"}, "its metadata 'huggingface' are damaged"),
        ({b"bootvit": b'{"classes": ["a", "b"]}'}, "its metadata 'bootvit' are not those of `bootvit data pack`"),
        ({b"bootvit": b'{"classes": ["a", "a"]}'}, "its metadata name a class twice: 'a', 'a'"),
    ],
)
def test_damaged_metadata_are_one_line(tmp_path: Path, metadata: dict[bytes, bytes], words: str) -> None:
    root = write(tmp_path, train=table(LABELS).replace_schema_metadata(metadata))
    assert f"ROOT/train.parquet: {words}" in refused(root)


# ------------------------------------------------------------------------------------------------- keys, columns


def test_integer_keys_are_text(tmp_path: Path) -> None:
    splits = opened(write(tmp_path, train=table(LABELS, key=pa.array([7, 10, 9, 8]))))
    assert named(splits) == {"7": "0", "10": "1", "9": "0", "8": "1"}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (table(LABELS, first=9), "no column 'key', which train-0.parquet has"),
        (table(LABELS, first=9, key=pa.array(list("wxya"))), "the column 'key' must be there in every row and unique"),
        (table(LABELS, first=9, key=pa.array(["w", None, "y", "z"])), "the column 'key' must be there in every row"),
        (table(LABELS, first=9, key=pa.array([0.1, 0.2, 0.3, 0.4])), "column 'key' is of type double"),
    ],
)
def test_keys_that_are_none_name_their_file(tmp_path: Path, second: pa.Table, words: str) -> None:
    first = table(LABELS, key=pa.array(list("abcd")))
    line = refused(write(tmp_path, **{"train-0": first, "train-1": second}))
    assert f"ROOT/train-1.parquet: {words}" in line


def test_paths_that_are_not_unique_give_way_to_hashes_and_that_is_said(tmp_path: Path) -> None:
    splits = opened(write(tmp_path, **{"train-0": table([0, 1]), "train-1": table([0, 1])}))
    assert (
        splits.notes[0]
        == f"{tmp_path}/train-0.parquet: image.path is not unique ('0.jpg'): keys are hashes of the images"
    )
    assert sorted(named(splits))[0].removesuffix("-2") in {hashlib.sha256(data).hexdigest() for data in images(2)}


def test_paths_that_are_not_utf8_are_used(tmp_path: Path) -> None:
    paths = pa.array([b"caf\xe9", b"x"]).view(pa.string())
    cell = pa.StructArray.from_arrays([pa.array(images(2)), paths], ["bytes", "path"])
    assert named(opened(write(tmp_path, train=pa.table({"image": cell, "label": [0, 1]})))) == {
        "caf\\xe9": "0",
        "x": "1",
    }


@pytest.mark.parametrize(
    "column",
    [
        pa.array(images(4), pa.large_binary()),
        pa.array(images(4), pa.binary_view()),
        pa.array([{"path": str(i), "bytes": data} for i, data in enumerate(images(4))]),
        pa.array(
            [{"bytes": data, "path": str(i)} for i, data in enumerate(images(4))],
            pa.struct([("bytes", pa.large_binary()), ("path", pa.string_view())]),
        ),
    ],
)
def test_images_in_other_types_of_columns(tmp_path: Path, column: pa.Array) -> None:
    root = write(
        tmp_path,
        a__train=pa.table({"image": column, "label": LABELS}),
        b__train=pa.table({"jpg": images(4), "cls": LABELS}),
    )
    for name in "ab":
        found = opened(root / name).train.table
        assert [data for _, data in sorted(found.images.scan(np.arange(4)))] == images(4)
        assert found.labels.tolist() == LABELS


def test_shards_may_differ_in_what_is_not_used(tmp_path: Path) -> None:
    strict = table(LABELS, first=30)
    strict = strict.cast(pa.schema([strict.schema.field(0), pa.field("label", pa.int64(), nullable=False)]))
    parts = {
        "train-0": pa.table({"image": pa.nulls(0), "label": pa.nulls(0)}),  # what pandas writes of no rows
        "train-1": table(pa.array(LABELS, pa.int32())),
        "train-2": table(LABELS, first=10, extra=pa.array(list("abcd"))),
        "train-3": table(LABELS, first=20).slice(0, 0),
        "train-4": strict,
    }
    splits = opened(write(tmp_path, **parts))
    assert sorted(named(splits)) == sorted(f"{i + j}.jpg" for i in (0, 10, 30) for j in range(4))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (pa.table({"image": cells(2, 9), "other": [0.5, 1.5]}), "no column 'label', which train-0.parquet has"),
        (pa.table({"label": [0, 1]}), "no image column"),
        (pa.table({"image": images(2), "label": [0, 1]}), "no image column 'image.bytes', which train-0.parquet has"),
        (b"", "not a readable Parquet file: Parquet file size is 0 bytes"),
        (b"PAR1 and no more", "not a readable Parquet file"),
    ],
)
def test_a_shard_that_cannot_be_used_is_named(tmp_path: Path, second: pa.Table | bytes, words: str) -> None:
    root = write(tmp_path, **{"train-0": table(LABELS), "train-1": second})
    assert f"ROOT/train-1.parquet: {words}" in refused(root)


def test_damage_anywhere_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, train=table(LABELS * 20, names=["a", "b"])) / "train.parquet"
    sound = path.read_bytes()
    failed = 0
    for number in range(60):
        generator = np.random.default_rng(number)
        at = int(generator.integers(4, len(sound) - 8))
        damage = generator.integers(0, 256, 40, dtype=np.uint8).tobytes()
        path.write_bytes((sound[:at] + damage + sound[at + 40 :])[: len(sound) if number % 3 else at])
        try:
            splits = opened(tmp_path)
            list(splits.train.table.images.scan(splits.train.indices))
        except UserError as err:
            failed += 1
            assert str(path) in str(err)  # noqa: PT017
            assert "\n" not in str(err)  # noqa: PT017
    assert failed > 20


def test_a_file_that_changes_under_a_run_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, train=table(LABELS)) / "train.parquet"
    found = opened(tmp_path).train.table.images
    assert isinstance(found, ParquetImages)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"train\.parquet: not a readable Parquet file"):
        list(found.scan(np.arange(4)))
    with pytest.raises(UserError, match=r"train\.parquet: not a readable Parquet file"):
        _ = ParquetImages((path,), "image.bytes").groups


def test_what_is_known_of_many_keys_is_worked_out_once_and_again_for_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> tuple[str, list[int]]:
        train = open_splits(data_config(source="parquet", root=tmp_path)).train
        return train.table.fingerprint, train.table.order.tolist()

    write_small_parquet(tmp_path)
    few = opened()
    for module in ("parquet", "sources"):
        monkeypatch.setattr(f"bootvit.data.{module}.LARGE", 3)
    assert opened() == few
    for name in ("parquet.repeated", "sources.by_hash", "sources.fingerprint_of"):
        monkeypatch.setattr(f"bootvit.data.{name}", lambda *_: pytest.fail("worked out again"))
    assert opened() == few
    monkeypatch.undo()
    write_small_parquet(tmp_path, per_class=21)
    for module in ("parquet", "sources"):
        monkeypatch.setattr(f"bootvit.data.{module}.LARGE", 3)
    assert opened() != few


def test_a_key_that_many_rows_share_is_found_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bootvit.data.parquet.LARGE", 3)
    for split in ("train", "test"):
        pq.write_table(table(LABELS, key=["a", "b", "c", "a"]), tmp_path / f"{split}.parquet")
    for _ in range(2):
        with pytest.raises(UserError, match="must be there in every row and unique"):
            open_splits(data_config(source="parquet", root=tmp_path))
