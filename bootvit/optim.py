"""Learning rates, decay, optimisers, clipping and sharpness-aware minimisation, as functions of plain numbers."""

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from math import cos, floor, pi
from typing import Any

import torch
from torch import Tensor, nn

from bootvit.config import Network, OptimConfig, ScheduleConfig
from bootvit.errors import UserError

Group = dict[str, Any]  # parameters of one optimiser with settings of their own


def learning_rate(schedule: ScheduleConfig, base: float, epoch: float) -> float:
    """The rate at a time of `epoch` epochs from the start: base (1 + cos(pi e / period)) / 2 times the warm-up."""
    if schedule.per == "epoch":
        epoch = floor(epoch)
    rate = base
    if schedule.kind == "cosine":
        rate = base * (1 + cos(pi * epoch / (schedule.period or schedule.epochs))) / 2
    if epoch < schedule.warmup_epochs:
        done = epoch / schedule.warmup_epochs
        rate *= (
            schedule.warmup_factor * (1 - done) + done if schedule.warmup_mode == "linear" else schedule.warmup_factor
        )
    return rate


def linear_decay(epoch: int, epochs: int) -> float:
    """The hint's decay: 1 in the first epoch, 1 / epochs in the last, constant within an epoch."""
    return max(0.0, 1 - epoch / epochs)


def network_optim(optim: OptimConfig, network: Network, joint: bool) -> OptimConfig:
    """The settings of one network's optimiser: in joint training the agent's own ones override."""
    if network != "agent" or not joint:
        return optim
    given = {k: v for k, v in optim.agent.model_dump().items() if v is not None}
    if given.get("clip_norm") == "none":
        given["clip_norm"] = None
    return optim.model_copy(update=given)


def network_schedule(schedule: ScheduleConfig, network: Network, joint: bool) -> ScheduleConfig:
    """One network's course of the learning rate: in joint training the agent's own settings override."""
    if network != "agent" or not joint:
        return schedule
    return schedule.model_copy(update={k: v for k, v in schedule.agent.model_dump().items() if v is not None})


def build_optimizer(parameters: Iterable[nn.Parameter] | list[Group], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD, fused: one pass over memory, on the CPU and on CUDA; or another optimiser of timm by its name."""
    lr, decay, momentum = optim.lr, optim.weight_decay, optim.momentum
    if optim.name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay, fused=True)
    if optim.name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, fused=True)
    from timm.optim import create_optimizer_v2

    made: torch.optim.Optimizer = create_optimizer_v2(
        list(parameters), opt=optim.name, lr=lr, weight_decay=decay, momentum=momentum
    )
    return made


def parameter_groups(module: nn.Module, optim: OptimConfig, only: set[nn.Parameter]) -> list[Group]:
    """timm's groups of those of a network's parameters that are in `only`: rates by layer, no decay on vectors."""
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    spared: Callable[[], set[str]] = getattr(module, "no_weight_decay", set)  # tokens and position tables
    tokens = set() if optim.decay_vectors else spared()
    given = {"weight_decay": optim.weight_decay, "no_weight_decay_list": tokens}
    given["weight_decay_exclude_1d"] = not optim.decay_vectors
    if optim.layer_decay is not None:
        groups = param_groups_layer_decay(module, layer_decay=optim.layer_decay, **given)
    else:
        groups = param_groups_weight_decay(module, **given)
    mine = [group | {"params": [p for p in group["params"] if p in only]} for group in groups]
    return [group for group in mine if group["params"]]


def check_optimizer(key: str, optim: OptimConfig) -> None:
    """Raise `UserError` unless an optimiser of this name can take a step."""
    if optim.name in ("adamw", "sgd"):
        return
    from timm.optim import list_optimizers

    if optim.name not in list_optimizers():
        near = get_close_matches(optim.name, ["adamw", "sgd", *list_optimizers()], n=1)
        raise UserError(
            f"{key}={optim.name!r}: expected adamw, sgd or an optimiser of timm"
            + (f"; the nearest is {near[0]!r}" if near else "")
        )
    if optim.name.startswith("kron"):  # its first step compiles, for minutes
        raise UserError(f"{key}={optim.name!r}: not used here, because it compiles itself first; use muon or adamw")
    try:
        weight = nn.Parameter(torch.zeros(2, 2))
        weight.grad = torch.ones(2, 2)
        build_optimizer([weight], optim).step()
    except (Exception, SystemExit) as err:  # what they need and lack, they say in ways that have no class in common
        reason = " ".join(str(err).split())[:150] or type(err).__name__
        raise UserError(f"{key}={optim.name!r}: timm's optimiser cannot be used here: {reason}") from err


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scale the gradients of `parameters` together to an L2 norm of at most `max_norm`."""
    nn.utils.clip_grad_norm_(parameters, max_norm)


@torch.no_grad()
def climb(parameters: Sequence[nn.Parameter], rho: float) -> list[Tensor]:
    """Move the weights by rho g / (|g| + 1e-12), SAM's ascent (Foret et al., 2021, eq. 2); returns the old weights."""
    old = [p.detach().clone() for p in parameters]
    moved = [(p, p.grad) for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([grad for _, grad in moved])
    for p, grad in moved:
        p.add_(grad * (rho / (norm + 1e-12)))
    return old


@torch.no_grad()
def put_back(parameters: Sequence[nn.Parameter], old: Sequence[Tensor]) -> None:
    """Restore the weights that `climb` returned."""
    for p, value in zip(parameters, old, strict=True):
        p.copy_(value)
