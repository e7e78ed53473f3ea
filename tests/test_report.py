"""Reports: which runs are averaged, the numbers by hand, and the pages."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bootvit.config import Config, dump_config, merge
from bootvit.errors import UserError
from bootvit.report import (
    collect_folders,
    collect_mlflow,
    command,
    print_table,
    report_json,
    sweep_json,
    tables,
    write_report,
    write_sweep_report,
)
from bootvit.report.advice import advice, choices, lead
from bootvit.report.importance import encode, importances
from bootvit.report.page import Block, Grid, Sized, Text, numeric, text_of, to_html, to_markdown
from bootvit.report.paper import paper_points, paper_row
from bootvit.report.rows import RunRow, read_run
from bootvit.report.sweep import curve_blocks
from bootvit.report.sweep_data import costs, read_sweep, trial_name, winners_table, winners_tables
from bootvit.report.sweep_plots import UNSET, make_axis, spread_out
from bootvit.report.tables import Column, Line, letters, short_keys
from bootvit.report.write import cell_text, seconds_cell
from bootvit.tracking import Journal, MlflowRun, Record, run_tags
from bootvit.tracking.attach import attach
from bootvit.tracking.store import connect


def make_run(
    storage: Path,
    name: str,
    test: dict[str, float] | None,
    *,
    method: str = "vit",
    fraction: float = 0.1,
    seed: int = 0,
    held_out: dict[str, float] | None = None,
    changes: dict[str, Any] | None = None,
    **result: Any,
) -> Path:
    """A run directory as the loop leaves it: two epochs, the last of which gives the final accuracy."""
    data = {"name": name, "method": method, "seed": seed, "data": {"fraction": fraction}}
    config = Config.model_validate(merge(merge({"model": {"vit": {"width": 72}}}, data), changes or {}))
    folder = storage / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    judged, split = (test, "test") if test is not None else (held_out or {}, "held_out")
    Journal(folder / "metrics.jsonl").write(
        [
            Record(10 * (e + 1), e, f"{split}/{net}/top1", value * share, 100.0 + e)
            for e, share in enumerate((0.5, 1.0))
            for net, value in judged.items()
        ]
        + [Record(10 * (e + 1), e, f"train/{net}/loss", 2.0 - e, 100.0 + e) for e in range(2) for net in judged]
        + [Record(10 * (e + 1), e, "train/lr", 0.1 / (e + 1), 100.0 + e) for e in range(2)]
        + [Record(10 * (e + 1), e, "epoch", e + 1.0, 100.0 + e) for e in range(2)]
    )
    document = {
        "name": name,
        "method": method,
        "status": "finished",
        "epochs": 2,
        "final": scores(judged),
        "best": scores(judged),
        "held_out": scores(held_out),
        "images_per_second": 100.0,
        "seconds": 60.0,
        "gpu_seconds": 0.0,
        "fraction": fraction,
        "seed": seed,
        "data_fingerprint": "f00d",
        "git": "abc",
        "mlflow_run_id": None,
    } | result
    (folder / "result.json").write_text(json.dumps(document))
    return folder


def scores(top1: dict[str, float] | None) -> dict[str, dict[str, float]] | None:
    return None if top1 is None else {net: {"top1": value, "top5": 99.0} for net, value in top1.items()}


def cells(rows: list[RunRow], split: str = "test") -> dict[tuple[str, str, float], str]:
    """{(title, variant, fraction): text}."""
    return {
        (ln.title, ln.variant, col.fraction): cell_text(cell)
        for part in tables(rows).parts
        if part.split == split
        for (ln, col), cell in part.cells.items()
    }


# --------------------------------------------------------------------------------------------------- table


def test_mean_and_sample_sd_over_seeds_by_hand(tmp_path: Path) -> None:
    for seed, top1 in enumerate((50.0, 53.0, 56.0)):
        make_run(tmp_path, f"v{seed}", {"vit": top1}, seed=seed)
    make_run(tmp_path, "joint", {"vit": 61.25, "agent": 90.5}, method="joint")
    assert cells(collect_folders([tmp_path])) == {
        ("vit", "", 0.1): "53.00 ± 3.00 (n=3)",
        ("joint.vit", "", 0.1): "61.25 (n=1)",
        ("joint.agent", "", 0.1): "90.50 (n=1)",
    }


def test_methods_and_fractions_are_in_the_papers_order(tmp_path: Path) -> None:
    for index, method in enumerate(("shared", "agent", "vit", "joint")):
        nets = {"vit": ("vit",), "agent": ("agent",)}.get(method, ("vit", "agent"))
        for fraction in (0.5, 0.05):
            make_run(
                tmp_path, f"{index}-{fraction}", dict.fromkeys(nets, 1.0 + index), method=method, fraction=fraction
            )
    (found,) = tables(collect_folders([tmp_path])).parts
    assert [ln.title for ln in found.lines] == [
        "vit",
        "agent",
        "joint.vit",
        "joint.agent",
        "shared.vit",
        "shared.agent",
    ]
    assert found.columns == (Column("digits", 0.05), Column("digits", 0.5))


def test_runs_that_differ_in_more_than_the_seed_are_two_lines_that_say_so(tmp_path: Path) -> None:
    make_run(tmp_path, "a", {"vit": 40.0}, seed=0)
    make_run(tmp_path, "b", {"vit": 60.0}, seed=1, changes={"optim": {"lr": 0.5}})
    assert cells(collect_folders([tmp_path])) == {
        ("vit", "lr=0.001", 0.1): "40.00 (n=1)",
        ("vit", "lr=0.5", 0.1): "60.00 (n=1)",
    }
    assert tables(collect_folders([tmp_path])).legend == {
        "vit lr=0.001 on digits": "optim.lr=0.001",
        "vit lr=0.5 on digits": "optim.lr=0.5",
    }


def test_many_differences_are_letters_that_a_legend_explains(tmp_path: Path) -> None:
    changes = {"optim": {"lr": 0.5, "weight_decay": 0.5, "clip_norm": 1.0}, "schedule": {"epochs": 3}}
    make_run(tmp_path, "a", {"vit": 40.0})
    make_run(tmp_path, "b", {"vit": 60.0}, changes=changes)
    found = tables(collect_folders([tmp_path]))
    assert [line.name for line in found.parts[0].lines] == ["vit A", "vit B"]
    assert found.legend["vit A on digits"] == (
        "optim.clip_norm=1.0, optim.lr=0.5, optim.weight_decay=0.5, schedule.epochs=3"
    )
    assert [letters(place) for place in (0, 25, 26, 52)] == ["A", "Z", "AA", "BA"]


def test_keys_are_as_short_as_they_can_be_told_apart() -> None:
    keys = ["objective.vit.kd", "objective.agent.kd", "optim.lr", "seed"]
    assert list(short_keys(keys).values()) == ["vit.kd", "agent.kd", "lr", "seed"]
    assert short_keys(["a.b", "b"]) == {"a.b": "a.b", "b": "b"}


def test_other_data_in_the_same_place_is_another_variant(tmp_path: Path) -> None:
    make_run(tmp_path, "a", {"vit": 40.0}, seed=0)
    make_run(tmp_path, "b", {"vit": 60.0}, seed=1, data_fingerprint="beef")
    assert set(cells(collect_folders([tmp_path]))) == {
        ("vit", "fingerprint=f00d", 0.1),
        ("vit", "fingerprint=beef", 0.1),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"vit": {"kd": 0.5, "hint": 3.0}}},
        {"model": {"agent": {"stem": "resnet"}}},
        {"ray": {"storage_path": "/elsewhere", "max_failures": 2}},
        {"data": {"eval_batch_size": 7, "workers": 0}},
        {"tracking": {"enabled": False}},
    ],
    ids=str,
)
def test_what_cannot_change_a_lone_vit_does_not_split_its_seeds(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_run(tmp_path, "a", {"vit": 40.0}, seed=0)
    make_run(tmp_path, "b", {"vit": 44.0}, seed=1, changes=changes)
    assert cells(collect_folders([tmp_path])) == {("vit", "", 0.1): "42.00 ± 2.83 (n=2)"}


def test_kd_does_split_joint_runs(tmp_path: Path) -> None:
    make_run(tmp_path, "a", {"vit": 40.0}, method="joint")
    make_run(tmp_path, "b", {"vit": 44.0}, method="joint", seed=1, changes={"objective": {"vit": {"kd": 0.5}}})
    assert len(cells(collect_folders([tmp_path]))) == 2


def test_failed_unfinished_and_nan_runs_are_listed_apart(tmp_path: Path) -> None:
    make_run(tmp_path, "good", {"vit": 40.0})
    make_run(tmp_path, "failed", None, seed=1, status="failed", final=None, reason="loss is nan")
    make_run(tmp_path, "nan", {"vit": math.nan}, seed=2)
    (make_run(tmp_path, "running", {"vit": 99.0}, seed=3) / "result.json").unlink()
    found = tables(collect_folders([tmp_path]))
    assert {a.row.name: a.reason for a in found.apart} == {
        "failed": "failed after 2 epochs: loss is nan",
        "nan": "accuracy is not finite: {'vit': nan}",
        "running": "unfinished after 0 epochs",
    }
    assert [cell.values for part in found.parts for cell in part.cells.values()] == [(40.0,)]


def test_a_seed_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path, "a", {"vit": 40.0}, seed=0)
    make_run(tmp_path, "b", {"vit": 40.0}, seed=0)
    found = tables(collect_folders([tmp_path, tmp_path / "a"]))
    assert [cell.seeds for part in found.parts for cell in part.cells.values()] == [(0,)]
    assert [a.reason for a in found.apart] == ["repeats seed 0 of a"]


def test_held_out_numbers_have_a_table_of_their_own(tmp_path: Path) -> None:
    make_run(tmp_path, "a", None, held_out={"vit": 30.0})
    make_run(tmp_path, "b", {"vit": 50.0}, held_out={"vit": 32.0}, seed=1)
    rows = collect_folders([tmp_path])
    assert cells(rows, "test") == {("vit", "", 0.1): "50.00 (n=1)"}
    assert cells(rows, "held_out") == {("vit", "", 0.1): "31.00 ± 1.41 (n=2)"}
    assert not tables(rows).apart


def test_test_and_held_out_that_happen_to_be_equal_are_told_apart_by_the_journal(tmp_path: Path) -> None:
    row = read_run(make_run(tmp_path, "a", {"vit": 30.0}, held_out={"vit": 30.0}))
    assert row.test == row.held_out == {"vit": 30.0}
    folder = make_run(tmp_path, "b", None, held_out={"vit": 30.0})
    assert (read_run(folder).test, read_run(folder).held_out) == ({}, {"vit": 30.0})


# --------------------------------------------------------------------------------------------------- paper


def full_size(**changes: Any) -> dict[str, str]:
    from bootvit.tracking.tags import flat_params

    return flat_params(Config.model_validate(changes))


BASE = {"model": {"vit": {"name": "bootvit_base_patch16_224"}, "agent": {"name": "agent_base"}}}


@pytest.mark.parametrize(
    ("method", "network", "changes", "row"),
    [
        ("vit", "vit", {}, "vit_small"),
        ("vit", "vit", {"optim": {"sam_rho": 0.1}}, "vit_small_sam"),
        ("vit", "vit", merge(BASE, {"model": {"vit": {"attention": "entmax"}}}), "vit_base_sparse"),
        ("agent", "agent", BASE, "agent_base"),
        ("agent", "agent", {"model": {"agent": {"name": "resnet50"}}}, "resnet50"),
        ("joint", "vit", {}, "joint_small.vit"),
        ("shared", "agent", BASE, "shared_base.agent"),
        ("joint", "vit", {"model": {"agent": {"name": "resnet50"}}}, None),
        ("joint", "vit", {"optim": {"sam_rho": 0.1}}, None),
        ("joint", "vit", {"model": {"agent": {"weights": "/runs/other"}}}, None),
        ("agent", "agent", {"model": {"agent": {"name": "resnet50", "weights": "timm"}}}, None),
        ("vit", "vit", {"model": {"vit": {"width": 72}}}, None),
        ("vit", "vit", {"data": {"image_size": 32}}, None),
        (
            "vit",
            "vit",
            {"model": {"vit": {"name": "vit_base_patch16_224", "weights": "timm"}}},
            "pretrained_vit_base",
        ),
    ],
)
def test_which_row_of_the_paper_a_network_is(
    method: str, network: str, changes: dict[str, Any], row: str | None
) -> None:
    assert paper_row(method, network, full_size(**changes)) == row


def test_the_papers_numbers_stand_at_its_data_sets_and_fractions_only() -> None:
    assert paper_points("joint", "vit", full_size(), "cifar100") == {1.0: 76.19}
    assert paper_points("joint", "vit", full_size(**BASE), "imagenet") == {0.05: 36.01, 0.1: 49.73, 0.5: 71.36}
    assert paper_points("joint", "agent", full_size(**BASE), "imagenet") == {}
    assert paper_points("joint", "vit", full_size(), "imagenet") == {}
    assert paper_points("joint", "vit", full_size(), "digits") == {}


def test_the_papers_number_is_beside_the_measured_one(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": {"vit": {"width": None}}, "data": {"source": "cifar10", "root": "/data"}}
    make_run(tmp_path, "a", {"vit": 93.0, "agent": 92.0}, method="joint", fraction=1.0, changes=changes)
    make_run(tmp_path, "b", {"vit": 80.0, "agent": 79.0}, method="joint", fraction=0.5, changes=changes)
    assert cells(collect_folders([tmp_path])) == {
        ("joint.vit", "", 1.0): "93.00 (n=1) [95.14]",
        ("joint.agent", "", 1.0): "92.00 (n=1) [94.90]",
        ("joint.vit", "", 0.5): "80.00 (n=1)",
        ("joint.agent", "", 0.5): "79.00 (n=1)",
    }


# ----------------------------------------------------------------------------------------------- mistakes


def test_nothing_to_report_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs there; train first, such as: bootvit train"):
        collect_folders([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        collect_folders([tmp_path / "absent"])
    with pytest.raises(UserError, match="no runs to report; train first"):
        write_report([], tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"status": "finished", "final": {"vit": 3}}', '{"name": "a"}'])
def test_a_broken_result_names_its_file(tmp_path: Path, text: str) -> None:
    make_run(tmp_path, "good", {"vit": 1.0})
    bad = make_run(tmp_path, "bad", {"vit": 1.0}) / "result.json"
    bad.write_text(text)
    with pytest.raises(UserError) as caught:
        collect_folders([tmp_path])
    assert str(caught.value).startswith(f"{bad}: ")
    assert "\n" not in str(caught.value)


def test_a_result_without_its_config_names_the_missing_file(tmp_path: Path) -> None:
    config = make_run(tmp_path, "a", {"vit": 1.0}) / "config.yaml"
    config.unlink()
    with pytest.raises(UserError, match=re.escape(str(config))):
        collect_folders([tmp_path])


def test_folders_experiment_and_sweep_exclude_one_another(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exclude one another"):
        command([tmp_path], experiment="e")
    with pytest.raises(UserError, match=r"--sweep nope: no sweep\.json"):
        command([], sweep="nope")


# --------------------------------------------------------------------------------------------------- pages


def write_runs(storage: Path) -> None:
    for seed in (0, 1):
        for fraction in (0.05, 0.5):
            make_run(storage, f"v{seed}-{fraction}", {"vit": 40.0 + 50 * fraction + seed}, seed=seed, fraction=fraction)
            make_run(
                storage,
                f"j{seed}-{fraction}",
                {"vit": 50.0 + 50 * fraction + seed, "agent": 60.0 + 50 * fraction},
                method="joint",
                seed=seed,
                fraction=fraction,
            )


def test_the_report_is_a_page_in_two_formats_with_its_plots(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs")
    make_run(tmp_path / "runs", "broken", None, status="failed", final=None, reason="<b>| out of memory")
    files = write_report(collect_folders([tmp_path / "runs"]), tmp_path / "out")
    assert [file.name for file in files] == [
        "report.md",
        "report.html",
        "accuracy-over-fraction.png",
        "accuracy-over-epochs.png",
        "losses.png",
    ]
    markdown, html = files[0].read_text(), files[1].read_text()
    assert "| joint.vit | 53.00 ± 0.71 (n=2) | 75.50 ± 0.71 (n=2) |" in markdown
    assert "![" in markdown
    assert "(accuracy-over-epochs.png)" in markdown
    assert html.count("data:image/png;base64,") == 3
    assert "http" not in html
    assert "&lt;b&gt;| out of memory" in html
    assert r"\<b>\| out of memory" in markdown
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[2:])


def test_the_folders_command_prints_the_table_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path / "runs")
    command([str(tmp_path / "runs")], out=tmp_path / "out")
    out = capsys.readouterr().out
    assert "joint.agent" in out
    assert "53.00 ± 0.71 (n=2)" in out
    assert f"written: {tmp_path / 'out' / 'report.md'}" in out


def test_json_is_one_strict_document_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path / "runs")
    make_run(tmp_path / "runs", "nan", {"vit": math.nan}, seed=9)
    command([str(tmp_path / "runs")], as_json=True)
    document = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert document == report_json(collect_folders([tmp_path / "runs"]))
    (line,) = [row for row in document["rows"] if row["title"] == "joint.vit"]
    assert line["split"] == "test"
    assert line["cells"][0] == {
        "data": "digits",
        "fraction": 0.05,
        "mean": 53.0,
        "sd": pytest.approx(math.sqrt(0.5)),
        "n": 2,
        "values": [52.5, 53.5],
        "seeds": [0, 1],
        "split": "test",
        "paper": None,
    }
    assert [run["name"] for run in document["apart"]] == ["nan"]
    assert not (tmp_path / "report").exists()


def test_names_cannot_break_the_page() -> None:
    blocks: list[Block] = [Grid(["a|b"], [["<script>alert()"]]), Text("x_y *z*")]
    assert "<script>alert" not in to_html("<t>", blocks)
    assert "&lt;script&gt;alert" in to_html("<t>", blocks)
    assert r"a\|b" in to_markdown("t", blocks)
    assert r"x\_y \*z\*" in to_markdown("t", blocks)


def test_print_table_names_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "a", None, status="interrupted", final=None)
    print_table(collect_folders([tmp_path]))
    out = capsys.readouterr().out
    assert "No run has finished yet." in out
    assert "interrupted after 2 epochs" in out


class Parsed(HTMLParser):
    """The tags of a page that are open around each table, the cells of its rows, and where pictures come from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.boxes: list[str] = []
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        if tag == "table":
            self.boxes.append(self.open[-1])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(about["class"] or "")
        self.sources += [about[key] or "" for key in ("src", "href") if key in about]
        if tag not in ("meta", "img"):
            self.open.append(f"{tag} {about.get('class', '')}".strip())

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split()[0] == tag


