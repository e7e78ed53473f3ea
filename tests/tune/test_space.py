"""Sweep files: what is refused, and which trials a space makes."""

from pathlib import Path
from typing import Any

import pytest
from tiny_sweeps import make_sweep, sweep_file

from bootvit.config import SHIPPED
from bootvit.errors import UserError
from cluster.capacity import trials_at_once
from tune.run.capacity import check_resources
from tune.spec.load import load_sweep
from tune.spec.schema import get
from tune.spec.space import check_space, group_name, label, make_specs, planned_settings, sample, trial_config

KD = "objective.vit.kd"


def test_a_grid_is_every_combination_in_the_order_of_the_file(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={"method": {"grid": ["vit", "joint"]}, "data.fraction": {"grid": [0.1, 0.5]}})
    assert planned_settings(sweep) == [
        {"method": "vit", "data.fraction": 0.1},
        {"method": "vit", "data.fraction": 0.5},
        {"method": "joint", "data.fraction": 0.1},
        {"method": "joint", "data.fraction": 0.5},
    ]


def test_a_condition_leaves_a_key_out_where_it_does_not_hold(tmp_path: Path) -> None:
    space = {KD: {"grid": [0.5, 1.0], "when": {"method": ["joint", "shared"]}}, "method": {"grid": ["vit", "joint"]}}
    sweep = make_sweep(tmp_path, space=space)
    assert planned_settings(sweep) == [
        {"method": "vit"},
        {"method": "joint", KD: 0.5},
        {"method": "joint", KD: 1.0},
    ]


def test_a_key_may_have_other_values_under_other_conditions(tmp_path: Path) -> None:
    hint = [{"grid": [5], "when": {"method": "shared"}}, {"grid": [10, 20], "when": {"method": "joint"}}]
    space = {"objective.vit.hint": hint, "method": {"grid": ["vit", "joint", "shared"]}}
    found = [(s["method"], s.get("objective.vit.hint")) for s in planned_settings(make_sweep(tmp_path, space=space))]
    assert found == [("vit", None), ("joint", 10), ("joint", 20), ("shared", 5)]


def test_a_condition_may_ask_for_a_key_of_the_base(tmp_path: Path) -> None:
    space = {"optim.lr": {"grid": [1e-3, 2e-3]}, KD: {"grid": [0.5, 1.0], "when": {"method": "vit"}}}
    assert planned_settings(make_sweep(tmp_path, space=space)) == [{"optim.lr": 1e-3}, {"optim.lr": 2e-3}]


def test_equal_trials_are_run_once(tmp_path: Path) -> None:
    space = {"method": {"grid": ["vit", "joint"]}, KD: {"uniform": [0.1, 1.0], "when": {"method": "joint"}}}
    sweep = make_sweep(tmp_path, space=space, search={"samples": 3})
    found = planned_settings(sweep)
    assert [s["method"] for s in found] == ["vit", "joint", "joint", "joint"]
    repeated = make_sweep(tmp_path, space={KD: {"grid": [1, 1.0]}})
    assert len(planned_settings(repeated)) == 1


def test_draws_are_the_same_in_every_cell_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    space = {"data.fraction": {"grid": [0.1, 0.5]}, KD: {"loguniform": [0.01, 1.0]}}
    sweep = make_sweep(tmp_path, space=space, search={"samples": 2, "seed": 5})
    first, second = (list(sample(sweep, number)) for number in (0, 1))
    assert first[0][KD] == first[1][KD] != second[0][KD] == second[1][KD]
    wider = make_sweep(tmp_path, space={"optim.lr": {"grid": [1e-3, 2e-3]}, **space}, search={"samples": 9, "seed": 5})
    assert next(sample(wider, 0))[KD] == first[0][KD]
    other = make_sweep(tmp_path, space=space, search={"samples": 2, "seed": 6})
    assert next(sample(other, 0))[KD] != first[0][KD]


