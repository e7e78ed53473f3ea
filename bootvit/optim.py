"""Learning rates, decay, optimisers, clipping and sharpness-aware minimisation, as functions of plain numbers."""

from collections.abc import Iterable, Sequence
from math import cos, floor, pi

import torch
from torch import Tensor, nn

from bootvit.config import Network, OptimConfig, ScheduleConfig


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


def build_optimizer(parameters: Iterable[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (decay on every parameter, as in the paper) or SGD; fused: one pass over memory, on the CPU and on CUDA."""
    if optim.name == "sgd":
        decay, momentum = optim.weight_decay, optim.momentum
        return torch.optim.SGD(parameters, lr=optim.lr, momentum=momentum, weight_decay=decay, fused=True)
    return torch.optim.AdamW(parameters, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)


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