def test_the_page_is_sound_whatever_a_browser_does(tmp_path: Path) -> None:
    """Every table has a box of its own that scrolls, rows are as long as their heads, and nothing is loaded."""
    write_runs(tmp_path / "runs")
    pages = [
        write_report(collect_folders([tmp_path / "runs"]), tmp_path / "a")[1],
        write_sweep_report(make_sweep(tmp_path), tmp_path / "b")[1],
    ]
    for page in pages:
        text = page.read_text()
        found = Parsed(text)
        assert not found.open
        assert found.boxes
        assert set(found.boxes) == {"div box"}
        assert {kind for row in found.rows for kind in row} == {"text", "number"}
        assert all(source.startswith("data:image/") for source in found.sources)
        assert text.count("<th ") == text.count('<button type="button">') > 0
        for part in text.split("<table>")[1:]:
            widths = {
                len(row) for row in Parsed(f"<div class=box><table>{part.split('</table>')[0]}</table></div>").rows
            }
            assert len(widths) == 1
        style = text.partition("<style>")[2].partition("</style>")[0]
        assert re.search(r"\.box \{[^}]*overflow-x: auto", style)
        assert "@import" not in style
        assert "url(" not in style


# -------------------------------------------------------------------------------------------------- MLflow


def test_mlflow_gives_the_same_table_and_curves_as_the_folders(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    changes: dict[str, Any] = {"tracking": {"uri": uri}}
    make_run(tmp_path / "runs", "a", {"vit": 50.0}, seed=0, changes=changes)
    make_run(tmp_path / "runs", "b", {"vit": 54.0}, seed=1, changes=changes)
    make_run(tmp_path / "runs", "c", None, held_out={"vit": 20.0, "agent": 30.0}, method="joint", changes=changes)
    make_run(tmp_path / "runs", "d", None, seed=5, changes=changes, status="failed", final=None)
    for folder in sorted((tmp_path / "runs").iterdir()):
        ship(folder)
    folders, mlflow = collect_folders([tmp_path / "runs"]), collect_mlflow(uri, "bootvit")
    assert [part.cells for part in tables(mlflow).parts] == [part.cells for part in tables(folders).parts]
    by_name = {row.name: row for row in mlflow}
    assert {row.name: row.curves for row in folders} == {name: row.curves for name, row in by_name.items()}
    assert [a.row.name for a in tables(mlflow).apart] == ["d"]
    with pytest.raises(UserError, match="no experiment 'bootvot'; there is 'bootvit'"):
        collect_mlflow(uri, "bootvot")


def ship(folder: Path) -> None:
    """What the driver does at the end of a run."""
    import yaml

    config = Config.model_validate_json(json.dumps(yaml.safe_load((folder / "config.yaml").read_text())))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-00000020.json").write_text(
        '{"step": 20, "epoch": 2, "batch": 0, "final": true, "sha256": ""}'
    )
    result = json.loads((folder / "result.json").read_text())
    run = MlflowRun(config, folder, tags=run_tags(config, data_fingerprint="f00d"))
    run.finish("FINISHED" if result["status"] == "finished" else "FAILED", result)