@pytest.mark.parametrize(
    ("domain", "inside"),
    [
        ({"uniform": [0.2, 0.4]}, lambda v: 0.2 <= v <= 0.4),
        ({"loguniform": [0.001, 10]}, lambda v: 0.001 <= v <= 10),
        ({"choice": [0.1, 0.7]}, lambda v: v in (0.1, 0.7)),
    ],
    ids=["uniform", "loguniform", "choice"],
)
def test_draws_stay_in_their_domain(tmp_path: Path, domain: dict[str, Any], inside: Any) -> None:
    sweep = make_sweep(tmp_path, space={KD: domain})
    values = [next(sample(sweep, number))[KD] for number in range(200)]
    assert all(map(inside, values))
    assert len(set(values)) > 1


def test_whole_numbers_reach_both_ends(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={"schedule.epochs": {"randint": [2, 4]}})
    assert {next(sample(sweep, number))["schedule.epochs"] for number in range(60)} == {2, 3, 4}


def test_trials_have_a_seed_a_group_and_a_name(tmp_path: Path) -> None:
    space = {"data.fraction": {"grid": [0.1, 0.5]}, KD: {"grid": [1.0, 2.0]}}
    sweep = make_sweep(tmp_path, space=space, seeds=[3, 4])
    specs = make_specs(sweep, [(s, seed) for s in planned_settings(sweep) for seed in sweep.seeds], 0)
    assert [spec.seed for spec in specs] == [3, 4] * 4
    assert specs[0].id == "0000-fraction=0.1,kd=1,seed=3"
    assert specs[0].group == "data.fraction=0.1 method=joint"
    assert len({spec.id for spec in specs}) == 8
    config = trial_config(sweep, specs[-1].overrides, specs[-1].seed, specs[-1].id)
    assert (config.data.fraction, config.objective.vit.kd, config.seed) == (0.5, 2.0, 4)
    assert config.run_dir == sweep.folder / "trials" / specs[-1].id
    by_seed = make_sweep(tmp_path, space=space, group_by=["seed"])
    assert group_name(by_seed, config) == "seed=4"


def test_a_name_shows_the_values_that_differ(tmp_path: Path) -> None:
    """Not those that are the same in all trials; two keys with one ending are told apart; the seed is always there."""
    space = {KD: {"loguniform": [0.1, 1]}, "objective.agent.kd": {"grid": [1, 2]}, "optim.lr": {"grid": [0.001]}}
    setting = {KD: 0.123456, "objective.agent.kd": 2, "optim.lr": 0.001}
    assert label(make_sweep(tmp_path, space=space), setting, 7) == "vit.kd=0.1235,agent.kd=2,seed=7"
    weights = {"model.vit.weights": {"grid": ["/a folder/" + "x" * 200, "b"]}}
    long = label(make_sweep(tmp_path, space=weights), {"model.vit.weights": "/a folder/" + "x" * 200}, 12)
    assert (len(long), long[:18], long[-9:]) == (100, "weights=_a_folder_", "xxseed=12")


