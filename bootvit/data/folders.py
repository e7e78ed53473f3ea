"""Image folders: root/train/CLASS/... and root/test or root/val, or class folders directly in the root."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from bootvit.data.cache import Stamp, indexed, stamp_of
from bootvit.data.found import Found, listed
from bootvit.data.keys import by_hash, fingerprint_of, repeated, sampled_rows
from bootvit.data.listing import ENDINGS, Passed, entries, folders_in, images_below, is_flat, is_folder
from bootvit.data.splits import EVALUATION, Kind, disguised, split_of_folder
from bootvit.data.table import FileImages, printable
from bootvit.errors import RunFailed, UserError

FACTS = b"bootvit"  # key in the metadata of an index


class Layout(NamedTuple):
    """The folders of the splits."""

    train: Path
    tests: list[Path]  # the first one with class folders is the test split
    others: list[str]  # names of further folders beside them


def read(
    root: Path, split: Literal["train", "test"], *, splits_only: bool, held_out: bool, notes: list[str]
) -> Found | None:
    """One split: classes are the training folders in sorted order, keys the paths below the split, with slashes.

    Class folders directly in the root are a training split alone, unless `splits_only` asks for train/ and val/.
    A test folder without class folders is an error unless another one has them, or images are held out.
    """
    layout = _layout(root, splits_only)
    passed = Passed()
    classes = folders_in(layout.train, passed)
    if not classes:
        raise UserError(_no_classes(root, layout))
    if split == "train":
        if layout.others:
            notes.append(f"{printable(root)}: folders passed over: {listed(map(printable, layout.others))}")
        return _list(layout.train, classes, passed, notes, every_class=True)
    test = _test_folder(layout.tests, notes, needed=not held_out)
    return _list(test, classes, Passed(), notes, every_class=False) if test else None


def _layout(root: Path, splits_only: bool) -> Layout:
    names = folders_in(root)
    kinds: defaultdict[Kind, list[str]] = defaultdict(list)
    for name in names:
        if kind := split_of_folder(name):
            kinds[kind].append(name)
    for several in kinds.values():
        if len(several) > 1:
            raise UserError(f"data.root={root}: {listed(several)} are names of one split: keep one of them")
    if "train" not in kinds:
        _check_classes_in_root(root, names, bool(kinds), splits_only)
        return Layout(root, [], [])
    train = kinds["train"][0]
    wanted: tuple[Kind, ...] = ("val",) if splits_only else EVALUATION
    tests = [kinds[kind][0] for kind in wanted if kind in kinds]
    _check_nested(root / train)
    return Layout(root / train, [root / name for name in tests], [n for n in names if n not in (train, *tests)])


def _check_classes_in_root(root: Path, names: list[str], any_split: bool, splits_only: bool) -> None:
    """Without a folder `train` the root's folders are classes; raises if they are anything else."""
    found = f"data.root={root}: no folder 'train' there (found {listed(map(printable, names)) if names else 'none'})"
    for name in names:
        inside = [e.name for e in entries(root / name) if split_of_folder(e.name) and is_folder(e)]
        if "train" in map(split_of_folder, inside) or len(inside) > 1:
            raise UserError(
                f"{found}, but {printable(name)!r} holds {listed(inside)}: set data.root={printable(root / name)} "
                "if that is the data set; images lie in train/CLASS/"
            )
    if splits_only:
        raise UserError(f"{found}; imagenet needs train/ and val/")
    if any_split or disguised(names):
        raise UserError(f"{found}: images lie in train/CLASS/ and test/CLASS/ or val/CLASS/, so rename or move them")


def _check_nested(train: Path) -> None:
    """`train/train/CLASS/`, as archives unpacked in a folder of their name leave it."""
    names = folders_in(train)
    kinds = [split_of_folder(name) for name in names]
    if names and all(kinds) and "train" in kinds and not any(is_flat(train / name) for name in names):
        raise UserError(
            f"{printable(train)}: holds {listed(names)} instead of class folders: set data.root={printable(train)} "
            "if that is the data set"
        )


def _no_classes(root: Path, layout: Layout) -> str:
    train = printable(layout.train)
    where = f"data.root={root}: no class folders in {train}"
    if not is_flat(layout.train):
        return where
    hint = f" (if {train} is itself a class, move all class folders into a folder train/)" if layout.others else ""
    return f"{where}, but images: each belongs into a folder of its class, {train}/CLASS/{hint}"