def test_what_comes_after_a_run_is_attached_to_it(tmp_path: Path, empty_store: Path) -> None:
    """Such as the figures of `bootvit explain`."""
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    folder = make_run(tmp_path / "runs", "a", {"vit": 50.0}, changes={"tracking": {"uri": uri}})
    figure = tmp_path / "heads.png"
    figure.write_bytes(b"png")
    attach(folder, [figure], "explain")  # a run that was not tracked has nowhere to put it
    ship(folder)
    attach(folder, [figure], "explain")
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert [item.path for item in connect(uri).list_artifacts(run_id, "explain")] == ["explain/heads.png"]


def test_a_store_that_is_not_there_is_one_line_and_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no MLflow database there"):
        collect_mlflow(f"sqlite:///{tmp_path}/mlflow.db", "bootvit")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9") as caught:
        collect_mlflow("http://127.0.0.1:9", "bootvit")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- sweep


def make_sweep(storage: Path, *, per_group: int = 12, tested: bool = True) -> Path:
    """Two methods at two fractions; accuracy depends on kd, a little on lr, and not at all on the seed."""
    folder = storage / "s"
    trials: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    for method in ("vit", "joint"):
        for fraction in (0.05, 0.5):
            group = f"data.fraction={fraction},method={method}"
            members = [make_trial(len(trials) + i, i, group, method, fraction) for i in range(per_group)]
            trials += members
            top = max(members, key=lambda t: t["held_out"]["vit"]["top1"])
            repeat = top | {"id": f"{top['id']}b", "seed": 1, "held_out": scores({"vit": 51.0})}
            members.append(repeat)
            trials.append(repeat)
            for trial in (top, repeat):
                trial["final"] = scores({"vit": trial["held_out"]["vit"]["top1"] - 2}) if tested else None
            best[group] = {key: top[key] for key in ("overrides", "held_out", "final")} | {"trial": top["id"]}
    trials += [
        trials[0] | {"id": "stop", "status": "stopped", "final": None, "held_out": scores({"vit": 3.0})},
        trials[0] | {"id": "bad", "status": "failed", "reason": "loss is nan", "final": None, "held_out": None},
    ]
    for trial in trials:
        run = folder / trial["run"]
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(dump_config(trial_config(trial)))
    document = {"name": "s", "status": "finished", "trials": trials, "best": best}
    (folder / "sweep.json").write_text(json.dumps(document))
    return folder


