"""Which split the name of a folder or of a file means: the one place that decides."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

Kind = Literal["train", "test", "eval", "val"]
SPELLINGS: dict[Kind, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "eval": ("eval", "evaluation"),
    "val": ("val", "valid", "validation", "dev", "development"),
}
EVALUATION: tuple[Kind, ...] = ("test", "eval", "val")  # the first one with labels is the test split
KINDS: dict[str, Kind] = {word: kind for kind, words in SPELLINGS.items() for word in words}

_WORD = "|".join(sorted(KINDS, key=len, reverse=True))
_FILE = re.compile(rf"({_WORD})(?=$|[^a-z]|set|data|images)")
_LIKE = re.compile(rf"(?:(.+)[ ._-])?({_WORD})((?:[ ._-]|\d|set|data|images|imgs).*)?")
_FILLERS = ("", "set", "data", "dataset", "split", "folder", "image", "images", "img", "imgs")


def split_of_folder(name: str) -> Kind | None:
    """A folder is a split if its whole name is one of the spellings, in any case."""
    return KINDS.get(name.strip().casefold())


def split_of_file(name: str) -> Kind | None:
    """A file belongs to a split if its name begins with one of the spellings, as a word."""
    match = _FILE.match(name.casefold())
    return KINDS[match[1]] if match else None


def disguised(names: Iterable[str]) -> bool:
    """Whether these folders are splits under longer names: `seg_train` and `seg_test`, or `train_images` alone."""
    rests: defaultdict[str, set[Kind]] = defaultdict(set)
    others = 0
    for name in names:
        if match := _LIKE.fullmatch(name.casefold()):
            rests["/".join((match[1] or "", match[3] or ""))].add(KINDS[match[2]])
        else:
            others += 1
    if any("train" in kinds and len(kinds) > 1 for kinds in rests.values()):
        return True
    return bool(rests) and not others and all(rest.strip("/ ._-0123456789") in _FILLERS for rest in rests)