def _test_folder(folders: list[Path], notes: list[str], *, needed: bool) -> Path | None:
    """The folder of the test split: one without class folders has no labels and does not count."""
    chosen, flat = None, []
    for folder in folders:
        if chosen is not None:
            notes.append(f"{printable(folder)}: not used, because {printable(chosen.name)}/ is there")
        elif folders_in(folder):
            chosen = folder
        elif is_flat(folder):
            flat.append(folder)
            notes.append(f"{printable(folder)}: passed over, because its images lie in no class folders")
        else:
            notes.append(f"{printable(folder)}: passed over, because it is empty")
    if chosen is None and flat and needed:
        raise UserError(
            f"{printable(flat[0])}: its images lie in no class folders, so they have no labels: move each into "
            f"{printable(flat[0].name)}/CLASS/, or set data.held_out, such as 0.1, to evaluate on training images"
        )
    return chosen


def _list(folder: Path, classes: list[str], passed: Passed, notes: list[str], *, every_class: bool) -> Found:
    """One split, of which the cache has an index; without a cache each process lists the folders itself."""
    names = tuple(printable(name) for name in classes)

    def make(stamps: dict[str, Stamp]) -> pa.Table:
        return _index(folder, classes, stamps, every_class=every_class)

    try:
        index = indexed(json.dumps([str(folder.resolve()), classes, every_class]), make)
    except (RunFailed, UserError) as err:
        index = make({})  # where it is a folder's own error, the same again
        notes.append(str(err))
    facts = json.loads(index.schema.metadata[FACTS])
    passed.add_all(Passed(Counter(facts["count"]), facts["example"]))
    if not every_class:
        _check_unknown(folder, sorted(set(folders_in(folder, passed)) - set(classes)))
    notes += passed.notes(folder)
    paths = index["path"]
    return Found(
        FileImages(folder, paths),
        index["label"].to_numpy(),
        index["key"] if "key" in index.column_names else paths.cast(pa.string()),
        names,
        place=printable(folder),
        fingerprint=facts["fingerprint"],
        order=index["order"].to_numpy(),
    )


def _index(folder: Path, classes: list[str], stamps: dict[str, Stamp], *, every_class: bool) -> pa.Table:
    """Columns `path`, `label`, `order`, and `key` where it is not the path; what else is known in the metadata."""
    passed = Passed()
    stamps[str(folder)] = stamp_of(folder)
    paths, sizes = [], []
    for name in classes:
        files = []
        if every_class or (folder / name).is_dir():
            files = images_below(folder, name, passed, lambda path: stamps.update({path: stamp_of(path)}))
        if not files and every_class:
            raise UserError(f"{printable(folder / name)}: the class folder holds no images ({', '.join(ENDINGS)})")
        paths.append(_encoded(files))
        sizes.append(len(files))
    labels = np.repeat(np.arange(len(classes)), sizes)
    path = pa.concat_arrays(paths)
    key = _printable(path)
    columns = {"path": path, "label": labels}
    if not key.cast(pa.binary()).equals(path):
        _check_unique(folder, key)
        columns["key"] = key
    columns["order"] = order = by_hash(key)
    images = FileImages(folder, path)
    if len(labels):
        stamps.update({str(images.path(row)): stamp_of(images.path(row)) for row in sampled_rows(order)})
    fingerprint = fingerprint_of(images, labels, key, order) if len(labels) else ""
    facts = {"count": passed.count, "example": passed.example, "fingerprint": fingerprint}
    return pa.table(columns).replace_schema_metadata({FACTS: json.dumps(facts).encode()})


def _check_unknown(folder: Path, names: list[str]) -> None:
    """Test images of a class that training lacks are a mistake; an empty folder is none."""
    for name in names:
        if images_below(folder, name, Passed()):
            raise UserError(
                f"{printable(folder / name)}: there is no class {printable(name)!r} among the training classes"
            )


def _encoded(paths: list[str]) -> pa.BinaryArray:
    """Paths as the bytes that the file system knows; none of them has a NUL in it."""
    data = np.frombuffer(os.fsencode("\0".join(paths)), np.uint8)
    ends = np.flatnonzero(data == 0) - np.arange(max(len(paths) - 1, 0))
    text = data[data != 0]
    offsets = np.concatenate([[0], ends, [len(text)] if paths else []]).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), len(paths), [None, pa.py_buffer(offsets), pa.py_buffer(text)])


def _printable(paths: pa.BinaryArray) -> pa.StringArray:
    """Paths as text, each as `printable` has it."""
    _, _, data = paths.buffers()
    text = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
    if not ((text < 0x20) | (text == 0x7F)).any():
        with suppress(pa.ArrowInvalid):  # not UTF-8
            return paths.cast(pa.string())
    return pa.array([printable(os.fsdecode(path)) for path in paths.to_pylist()], pa.string())


def _check_unique(folder: Path, keys: pa.Array) -> None:
    """A name that is not UTF-8 may read like another one."""
    if (same := repeated(keys)) is not None:
        raise UserError(f"{printable(folder)}: two images read {same!r}: rename the one whose name is not UTF-8")