def make_trial(number: int, index: int, group: str, method: str, fraction: float) -> dict[str, Any]:
    kd, lr = 0.01 * 2**index, 0.001 * (1 + (index * 5) % 7)
    top1 = 20 + 40 * fraction + 3 * index - 100 * lr + (8 if method == "joint" else 0)
    return {
        "id": f"t{number:03d}",
        "group": group,
        "seed": 0,
        "overrides": {"method": method, "data.fraction": fraction, "objective.vit.kd": kd, "optim.lr": lr},
        "status": "finished",
        "reason": None,
        "epochs": 2,
        "held_out": scores({"vit": top1}),
        "final": None,
        "seconds": 2.0,
        "gpu_seconds": 0.5,
        "run": f"trials/t{number:03d}",
    }


def trial_config(trial: dict[str, Any]) -> Config:
    overrides = trial["overrides"]
    data = {"fraction": overrides["data.fraction"]}
    return Config.model_validate({"name": trial["id"], "method": overrides["method"], "data": data})


def test_the_winners_make_the_table_over_their_seeds(tmp_path: Path) -> None:
    sweep = read_sweep(make_sweep(tmp_path))
    # the best trial of joint at 50%: 20 + 20 + 33 - 0.7 + 8 - lr; index 11 has lr 0.007
    top = 20 + 20 + 33 - 100 * 0.001 * (1 + 55 % 7) + 8
    cell = winners_table(sweep, "test").cells[Line("joint", "vit", ""), Column("digits", 0.5)]
    assert cell.values == pytest.approx((top - 2, 49.0))
    assert cell.split == "test"
    held_out = winners_table(sweep, "held_out").cells[Line("joint", "vit", ""), Column("digits", 0.5)]
    assert held_out.values == pytest.approx((top, 51.0))
    assert held_out.split == "held_out"


