"""Image folders: root/train/CLASS/... and root/test or root/val, or class folders directly in the root."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from bootvit.data.found import Found, listed
from bootvit.data.listing import ENDINGS, Passed, entries, folders_in, images_below, is_flat, is_folder
from bootvit.data.splits import EVALUATION, Kind, disguised, split_of_folder
from bootvit.data.table import FileImages, printable
from bootvit.errors import UserError


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
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = images_below(folder, name, passed) if every_class or (folder / name).is_dir() else []
        if not files and every_class:
            raise UserError(f"{printable(folder / name)}: the class folder holds no images ({', '.join(ENDINGS)})")
        paths += files
        labels += [label] * len(files)
    if not every_class:
        _check_unknown(folder, sorted(set(folders_in(folder, passed)) - set(classes)))
    notes += passed.notes(folder)
    images = FileImages(folder, pa.array([os.fsencode(path) for path in paths], pa.binary()))
    names = tuple(printable(name) for name in classes)
    return Found(images, np.array(labels, np.int64), _keys(folder, paths), names, place=printable(folder))


def _check_unknown(folder: Path, names: list[str]) -> None:
    """Test images of a class that training lacks are a mistake; an empty folder is none."""
    for name in names:
        if images_below(folder, name, Passed()):
            raise UserError(
                f"{printable(folder / name)}: there is no class {printable(name)!r} among the training classes"
            )


def _keys(folder: Path, paths: list[str]) -> list[str]:
    """The paths as text; a name that is not UTF-8 may then read like another one."""
    keys = [printable(path) for path in paths]
    if keys != paths and len(set(keys)) != len(keys):
        same = Counter(keys).most_common(1)[0][0]
        raise UserError(f"{printable(folder)}: two images read {same!r}: rename the one whose name is not UTF-8")
    return keys
