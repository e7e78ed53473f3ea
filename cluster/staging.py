"""A small clean copy of what a job runs: the sources and the configs it names, and nothing else.

Only kinds of files that are known to be needed are copied, so data, runs, databases, `.git`, environments
and keys stay at home by not being named, rather than by a list of what to leave out that is never complete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from bootvit.errors import UserError
from cluster.command import Command

ROOT = Path(__file__).resolve().parent.parent  # where bootvit's packages lie: a checkout or site-packages
PACKAGES = ("bootvit", "tune", "cluster", "configs")
SUFFIXES = frozenset({".py", ".yaml", ".yml", ".json"})
SECRET = re.compile(r"token|secret|credential|passw|api_?key|\.env", re.IGNORECASE)
LIMIT = 10 * 2**20  # bytes; sources take about half a megabyte, and Ray refuses more than 100 MiB
OUTSIDE = "submitted"  # the folder, in the copy, of configs that are not bootvit's own


def stage(command: Command, target: Path, root: Path = ROOT, limit: int = LIMIT) -> tuple[str, ...]:
    """Copy the sources and the command's configs into `target`; return the words that the job must say.

    Raises `UserError` when that is more than `limit` bytes.
    """
    places = _places(command, root)
    copies = {path.relative_to(root): path for path in _sources(root)}
    copies |= {place: path for path, place in places.items()}
    copies |= {Path(path.name): path for path in command.modules}  # the job's folder is on every node's PYTHONPATH
    _check_size(copies.values(), limit)
    for place, source in copies.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / place)
    words = list(command.words)
    words[command.config_at] = places[command.config].as_posix()
    return tuple(words)


def _sources(root: Path) -> Iterator[Path]:
    if (root / "pyproject.toml").is_file() and (root / "bootvit").is_dir():
        yield root / "pyproject.toml"
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and _is_source(path, root):
                yield path


def _is_source(path: Path, root: Path) -> bool:
    """Code and configs; a link under another name, or a file that may hold a key, is neither."""
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    renamed = path.resolve().name != path.name
    plain = path.suffix == ".py" or SECRET.search(path.name) is None  # code may well be about tokens
    return not hidden and not renamed and path.suffix in SUFFIXES and plain


def _places(command: Command, root: Path) -> dict[Path, Path]:
    """Where each config of the command lies in the copy; relative to one another they stay where they are."""
    if all(path.is_relative_to(root / "configs") for path in command.files):
        return {path: path.relative_to(root) for path in command.files}
    common = Path(os.path.commonpath([path.parent for path in command.files]))
    return {path: OUTSIDE / path.relative_to(common) for path in command.files}


def _check_size(files: Iterable[Path], limit: int) -> None:
    sizes = {path: path.stat().st_size for path in files}
    if sum(sizes.values()) > limit:
        biggest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        named = ", ".join(f"{path} ({sizes[path] / 2**20:.1f} MiB)" for path in biggest)
        raise UserError(
            f"the job's files are {sum(sizes.values()) / 2**20:.1f} MiB, more than {limit / 2**20:g} MiB: "
            f"move the biggest away: {named}"
        )