def test_an_untested_sweep_shows_held_out_numbers_and_a_retrained_one_its_retraining(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, tested=False)
    assert [part.split for part in winners_tables(read_sweep(folder))] == ["held_out"]
    document = json.loads((folder / "sweep.json").read_text())
    for found in document["best"].values():
        found["final"] = scores({"vit": 77.0})
    (folder / "sweep.json").write_text(json.dumps(document))
    assert {cell_text(c) for c in winners_table(read_sweep(folder), "test").cells.values()} == {"77.00 (n=1)"}


def test_cost_counts_every_trial_however_it_ended(tmp_path: Path) -> None:
    found = {(cost.method, cost.column.fraction): cost for cost in costs(read_sweep(make_sweep(tmp_path)))}
    assert found["vit", 0.05].statuses == {"failed": 1, "finished": 13, "stopped": 1}
    assert found["vit", 0.05].seconds == 30.0
    assert found["joint", 0.5].gpu_seconds == 6.5


def test_importance_finds_the_key_that_matters_within_groups(tmp_path: Path) -> None:
    found = importances(read_sweep(make_sweep(tmp_path)))
    assert [each.key for each in found.keys] == ["objective.vit.kd", "optim.lr"]
    assert found.keys[0].mean > 5 * abs(found.keys[1].mean)
    assert found.r2 > 0.5
    assert found.trials == 52


