"""The networks, their objective and their optimisers: one training step, the same for every method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bootvit.checkpoint import optimizer_state, restore_optimizer
from bootvit.config import Config, Network, OptimConfig, ScheduleConfig
from bootvit.data.batches import Batch
from bootvit.errors import RunFailed
from bootvit.measures import Tally
from bootvit.models import Features
from bootvit.models.agent import TimmCNN
from bootvit.models.checks import parts_of
from bootvit.models.dropout import use_byte_dropout
from bootvit.models.sync import synchronise_norms
from bootvit.models.vit import vit_features
from bootvit.models.zoo import build_agent, build_vit
from bootvit.objective import LossTerms, loss_terms, mean_terms, total_loss
from bootvit.optim import (
    Group,
    build_optimizer,
    climb,
    clip,
    learning_rate,
    linear_decay,
    network_optim,
    network_schedule,
    parameter_groups,
    put_back,
)
from bootvit.predictions import Answers, first_five

# of weights; bf16 and fp16 are autocast
PRECISIONS = {"fp32": torch.float32, "bf16": torch.float32, "fp16": torch.float32, "fp64": torch.float64}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# what makes DDP send buffers with every step, which ours have no need of; torch 2.14 has another name for it
DDP_ARGUMENTS = signature(DistributedDataParallel).parameters
OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in DDP_ARGUMENTS else "broadcast_buffers": False
}


class World(NamedTuple):
    """This process's place among the workers."""

    rank: int
    size: int
    device: torch.device


class Networks(nn.Module):
    """The networks of one run. Its forward is a whole step's computation, so that DDP and compile see one graph."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.vit = build_vit(config, num_classes) if "vit" in config.networks else None
        self.agent = build_agent(config, num_classes, self.vit) if "agent" in config.networks else None
        self.class_weights: Tensor | None  # (classes,) of the cross entropy
        self.register_buffer("class_weights", None, persistent=False)

    def features(self, images: Tensor) -> dict[Network, Features]:
        """Every network's features of `images` (batch, 3, rows, cols)."""
        images = images.to(next(self.parameters()).dtype, memory_format=torch.channels_last)  # convolutions prefer it
        out: dict[Network, Features] = {}
        if self.vit is not None:
            out["vit"] = vit_features(self.vit, images)
        if self.agent is not None:
            out["agent"] = self.agent(images)
        return out

    def forward(self, images: Tensor, labels: Tensor) -> dict[Network, LossTerms]:
        """Every network's loss terms, undecayed."""
        features = self.features(images)
        peer: dict[Network, Network] = {"vit": "agent", "agent": "vit"}
        objective = self.config.objective
        return {
            net: loss_terms(
                own, features.get(peer[net]), labels, getattr(objective, net), objective, self.class_weights
            )
            for net, own in features.items()
        }

    def own_parameters(self, network: Network) -> list[nn.Parameter]:
        """The parameters of one network; those that both use belong to the ViT."""
        module = self.vit if network == "vit" else self.agent
        return list(module.parameters()) if module is not None else []

    def grouped(self, parameters: list[nn.Parameter], optim: OptimConfig) -> list[nn.Parameter] | list[Group]:
        """Some of the parameters as an optimiser takes them: with groups where the settings ask for them."""
        if optim.decay_vectors and optim.layer_decay is None:
            return parameters
        agent = self.agent.cnn if isinstance(self.agent, TimmCNN) else self.agent
        only = set(parameters)
        return [g for module in (self.vit, agent) if module is not None for g in parameter_groups(module, optim, only)]


class OptimGroup(NamedTuple):
    """One optimiser, its base rate, and the parameters that are clipped and climbed together."""

    optimizer: torch.optim.Optimizer
    base_lr: float
    schedule: ScheduleConfig
    clip_norm: float | None
    clipped: list[nn.Parameter]
    parameters: list[nn.Parameter]


