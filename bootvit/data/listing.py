"""What lies in the folders of images: every image once, whatever links and droppings lie between them."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bootvit.data.table import printable
from bootvit.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
USUAL = (".jpg", ".JPEG", ".png", ".jpeg", ".JPG", ".PNG")  # looked for first
DROPPINGS = frozenset(  # of archives, file servers and operating systems; names with a leading dot come to these
    (
        *("__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
        *("__pycache__", "Thumbs.db", "desktop.ini"),
    )
)

Entry = os.DirEntry[str]


@dataclass
class Passed:
    """What was passed over below one folder, by what it is: how many, and an example."""

    count: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, path: str) -> None:
        """One more."""
        self.count[what] += 1
        self.example.setdefault(what, path)

    def add_all(self, other: Passed) -> None:
        """What was passed over elsewhere below it."""
        self.count += other.count
        self.example = other.example | self.example

    def notes(self, folder: Path) -> Iterator[str]:
        """A sentence for each kind."""
        for what, count in self.count.items():
            yield f"{printable(folder)}: passed over: {what} ({count}, such as {printable(self.example[what])})"


HIDDEN, OTHER, LOOSE, LOOP, TWICE, DEAD = (
    "hidden files, and what systems leave behind",
    "files that are no images by their endings",
    "images outside of class folders",
    "links to a folder that they lie in",
    "links to folders that are listed already",
    "links that lead nowhere",
)


def entries(folder: Path | str) -> list[Entry]:
    """What a folder holds, sorted by name."""
    with _listing(folder) as found:
        return sorted(found, key=lambda entry: entry.name)


def split_entries(folder: Path) -> tuple[list[str], list[Entry]]:
    """The names of a folder's plain image files, of which there may be many, and its other entries, sorted by name."""
    with _listing(folder) as listed:
        found = list(listed)
    plain = {e.name for e in found if e.name.endswith(USUAL) and e.is_file(follow_symlinks=False) and e.name[0] != "."}
    others = [entry for entry in found if entry.name not in plain] if len(plain) < len(found) else []
    return sorted(plain), sorted(others, key=lambda entry: entry.name)


@contextmanager
def _listing(folder: Path | str) -> Iterator[Iterator[Entry]]:
    try:
        with os.scandir(folder) as found:
            yield found
    except OSError as err:
        raise UserError(f"{printable(folder)}: this folder cannot be listed: {err.strerror}") from err


def is_dropping(name: str) -> bool:
    """Hidden, or left behind by a system."""
    return name.startswith(".") or name in DROPPINGS


def is_image(name: str) -> bool:
    """By its ending."""
    return name.lower().endswith(ENDINGS)


def is_folder(entry: Entry) -> bool:
    """Links are followed; one that leads nowhere is no folder."""
    try:
        return entry.is_dir()
    except OSError as err:
        if err.errno == errno.ELOOP:  # links that lead to one another
            return False
        raise UserError(f"{printable(entry.path)}: this link cannot be followed: {err.strerror}") from err


def is_dead(entry: Entry) -> bool:
    """A link that leads nowhere."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def folders_in(folder: Path, passed: Passed | None = None) -> list[str]:
    """The sorted names of the sub-folders, droppings and links to folders above aside.

    A dead link that is named as a folder is an error: a folder that is gone for now must not be a class less.
    """
    names = []
    real = os.path.realpath(folder)
    for entry in entries(folder):
        if is_dropping(entry.name):
            _pass(passed, HIDDEN, entry.name)
        elif is_folder(entry):
            if entry.is_symlink() and _holds(os.path.realpath(entry.path), real):
                _pass(passed, LOOP, entry.name)
            else:
                names.append(entry.name)
        elif is_image(entry.name):
            _pass(passed, LOOSE, entry.name)
        elif is_dead(entry) and not os.path.splitext(entry.name)[1]:
            raise UserError(f"{printable(entry.path)}: this link leads nowhere: mend or remove it")
        else:
            _pass(passed, DEAD if is_dead(entry) else OTHER, entry.name)
    return names


def _pass(passed: Passed | None, what: str, path: str) -> None:
    if passed is not None:
        passed.add(what, path)


def is_flat(folder: Path) -> bool:
    """Whether images lie directly in the folder."""
    return any(is_image(entry.name) and not is_dropping(entry.name) for entry in entries(folder))


def images_below(
    folder: Path, name: str, passed: Passed, listed: Callable[[str], object] = lambda path: None
) -> list[str]:
    """The paths, relative to `folder`, of all images below one class folder, however deep, sorted by their parts.

    Links are followed, but no folder is listed twice, nor one that a link or the class itself lies in: it holds
    other classes. `listed` is told each folder's path before it is listed.
    """
    found: list[str] = []
    start, above = os.path.realpath(folder / name), os.path.realpath(folder)
    seen: set[str] = set()
    todo: list[tuple[str, str]] = [(name, start)]  # (path below `folder`, the same folder's path without links)
    links: list[tuple[str, str]] = []  # (path below `folder`, the path without links of the folder that holds it)
    while todo or links:
        if todo:
            below, real = todo.pop()
        else:
            below, parent = links.pop(0)
            real = os.path.realpath(folder / below)
            if any(_holds(real, inner) for inner in (parent, start, above)):
                passed.add(LOOP, below)
                continue
        if real in seen:
            passed.add(TWICE, below)
            continue
        seen.add(real)
        listed(f"{folder}/{below}")
        files, others = split_entries(folder / below)
        found += [f"{below}/{file}" for file in files]
        for entry in others:
            path = f"{below}/{entry.name}"
            if is_dropping(entry.name):
                passed.add(HIDDEN, path)
            elif is_folder(entry):
                link = entry.is_symlink()  # listed later, so that a folder goes by its own name if it has one here
                (links if link else todo).append((path, real if link else f"{real}/{entry.name}"))
            elif is_image(entry.name) and (entry.is_symlink() or entry.is_file()):
                found.append(path)  # a dead link too: reading it is the error, or it is skipped and counted
            else:
                passed.add(DEAD if is_dead(entry) else OTHER, path)
    return sorted(found) if len(seen) == 1 else sorted(found, key=lambda path: path.split("/"))


def _holds(outer: str, inner: str) -> bool:
    """Whether the folder `inner` is `outer` or lies in it; both without links."""
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