def test_importance_refuses_when_there_are_too_few_trials(tmp_path: Path) -> None:
    found = importances(read_sweep(make_sweep(tmp_path, per_group=1)))
    assert found.keys == ()
    assert "no searched key varies within a group" in found.refusal
    found = importances(read_sweep(make_sweep(tmp_path / "two", per_group=2)))
    assert found.refusal.startswith("12 finished trials")
    assert "too few for 2 keys: 16 are needed" in found.refusal


def test_encode_keeps_numbers_orders_texts_and_leaves_holes() -> None:
    assert encode([0.5, 2]) == [0.5, 2.0]
    assert encode(["b", "a", "b"]) == [1.0, 0.0, 1.0]
    assert encode([True, False]) == [1.0, 0.0]
    assert math.isnan(encode([None, 1.0])[0])


def test_axes_are_linear_logarithmic_or_categories() -> None:
    assert make_axis("a", [0.0, 1.0, 4.0]).places == (0.0, 0.25, 1.0)
    assert make_axis("a", [0.01, 0.1, 1.0]).places == pytest.approx((0.0, 0.5, 1.0))
    assert make_axis("a", [0.01, 5.0, 10.0]).places == pytest.approx((0.0, 4.99 / 9.99, 1.0))
    assert make_axis("a", ["x", "y", None]).places == (0.25, 0.75, UNSET)
    assert make_axis("a", [2, 2, 2]).places == (0.5, 0.5, 0.5)
    assert spread_out([0.0, 1.0, 0.0]) == pytest.approx([-0.025, 1.0, 0.025])


