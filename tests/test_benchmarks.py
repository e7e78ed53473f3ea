"""The benchmark scripts from end to end at a tiny size, so that a typo costs no machine time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, measure, scaling, speed

TINY = gpu.Sizes(
    batch=4,
    largest=4,
    seconds=0.0,
    blocks=1,
    overrides=(
        "model.vit.width=18", "model.vit.depth=9", "model.vit.heads=6", "model.vit.mlp_width=24", "model.vit.patch=8",
        "model.agent.stem_width=4",
    ),
    image=64,
    pixels=40,
    jpegs=24,
    matrix=64,
    workers=1,
)  # fmt: skip


def run(tmp_path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    status = gpu.main(["--device", "cpu", "--out", str(tmp_path), *more], TINY)
    (path,) = tmp_path.glob("gpu_*.json")
    return status, json.loads(path.read_text())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling what is here would take minutes; `test_obvious` has it as a slow test."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(gpu, "PARITY_CASES", ("agent_base_res_like",))


@pytest.mark.slow
def test_the_gpu_script_measures_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(tmp_path)
    wrong = [(row["what"], row["note"]) for row in found["rows"] if row["note"] and row["what"] != "matrix product"]
    assert (status, wrong) == (0, [])
    assert float(found["parity"]["agent_base_res_like"]) < 1e-8
    assert all(row["images_per_s"] > 0 for row in found["rows"][1:])
    assert {one["state"] for one in found["goals"] if "MFU" not in one["what"]} <= {"met", "missed"}
    assert found["commit"]
    assert found["torch"] == torch.__version__
    assert "joint-base, slow obvious, batch 4" in capsys.readouterr().out


@pytest.mark.slow
def test_a_row_that_fails_or_runs_out_of_memory_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu.time_steps

    def broken(bench: gpu.Bench, row: gpu.Row, *rest: Any) -> None:
        if "slow obvious" in row.what:
            raise RuntimeError("no such kernel")
        if row.what.startswith("shared"):
            raise torch.OutOfMemoryError("too much")
        real(bench, row, *rest)

    monkeypatch.setattr(gpu, "time_steps", broken)
    status, found = run(tmp_path, "--only", "*-small, [es]*")
    notes = {row["what"]: (row["note"], row["failed"]) for row in found["rows"]}
    assert status == 1
    assert notes["joint-small, slow obvious, batch 4"] == ("RuntimeError: no such kernel", True)
    assert notes["shared-small, eager, batch 4"] == ("out of memory", False)
    assert notes["joint-small, eager, batch 4"] == ("", False)
    wanted = {one["what"]: one["state"] for one in found["goals"]}
    assert wanted["joint-small / slow obvious, batch 4"] == "not measured"


def test_rows_beyond_the_budget_say_so(tmp_path: Path) -> None:
    status, found = run(tmp_path, "--budget", "0", "--commit", "abc")
    assert (status, found["commit"]) == (0, "abc")
    assert {row["note"] for row in found["rows"]} == {"not measured: the budget was used up"}


def test_make_bench_writes_a_table_of_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed.main(["--only", "digits*", "--repeats", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("speed-fp32_*.json")
    (line,) = json.loads(path.read_text())["goals"]
    assert line["what"] == "digits/joint / a bare loop of the same modules"
    assert line["state"] == ("met" if line["measured"] >= 1.3 else "missed")
    assert "| digits/joint / a bare loop of the same modules | >= 1.3 |" in capsys.readouterr().out


def test_a_profile_has_every_operator_in_one_group() -> None:
    spent = speed.by_group(lambda _: torch.ones(64, 64) @ torch.ones(64, 64), None, 1)  # type: ignore[arg-type]
    assert spent["matrix products"] > 0
    assert speed.group_of("aten::gelu_backward") == "GELU"
    assert speed.group_of("aten::topk") == "rest"


def test_the_median_is_of_the_ratios_of_neighbours() -> None:
    times = {"slow": [2.0, 40.0, 6.0], "fast": [1.0, 10.0, 2.0]}
    assert measure.ratio(times, "slow", "fast") == 3.0
    assert measure.judged("x", 0.7, 0.71, at_most=True)["state"] == "missed"
    assert measure.judged("x", 0.7, 0.7)["state"] == "met"


@pytest.mark.slow
def test_scaling_measures_two_workers_and_predicts_sixty_four(tmp_path: Path) -> None:
    scaling.main(["--repeats", "1", "--batch", "2", "--configs", "digits/shared", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("scaling_*.json")
    found = json.loads(path.read_text())
    assert found["measured"][0]["ms"]["2"]["step"] > 0
    assert [row["name"] for row in found["predicted"]] == list(scaling.PREDICTED)
    assert all(0 < row["efficiency"] < 1 for row in found["predicted"])
    (text,) = tmp_path.glob("scaling_*.md")
    assert "digits/shared, batch 2 a worker" in text.read_text()


def test_the_exchange_costs_what_the_formula_says() -> None:
    """Two nodes of two GPUs: half of the bytes out and in inside, a quarter of them out and in between."""
    cluster = scaling.Cluster(nodes=2, gpus=2, inside=10.0, between=5.0, message=1.0, hop=0.5, bucket=1000.0)
    assert scaling.reduction(100.0, cluster) == pytest.approx(100 / 10 + 50 / 5 + 1.5)
    assert scaling.reduction(2000.0, cluster) == pytest.approx(2000 / 10 + 1000 / 5 + 2 * 1.5)
