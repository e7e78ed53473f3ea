"""The notebook in examples/: its cells run one after another, as they stand there but for the number of epochs."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "first-model.ipynb"


def shown(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line, if that is an expression."""
    body = ast.parse(cell).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    quick = [cell.replace('"schedule.epochs": 10', '"schedule.epochs": 2') for cell in code]
    assert quick != code
    said = [shown(cell, names) for cell in quick]
    assert set(said[1]) == {"vit", "agent"}
    assert len(said[2]) > 1
    assert len(said[3][0]["vit"]) == 3
    assert said[-1] == (3, 8, 8)