def test_the_sweeps_report_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_sweep(tmp_path)
    command([], sweep=str(folder))
    out = capsys.readouterr().out
    assert "Best of every group" in out
    assert "Cost per point" in out
    names = {file.name for file in (folder / "report").iterdir()}
    assert names == {
        "report.md",
        "report.html",
        "accuracy-over-fraction.png",
        "parallel-coordinates.png",
        "importance.png",
        "ledger.csv",
    }
    page = (folder / "report" / "report.md").read_text()
    assert "kd=20.48, lr=0.007" in page
    assert "kd is objective.vit.kd" in page
    assert "| bad | vit | 5% | 0.01 | 0.001 | 0 | failed | 2 | – | 2 s | loss is nan |" in page
    assert "http" not in (folder / "report" / "report.html").read_text()
    with (folder / "report" / "ledger.csv").open(newline="") as file:
        ledger = list(csv.DictReader(file))
    assert len(ledger) == 54
    assert sum(float(row["gpu_seconds"]) for row in ledger) == 27.0


def test_a_small_sweep_is_reported_without_the_plots_it_cannot_have(tmp_path: Path) -> None:
    files = write_sweep_report(make_sweep(tmp_path, per_group=1), tmp_path / "out")
    assert "importance.png" not in {file.name for file in files}
    assert "Not computed: no searched key varies within a group" in files[0].read_text()
    assert trial_name("0003-fraction=0.1,kd=0.5,seed=0") == "#3"
    assert trial_name("t003") == "t003"


