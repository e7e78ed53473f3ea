"""Every shipped sweep file is read, and every trial of it is checked against the schema and the models."""

from collections import Counter
from pathlib import Path

import pytest

from bootvit.config import SHIPPED
from tune.run.capacity import check_resources
from tune.spec.load import load_sweep
from tune.spec.space import check_space, planned_settings, trial_config

SWEEPS = sorted((SHIPPED / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_trial_can_be_built(path: Path) -> None:
    sweep = load_sweep(f"sweeps/{path.stem}")
    assert sweep.file.name == path.stem
    assert len(check_space(sweep)) > 1
    check_resources(sweep)


def test_the_imagenet_sweep_follows_the_rows_of_the_paper() -> None:
    """With the paper's hint weight each method's trial is the row's shipped config, but for what a sweep decides."""
    from bootvit.config import flatten
    from bootvit.load import load_config

    sweep = load_sweep("sweeps/imagenet-fractions")
    rows = {"vit": "vit-base", "joint": "joint-base", "shared": "shared-base", "agent": "agent-base-resnet"}
    unused = {
        "vit": ("model.agent.", "objective.", "optim.agent."),
        "agent": ("objective.", "optim.agent."),
        "shared": ("optim.agent.",),
        "joint": (),
    }
    decided = ("name", "ray.", "data.fraction", "data.held_out", "schedule.eval_every", "tracking.")
    seen = Counter()
    for setting in planned_settings(sweep):
        method = setting["method"]
        if setting.get("objective.vit.hint", 0) not in {"joint": (10,), "shared": (5,)}.get(method, (0,)):
            continue
        trial, row = (flatten(c) for c in (trial_config(sweep, setting, 0), load_config(f"imagenet/{rows[method]}")))
        ignored = (*decided, *unused[method])
        assert {k: v for k, v in trial.items() if not k.startswith(ignored)} == {
            k: v for k, v in row.items() if not k.startswith(ignored)
        }, method
        seen[method] += 1
    assert seen == {"vit": 3, "joint": 3, "shared": 3, "agent": 3}


def test_quirks_are_varied_one_at_a_time() -> None:
    sweep = load_sweep("sweeps/quirks")
    ours = {
        "model.init": "timm",
        "optim.clip_when": "every",
        "schedule.per": "step",
        "data.fraction_rule": "nested",
        "model.agent.value_bias": True,
    }
    changed = [
        [key for key, value in setting.items() if key in ours and value != ours[key]]
        for setting in planned_settings(sweep)
    ]
    assert all(len(keys) <= 1 for keys in changed)
    assert Counter(map(tuple, changed))[()] == 3
