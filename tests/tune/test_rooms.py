"""The rooms of tune/: imports go run -> tell -> decide -> spec and never back; decide knows no Ray, torch or disk."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tune

ROOT = Path(tune.__file__).parent
ROOMS = ("spec", "decide", "tell", "run")
FILES = sorted(file for room in ROOMS for file in (ROOT / room).glob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_every_file_is_in_a_room() -> None:
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py"}
    assert {folder.name for folder in ROOT.iterdir() if list(folder.glob("*.py"))} == set(ROOMS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_imports_never_go_back(file: Path) -> None:
    behind = ROOMS[ROOMS.index(file.parent.name) + 1 :]
    found = [name for name in imports(file) if name.startswith(tuple(f"tune.{room}" for room in behind))]
    assert not found


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name == "decide"], ids=lambda file: file.stem)
def test_decisions_need_no_ray_no_torch_and_nothing_on_disk(file: Path) -> None:
    packages = {name.split(".")[0] for name in imports(file)}
    assert not packages & {"ray", "torch", "mlflow", "shutil", "subprocess", "tempfile"}
    if file.stem != "log":
        assert "pathlib" not in packages
        assert not re.search(r"\bopen\(", file.read_text())