def test_extrapolations_over_fractions_are_shown_with_their_error(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, per_group=1)
    document = json.loads((folder / "sweep.json").read_text())
    guess = {"fraction": 0.5, "top1": 71.0, "low": 68.5, "high": 73.0, "truth": 70.5, "error": 0.5}
    blind = {"fraction": 1.0, "top1": -1e-9, "low": None, "high": None}
    points = [{"fraction": 0.05, "top1": 40.0, "seeds": 1}]
    document["curves"] = [{"line": "method=vit", "points": points, "check": guess, "all_images": blind}]
    (folder / "sweep.json").write_text(json.dumps(document))
    files = {file.name for file in write_sweep_report(folder, tmp_path / "out")}
    assert "fraction-curve.png" in files
    (grid, *_) = [block for block in curve_blocks(read_sweep(folder)) if isinstance(block, Grid)]
    assert grid.rows == [
        [
            "vit",
            "5%: 40.0",
            "50%: 71.0 [68.5, 73.0], truth 70.5, off by +0.5",
            "100%: 0.0 (two points: no interval)",
        ]
    ]


def test_winners_named_by_the_sweep_are_taken_at_their_word(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path)
    document = json.loads((folder / "sweep.json").read_text())
    for found in document["best"].values():
        found["trials"] = [found["trial"]]
    (folder / "sweep.json").write_text(json.dumps(document))
    assert {len(winner.trials) for winner in read_sweep(folder).winners} == {1}


def test_sweep_json_is_strict(tmp_path: Path) -> None:
    text = json.dumps(sweep_json(make_sweep(tmp_path, per_group=1)), allow_nan=False)
    assert json.loads(text)["importance"]["r2"] is None
    assert json.loads(text)["advice"].startswith("On 50% of the training images train joint")


# ------------------------------------------------------------------------------------------------- advice


def test_the_lead_of_a_setting_has_welchs_interval() -> None:
    from scipy.stats import ttest_ind

    ours, theirs = (61.0, 63.5, 60.2), (58.0, 60.5)
    found = lead(ours, theirs, "joint")
    interval = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert found.points == pytest.approx(sum(ours) / 3 - 59.25)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert not found.sure
    assert lead((60.0, 60.1), (50.0, 50.1), "vit").sure
    assert lead((60.0,), (50.0, 50.2), "vit").text() == "9.9 over vit (one seed: no interval)"


def test_a_sweep_says_in_a_sentence_what_to_do(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path, per_group=3)
    document = json.loads((folder / "sweep.json").read_text())
    guess = {"fraction": 1.0, "top1": 71.0, "low": 68.5, "high": 73.0}
    document["curves"] = [{"line": "method=joint", "points": [], "all_images": guess}]
    (folder / "sweep.json").write_text(json.dumps(document))
    sweep = read_sweep(folder)
    assert list(choices(sweep)) == [0.05, 0.5]
    said = advice(sweep)
    # joint at 50%: index 2, 20 + 20 + 6 + 8 - 100 * 0.004, and its repeat at 51; vit the same less 8, and 51
    assert said.startswith("On 50% of the training images train joint with kd=0.04, lr=0.004: its lead in held-")
    assert "accuracy is 4.0 over vit (95% interval" in said
    assert "), the lead over vit may be chance; with all images" in said
    assert "with all images its fraction curve predicts 71.0% (95% interval 68.5 to 73.0) held out" in said
    assert said.endswith("the sweep cost 18 trials, 0.01 CPU hours and 0.0025 GPU hours.")
    assert said.count(". ") == 0


# --------------------------------------------------------------------------------------------------- cells


def test_columns_of_numbers_are_known_and_durations_have_their_own_order() -> None:
    assert numeric(["1.5 (n=2)", "–", "-3", "5%", Sized("2 s", 2.0)])
    assert numeric(["53.00 ± 3.00 (n=3)", "95.14 (n=1) [94.90]"])
    assert not numeric(["–", ""])
    assert not numeric(["13 finished", "4"])
    assert not numeric(["3rd", "4"])
    assert text_of(seconds_cell(90)) == "90 s"
    hours, seconds = seconds_cell(9000), seconds_cell(100)
    assert isinstance(hours, Sized)
    assert isinstance(seconds, Sized)
    assert (hours.text, seconds.text) == ("2.5 h", "100 s")
    assert hours.order > seconds.order


def test_a_broken_or_empty_sweep_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    for text in ("{", '{"name": "s"}', '{"name": "s", "status": "running", "trials": [], "best": {}}'):
        path.write_text(text)
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_sweep(tmp_path)
