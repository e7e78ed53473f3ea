"""The kit's two files about the shipped sizes: parameters and FLOPs, and the statistics of fresh weights."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from parity_kit import NAMES, Case, ParityError

from bootvit.config import override
from bootvit.learner import Networks
from bootvit.models.sizes import ROWS, Size, row_config, size_of
from bootvit.reference import WeightNames

ROW_OF = {  # the kit's name of a size: ours, where it is not what follows the slash
    "cnn/agent-small-res_like": "agent-small-resnet",
    "cnn/agent-base-res_like": "agent-base-resnet",
    "vit/vit-small-entmax": "vit-small-sparse",
    "vit/vit-base-entmax": "vit-base-sparse (as shipped)",
    "joint/agent-small-vit-small": "joint-small",
    "joint/agent-small-res_like-vit-small": "joint-small-resnet",
    "joint/agent-base-res_like-vit-base": "joint-base-resnet",
    "shared/agent-small-vit-small": "shared-small",
    "shared/agent-small-res_like-vit-small": "shared-small-resnet",
    "shared/agent-base-res_like-vit-base": "shared-base-resnet",
}
FOUR_DECIMALS = 5.1e-5


def row_of(case: Case, name: str) -> str:
    """Our row for one of the kit's sizes."""
    row = ROW_OF.get(name, name.rsplit("/", maxsplit=1)[-1])
    if row not in ROWS:
        raise ParityError(f"{case.name}: there is no row for {name!r}")
    return row


def run_sizes(case: Case) -> None:
    """Parameters exactly, GFLOPs to the four decimals that are recorded."""
    for name, facts in case.facts["models"].items():
        row = row_of(case, name)
        compare_size(case, name, size_of(row, row_config(row)), facts)


def compare_size(case: Case, name: str, size: Size, facts: dict[str, Any]) -> None:
    """One row."""
    case.equal(f"{name}: parameters", size.parameters, facts["parameters_by_num_classes"])
    whole = sum(size.gflops_plain_convolution.values())
    expected = facts.get("both_networks", facts)["gflops_plain_convolution"]
    case.equal(f"{name}: GFLOPs to four decimals", abs(whole - expected) <= FOUR_DECIMALS, True)
    for net, gflops in size.gflops_plain_convolution.items() if "cnn_alone" in facts else ():
        alone = facts[f"{NAMES[net]}_alone"]["gflops_plain_convolution"]
        case.equal(f"{name}: {net}'s GFLOPs", abs(gflops - alone) <= FOUR_DECIMALS, True)
        own = facts["parameters_100_classes"][NAMES[net]]
        case.equal(f"{name}: {net}'s parameters", size.own_parameters[net], own)


def run_init_stats(case: Case) -> None:
    """Mean and deviation of every kind of weight, as far as the number of values tells them."""
    for name, weights in case.facts["models"].items():
        config = override(row_config(row_of(case, name)), {"model": {"init": "reference"}})
        torch.manual_seed(0)
        networks = Networks(config, 100)
        state = dict(networks.named_parameters())
        names = WeightNames(config)
        for key, facts in weights.items():
            ours = [state[names.ours(key.replace("*", str(i)))].detach() for i in range(facts["tensors"])]
            compare_statistics(case, f"{name}: {key}", ours, facts)


def compare_statistics(case: Case, what: str, tensors: list[torch.Tensor], facts: dict[str, Any]) -> None:
    """Six deviations of the estimate, for both sides' chance."""
    case.equal(f"{what}: values", tensors[0].numel(), torch.Size(facts["shape"]).numel())
    values = torch.stack([tensor.flatten() for tensor in tensors]).double().flatten()
    std = float(values.std(correction=0))
    chance = 6 * sqrt(2 / len(values))
    if abs(float(values.mean()) - facts["mean"]) > chance * facts["std"] + 1e-6:
        raise ParityError(f"{case.name}: {what}: mean {float(values.mean()):.4g}, recorded {facts['mean']}")
    if abs(std - facts["std"]) > (chance + 2e-3) * facts["std"]:
        raise ParityError(f"{case.name}: {what}: deviation {std:.4g}, recorded {facts['std']}")
    bounded = len(values) > 10_000 and facts["max"] < 1.8 * facts["std"]  # uniform values end at 1.73 deviations
    if bounded and float(values.abs().max()) > 1.8 * facts["std"]:
        raise ParityError(f"{case.name}: {what}: {float(values.abs().max()):.4g} is beyond the uniform bounds")
