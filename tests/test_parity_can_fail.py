"""The parity tests can fail: a perturbed tensor, loss weight, schedule, name or setting is noticed."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PARITY = Path(__file__).parent / "parity"
sys.path.insert(0, str(PARITY))

from parity_kit import Case, ParityError, as_case, read_case  # noqa: E402
from test_parity import run_case  # noqa: E402


def changed(name: str, change: Callable[[Any, dict[str, torch.Tensor]], None]) -> Case:
    """A committed case with a change in its facts or tensors."""
    case = read_case(PARITY / "cases", name)
    facts, tensors = copy.deepcopy(case.facts), dict(case.tensors)
    change(facts, tensors)
    return as_case(name, facts, tensors)


def nudge(key: str, by: float = 1e-6) -> Callable[[Any, dict[str, torch.Tensor]], None]:
    """Move the last element of a tensor."""

    def change(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        moved = tensors[key].clone()
        moved.view(-1)[-1] += by
        tensors[key] = moved

    return change


def assign(path: str, value: Any) -> Callable[[Any, dict[str, torch.Tensor]], None]:
    """Set a value of the facts."""

    def change(facts: Any, _: dict[str, torch.Tensor]) -> None:
        *parents, last = path.split("/")
        for key in parents:
            facts = facts[int(key) if isinstance(facts, list) else key]
        facts[last] = value

    return change


def drop(key: str) -> Callable[[Any, dict[str, torch.Tensor]], None]:
    """Take a recorded tensor away."""

    def change(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    return change


def add(key: str) -> Callable[[Any, dict[str, torch.Tensor]], None]:
    """Record something that nothing computes."""

    def change(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = torch.zeros(1)

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vit_entmax", nudge("state.transformer.layers.1.attention.softmax.alpha", 1e-4)),
        ("vit_entmax", nudge("grad.cls_token")),
        ("deit", nudge("state.dist_token", 1e-3)),
        ("deit", assign("config/model/transformer/norm_eps", 1e-6)),
        ("agent_base_res_like", nudge("after_train_forward.bn.running_var")),
        ("agent_base_res_like", assign("config/model/pre_norm", True)),
        ("agent_base_res_like", assign("config/model/down_sample_layers", [0, 2])),
        ("joint", assign("config/loss/weight_dict/hint_vit", 10.001)),
        ("joint", assign("config/loss/kd_temp", 3.9)),
        ("joint", assign("config/training/decay_strategy/use_decay", False)),
        ("joint", nudge("output.feature.vit.transformer.layers.0")),
        ("joint", drop("grad.vit_total.models.vit.cls_token")),
        ("joint", add("output.something_else")),
        ("trajectory_shared", assign("config/training/lr_schedule/T_max", 4)),
        ("trajectory_shared", assign("config/training/optimizer/weight_decay", 0.051)),
        ("trajectory_shared", assign("config/mutual/cfg/joint/clip_max_norm", 0.11)),
        ("trajectory_shared", assign("scalars/steps/5/param_norm", 35.1)),
        ("trajectory_shared", nudge("final.models.vit.cls_token")),
        ("unit_ops", nudge("input.shared9.qkv_weight", 1e-3)),
        ("data_fraction", assign("scalars/picks/class0_n20_f0.1", [19, 4])),
        ("refuse_even_window", assign("config/model/conv_block/num_heads", 6)),
        ("joint", assign("case", "something")),
    ],
)
def test_a_change_is_noticed(name: str, change: Callable[[Any, dict[str, torch.Tensor]], None]) -> None:
    with pytest.raises(ParityError):
        run_case(changed(name, change))


def test_a_wrong_number_of_parameters_is_noticed() -> None:
    def change(facts: Any, _: dict[str, torch.Tensor]) -> None:
        facts["models"] = {"vit/vit-small": facts["models"]["vit/vit-small"]}
        facts["models"]["vit/vit-small"]["parameters_by_num_classes"]["100"] += 1

    with pytest.raises(ParityError, match="parameters"):
        run_case(changed("model_sizes", change))