def test_a_sweep_holds_images_out_even_where_its_base_does_not(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: s\nbase: digits/joint\nspace: {objective.vit.kd: {grid: [1, 2]}}\n")
    assert load_sweep(str(path)).base.data.held_out == 0.1
    assert load_sweep(str(path), ["data.held_out=0.3"]).base.data.held_out == 0.3


def test_a_base_that_is_nowhere_is_named_with_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("method: vit")  # where the command is started, not beside the file
    path = tmp_path / "sub" / "s.yaml"
    path.parent.mkdir()
    path.write_text("name: s\nbase: mine.yaml\nspace: {objective.vit.kd: {grid: [1, 2]}}\n")
    with pytest.raises(UserError, match=r"s.yaml: base 'mine.yaml': neither the file .*sub/mine.yaml nor a shipped"):
        load_sweep(str(path))


def test_keys_go_to_the_sweep_or_to_the_base(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, space={KD: {"grid": [1.0, 2.0]}})
    overrides = ["name=other", "seeds=[1, 2]", "space.objective.vit.kd.grid=[3]", "schedule.epochs=7", "seed=9"]
    sweep = load_sweep(str(path), overrides)
    assert (sweep.file.name, sweep.seeds) == ("other", (1, 2))
    assert (sweep.base.schedule.epochs, sweep.base.seed) == (7, 9)
    assert planned_settings(sweep) == [{KD: 3}]


def test_files_extend_one_another_and_a_base_is_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text(f"extends: {SHIPPED / 'digits' / 'vit.yaml'}\nseed: 11\n")
    (tmp_path / "parent.yaml").write_text("name: p\nbase: base.yaml\nspace:\n  data: {fraction: {grid: [0.1]}}\n")
    child = tmp_path / "deep" / "child.yaml"
    child.write_text("extends: ../parent.yaml\nname: c\nspace:\n  optim.lr: {grid: [0.001, 0.002]}\n")
    sweep = load_sweep(str(child))
    assert (sweep.file.name, sweep.base.seed, sweep.base.method) == ("c", 11, "vit")
    assert list(sweep.file.space) == ["data.fraction", "optim.lr"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"space": {}}, ["space is empty"]),
        ({"space": {KD: {"grid": []}}}, [KD, "grid is empty"]),
        ({"space": {KD: {}}}, [f"space.{KD}=", "exactly one of"]),
        ({"space": {KD: []}}, [KD, "empty"]),
        ({"space": {KD: {"gird": [1]}}}, [KD, "unknown word 'gird'"]),
        ({"space": {KD: {"uniform": ["a", 1]}}}, [f"space.{KD}.uniform", "number"]),
        ({"space": {KD: {"grid": [1], "choice": [2]}}}, [KD, "grid and choice"]),
        ({"space": {KD: {"loguniform": [0, 1]}}}, [KD, "above 0"]),
        ({"space": {KD: {"uniform": [2, 1]}}}, [KD, "above the upper end"]),
        ({"space": {"objective.vit.kdd": {"grid": [1]}}}, ["unknown key 'objective.vit.kdd'", "objective.vit.kd"]),
        ({"space": {KD: {"grid": [1, -1]}}}, [f"{KD}=-1", "greater than or equal to 0"]),
        ({"space": {"data.fraction": {"uniform": [0.1, 1.5]}}}, ["data.fraction=1.5"]),
        ({"space": {"model.vit.heads": {"grid": [9, 5]}}}, ["5", "width"]),
        ({"space": {"method": {"grid": ["vit", "jiont"]}}}, ["method", "jiont"]),
        ({"space": {"seed": {"grid": [1]}}}, ["seeds"]),
        ({"space": {"ray.num_workers": {"grid": [1, 2]}}}, ["cannot be searched"]),
        ({"space": {KD: {"grid": [1], "when": {"methd": "vit"}}}}, ["unknown key 'methd'", "method"]),
        ({"space": {KD: {"grid": [1]}}, "seedz": [0]}, ["unknown key 'seedz'", "seeds"]),
        ({"space": {KD: {"grid": [1]}}, "seeds": []}, ["seeds", "at least one"]),
        ({"space": {KD: {"grid": [1]}}, "group_by": ["data.fractoin"]}, ["group_by", "data.fraction"]),
        ({"space": {KD: {"grid": [1]}}, "select": {"metric": "test.vit.top1"}}, ["select.metric"]),
        ({"space": {KD: {"uniform": [0, 1]}}, "search": {"algorithm": "grid"}}, ["algorithm=grid", KD]),
        ({"space": {KD: {"grid": [1]}}, "search": {"algorithm": "optuna"}}, ["nothing to choose"]),
        ({"space": {KD: {"grid": [1]}}, "fidelity": "data.fraction"}, ["fidelity", "grid"]),
        (
            {"space": {KD: {"grid": [1]}}, "scheduler": {"name": "asha", "grace_epochs": 4}},
            ["grace_epochs=4", "epochs=3"],
        ),
        (
            {
                "space": {KD: {"grid": [1]}},
                "scheduler": {"name": "asha", "grace_epochs": 3},
                "set": {"schedule.epochs": 8, "schedule.eval_every": 2},
            },
            ["grace_epochs=3", "eval_every=2", "such as 4"],
        ),
        (
            {
                "space": {KD: {"uniform": [0, 1]}},
                "search": {"algorithm": "pbt", "samples": 4, "interval": 2},
                "set": {"schedule.epochs": 8, "schedule.eval_every": 3},
            },
            ["search.interval=2", "eval_every=3", "3 or more"],
        ),
        (
            {"space": {KD: {"grid": [1]}}, "select": {"metric": "held_out.vit.loss", "mode": "max"}},
            ["mode=max", "smaller is better"],
        ),
        ({"space": {KD: {"grid": [1]}}, "callbacks": ["no colon"]}, ["callbacks"]),
        ({"space": {KD: {"grid": [1]}}, "set": {KD: 1}}, ["set.objective.vit.kd"]),
        ({"space": {KD: {"grid": [1]}}, "set": {"optim.lrr": 1}}, ["optim.lrr", "optim.lr"]),
        ({"space": {KD: {"grid": [1]}}, "resources": {"gpu": 1.5}}, ["resources.gpu=1.5"]),
        ({"space": {KD: {"grid": [1]}}, "base": "digits/jiont"}, ["digits/jiont", "digits/joint"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_line(tmp_path: Path, content: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_everything(tmp_path, content)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def check_everything(folder: Path, content: dict[str, Any]) -> None:
    """What the command does before it starts anything."""
    sweep = make_sweep(folder, **content)
    check_space(sweep)
    check_resources(sweep)


def test_conditions_in_a_circle_are_refused(tmp_path: Path) -> None:
    space = {"optim.lr": {"grid": [1.0], "when": {KD: 1}}, KD: {"grid": [1], "when": {"optim.lr": 1.0}}}
    with pytest.raises(UserError, match="depends on itself"):
        check_space(make_sweep(tmp_path, space=space))


def test_the_ends_of_ranges_are_checked_in_every_cell(tmp_path: Path) -> None:
    fine = make_sweep(tmp_path, space={"model.vit.depth": {"grid": [2, 3]}, KD: {"uniform": [0.25, 0.5]}})
    seen = {(c.model.vit.depth, get(c, KD)) for c in check_space(fine)}
    assert {(2, 0.25), (2, 0.5), (3, 0.25), (3, 0.5)} <= seen


@pytest.mark.parametrize(
    ("nodes", "gpu", "cpu", "expected"),
    [
        ([{"CPU": 2.0}], 0, 1, 2),
        ([{"CPU": 2.0}], 1, 1, 0),
        ([{"CPU": 8.0, "GPU": 1.0}], 0.25, 1, 4),
        ([{"CPU": 3.0, "GPU": 2.0}], 0.5, 1, 3),
        ([{"CPU": 1.0}, {"CPU": 1.0}], 0, 2, 0),
        ([{"CPU": 4.0}], 0, 0.5, 8),
        ([{"CPU": 8.0, "GPU": 4.0}], 0.6, 1, 4),
        ([{"CPU": 32.0, "GPU": 2.0}], 0.1, 1, 20),
    ],
)
def test_how_many_trials_fit(
    tmp_path: Path, nodes: list[dict[str, float]], gpu: float, cpu: float, expected: int
) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1]}}, resources={"cpu": cpu, "gpu": gpu})
    assert trials_at_once(sweep, nodes) == expected


def test_the_workers_of_a_trial_may_be_on_several_nodes(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1]}}, set={"ray.num_workers": 2})
    assert trials_at_once(sweep, [{"CPU": 1.0}, {"CPU": 1.0}]) == 1
    assert trials_at_once(sweep, [{"CPU": 5.0}]) == 2