class Learner:
    """Owns the networks and their optimisers."""

    def __init__(
        self, config: Config, num_classes: int, world: World, class_weights: Sequence[float] | None = None
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.world, self.num_classes = config, world, num_classes
        networks = Networks(config, num_classes).to(memory_format=torch.channels_last)
        if class_weights is not None:
            networks.class_weights = torch.tensor(class_weights)
        self.networks = networks.to(world.device, PRECISIONS[config.precision])
        if world.device.type == "cpu" and not config.compile:  # a compiler fuses torch's own into its kernels
            use_byte_dropout(self.networks)
        if config.model.agent.sync_norm and world.size > 1:
            self.networks = synchronise_norms(self.networks, world.device)
        self.groups = self._groups()
        decay = config.optim.ema
        self.ema = None if decay is None else ModelEmaV3(self.networks, decay, use_warmup=True)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.term_names = self._term_names()
        self._ddp = self._across_workers()
        forward: Any = self._ddp or self.networks
        self._forward = torch.compile(forward) if config.compile else forward

    # ------------------------------------------------------------------------------------------ set-up

    def _groups(self) -> list[OptimGroup]:
        """One optimiser a network in joint training; else one over all unique parameters."""
        nets = self.networks
        joint = self.config.method == "joint"
        if joint:
            owners = [(net, nets.own_parameters(net)) for net in self.config.networks]
        else:
            owners = [(self.config.networks[0], list(nets.parameters()))]
        groups = []
        for net, parameters in owners:
            optim = network_optim(self.config.optim, net, joint)
            only_vit = self.config.method == "shared" and optim.clip_scope == "vit"
            clipped = nets.own_parameters("vit") if only_vit else parameters
            groups.append(
                OptimGroup(
                    build_optimizer(nets.grouped(parameters, optim), optim),
                    optim.lr,
                    network_schedule(self.config.schedule, net, joint),
                    optim.clip_norm,
                    clipped,
                    parameters,
                )
            )
        return groups

    def _term_names(self) -> list[str]:
        """`net/term` of every term that is computed, then `net/loss`, in the order of `step`'s result."""
        paired = len(self.config.networks) == 2
        names = []
        for net in self.config.networks:
            weights = getattr(self.config.objective, net)
            terms = ("ce", "kd", "hint") if paired else ("ce",)
            names += [f"{net}/{t}" for t in terms if getattr(weights, t)] + [f"{net}/loss"]
        return names

    def _across_workers(self) -> DistributedDataParallel | None:
        if self.world.size == 1:
            return None
        idle = self.config.objective.vit.kd == 0 or len(self.config.networks) == 1  # a DeiT's second head
        return DistributedDataParallel(
            self.networks,
            device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
            **OWN_BUFFERS,
            gradient_as_bucket_view=True,  # gradients are where they are reduced: no copies
            find_unused_parameters=idle and getattr(self.networks.vit, "head_dist", None) is not None,
        )

    # ------------------------------------------------------------------------------------------ a step

    def step(self, batch: Batch, step: int, epoch: int, progress: float) -> Tensor:
        """One update from this worker's part of the batch.

        `step` counts from the start of training; `progress` is the time in epochs, for the learning rate. Returns
        this worker's share of the terms of `term_names`, (terms,): summed over the workers it is the batch's mean.
        """
        seed_from(self.config.seed, step, self.world.rank)  # dropout needs no saved generator state
        self.networks.train()
        share = len(batch.labels) / batch.global_size
        terms, losses = self._backward(batch, share, epoch)
        if self.config.optim.sam_rho is not None:
            old = [climb(group.parameters, self.config.optim.sam_rho) for group in self.groups]
            self._backward(batch, share, epoch)
            for group, weights in zip(self.groups, old, strict=True):
                put_back(group.parameters, weights)
        self._update(step, progress)
        return self._record(terms, losses) * share

    def decay(self, epoch: int) -> float:
        """The hint's factor in this epoch."""
        return linear_decay(epoch, self.config.schedule.epochs) if self.config.objective.hint_decay == "linear" else 1.0

    def _backward(self, batch: Batch, share: float, epoch: int) -> tuple[dict[Network, LossTerms], list[Tensor]]:
        """Gradients of the batch, and its terms: the mean over its parts, each weighted by its number of images."""
        for group in self.groups:
            group.optimizer.zero_grad(set_to_none=True)
        count = parts_of(batch.global_size, self.world.size, self.config.optim.accumulate)  # on every worker alike
        parts = zip(batch.images.tensor_split(count), batch.labels.tensor_split(count), strict=True)
        found = []
        for left, (images, labels) in reversed(list(enumerate(parts))):  # the first one has images
            if not len(labels):  # of which all were broken
                continue
            weight = len(labels) / len(batch.labels)
            with self._reducing(last=left == 0):
                with self._autocast():
                    terms: dict[Network, LossTerms] = self._forward(images, labels)
                # DDP averages over workers: weighting by the share of the batch makes uneven shares exact
                loss = total_loss(terms, self.config.objective, self.decay(epoch)) * (share * self.world.size * weight)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            found.append((weight, terms))
        mean = {net: mean_terms([(weight, terms[net]) for weight, terms in found]) for net in self.config.networks}
        losses = [mean[net].total(getattr(self.config.objective, net), self.decay(epoch)) for net in mean]
        return mean, [loss for loss in losses if loss is not None]

    def _reducing(self, *, last: bool) -> AbstractContextManager[None]:
        """Workers exchange the gradients of a batch once, with its last part."""
        ddp = self._ddp
        return nullcontext() if last or ddp is None else ddp.no_sync()

    def _update(self, step: int, progress: float) -> None:
        optim = self.config.optim
        clipping = (optim.clip_when == "every" or step == 0) and (optim.sam_rho is None or optim.sam_clip)
        for group in self.groups:
            self.scaler.unscale_(group.optimizer)
            if group.clip_norm is not None and clipping:
                clip(group.clipped, group.clip_norm)
            rate = learning_rate(group.schedule, group.base_lr, progress)
            for parameters in group.optimizer.param_groups:
                parameters["lr"] = rate * parameters.get("lr_scale", 1.0)
            self.scaler.step(group.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.networks, step)

    def _record(self, terms: dict[Network, LossTerms], losses: list[Tensor]) -> Tensor:
        values = []
        for own, loss in zip(terms.values(), losses, strict=True):
            values += [t.detach() for t in own if t is not None] + [loss.detach()]
        return torch.stack(values)

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = AUTOCAST.get(self.config.precision)
        return nullcontext() if dtype is None else torch.autocast(self.world.device.type, dtype)

    # ------------------------------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], answers: Answers | None = None) -> dict[Network, Counts]:
        """Correct and total over all workers; no padding, so any batch size and worker count count the same.

        `answers` takes what the networks say of each of this worker's images. Raises `RunFailed` where no image could
        be read, or a network's loss is no longer finite.
        """
        self.networks.eval()
        self._share_buffers()
        models = [self.networks] if self.ema is None else [self.networks, self.ema.module]
        nets, classes = self.config.networks, self.num_classes
        counts = torch.zeros(len(models), len(nets), 4, dtype=torch.float64, device=self.world.device)
        tallies = [[Tally(classes, self.world.device) for _ in nets] for _ in models]
        for batch in batches:
            for model, rows, told in zip(models, counts, tallies, strict=True):
                with self._autocast():
                    features = model.features(batch.images)
                for tally, own in zip(told, features.values(), strict=True):
                    tally.add(own.logits, batch.labels)
                rows.add_(torch.stack([count(own.logits, batch.labels) for own in features.values()]))
                if answers is not None and model is self.networks:
                    answers.add(batch, {net: own.logits for net, own in features.items()})
        if self.world.size > 1:
            dist.all_reduce(counts)
        last, *averaged = [[Counts.of(row) for row in rows] for rows in counts.tolist()]
        for what, rows_of in zip(("", " (averaged weights)"), (last, *averaged), strict=False):
            for net, own in zip(nets, rows_of, strict=True):
                check_counts(f"{net}{what}", own)
        for found, told in zip([last, *averaged], tallies, strict=True):
            for place, tally in enumerate(told):
                measures, per_class = tally.measures(self.world.size)
                found[place] = found[place]._replace(measures=measures, per_class=tuple(per_class))
        if averaged:
            last = [own._replace(ema=ema) for own, ema in zip(last, averaged[0], strict=True)]
        return dict(zip(nets, last, strict=True))

    def _share_buffers(self) -> None:
        """Unsynchronised BatchNorm statistics differ between workers: rank 0's are the ones that are kept."""
        if self.world.size > 1:
            averaged = [] if self.ema is None else list(self.ema.module.buffers())
            for buffer in (*self.networks.buffers(), *averaged):
                dist.broadcast(buffer, src=0)

    # ------------------------------------------------------------------------------------------ state

    def not_finite(self) -> str | None:
        """The name of a weight or BatchNorm statistic that is not finite any more; None if all are."""
        named = [(name, value) for name, value in self.networks.state_dict().items() if value.is_floating_point()]
        finite = torch.stack([value.isfinite().all() for _, value in named]).tolist()
        return next((name for (name, _), ok in zip(named, finite, strict=True) if not ok), None)

    def state_dict(self) -> dict[str, Any]:
        """Weights, BatchNorm statistics, their moving averages, optimiser moments and the scale of the loss."""
        return {
            "networks": self.networks.state_dict(),
            "optimizers": [optimizer_state(group.optimizer) for group in self.groups],
            **({} if self.ema is None else {"ema": self.ema.module.state_dict()}),
            **({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; without optimisers only the weights are taken."""
        self.networks.load_state_dict(state["networks"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state.get("ema") or state["networks"])
        for group, saved in zip(self.groups, state.get("optimizers") or [], strict=False):
            restore_optimizer(group.optimizer, saved)
        if "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


class Counts(NamedTuple):
    """Exact evaluation counts of one network."""

    correct: int
    correct5: int
    total: int
    loss_sum: float
    measures: dict[str, float] = {}  # noqa: RUF012  those of `bootvit.measures`
    per_class: tuple[float | None, ...] = ()  # percent of each class that is right; None: it has no images
    ema: Counts | None = None  # those of the moving average of the weights

    @classmethod
    def of(cls, row: Sequence[float]) -> Counts:
        """From what `count` gives."""
        return cls(int(row[0]), int(row[1]), int(row[2]), row[3])

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct / self.total

    @property
    def top5(self) -> float:
        """Percent; with five classes or fewer it is 100."""
        return 100 * self.correct5 / self.total

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return self.loss_sum / self.total


def check_counts(what: str, counts: Counts) -> None:
    """Raise `RunFailed` where no image could be read, or the loss is no longer finite."""
    if not counts.total:
        raise RunFailed("none of the images of the evaluation can be read")
    if not math.isfinite(counts.loss_sum):
        raise RunFailed(
            f"the evaluation's loss is not finite: {what}={counts.loss_sum} (after few steps BatchNorm's young "
            "statistics can overflow: schedule.eval_every evaluates later)"
        )


def seed_from(*numbers: int) -> None:
    """Seed torch's generators from a few numbers, such as (run's seed, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def count(logits: Tensor, labels: Tensor) -> Tensor:
    """(correct, correct among the first five, total, summed cross entropy) of a batch, (4,) float64.

    One logit that is not finite makes the cross entropy nan.
    """
    logits = logits.double()
    hit = first_five(logits) == labels[:, None]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss = torch.where(logits.isfinite().all(), loss, torch.nan)
    total = torch.tensor(len(labels), device=logits.device)
    return torch.stack([hit[:, 0].sum(), hit.sum(), total, loss]).double()
