"""The bootstrapping objective: cross entropy, mutual distillation and the hint (paper, section 3.4).

For network m with peer p:  ce_m CE + kd_m T^2 KL(softmax(p/T) || softmax(m/T)) + hint_m decay(t) sum over blocks of
MSE(LN(m's map), LN(p's map)); the peer's side is detached, and a term of weight zero is not computed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from bootvit.config import Network, NetworkObjective, ObjectiveConfig
from bootvit.errors import UserError
from bootvit.models import Features


class LossTerms(NamedTuple):
    """One network's terms before weights and decay, each a scalar, or None where its weight is zero."""

    ce: Tensor | None
    kd: Tensor | None
    hint: Tensor | None

    def total(self, weights: NetworkObjective, decay: float) -> Tensor | None:
        """The weighted sum, decayed terms times `decay`; None where no term is computed."""
        parts = [
            getattr(weights, name) * (decay if name in weights.decayed else 1.0) * term
            for name, term in self._asdict().items()
            if term is not None
        ]
        return sum(parts[1:], start=parts[0]) if parts else None


def loss_terms(
    student: Features,
    peer: Features | None,
    labels: Tensor,
    weights: NetworkObjective,
    objective: ObjectiveConfig,
    class_weights: Tensor | None = None,
) -> LossTerms:
    """`student`'s terms; without a peer only cross entropy.

    `labels` (batch,) int64, or (batch, classes) shares of mixed images; `class_weights` (classes,).
    """
    ce = cross_entropy(student.logits, labels, objective.label_smoothing, class_weights) if weights.ce else None
    if peer is None:
        return LossTerms(ce, None, None)
    kd = kd_loss(student.kd_logits, peer.kd_logits, objective.temperature) if weights.kd else None
    hint = None
    if weights.hint:
        hint = hint_loss(student.blocks, peer.blocks, objective.hint_pool, objective.hint_norm)
    return LossTerms(ce, kd, hint)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
    """Mean over the batch of the weighted cross entropies.

    torch divides by the sum of the weights of hard labels: a batch in parts would not be the batch as a whole.
    """
    if labels.is_floating_point():
        labels = labels.to(torch.promote_types(labels.dtype, logits.dtype))
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    total = F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing)
    return total / len(labels)


def class_weights(objective: ObjectiveConfig, labels: npt.NDArray[np.int64], classes: int) -> list[float] | None:
    """The weight of every class for training images of these labels; None: 1 for all.

    balanced: as scikit-learn's; a class without images counts 1. Raises `UserError` for another number of weights.
    """
    given = objective.class_weights
    if given == "none":
        return None
    if given != "balanced":
        if len(given) != classes:
            raise UserError(f"objective.class_weights: {len(given)} weights for {classes} classes")
        return list(given)
    counts = np.bincount(labels, minlength=classes)
    present = int((counts > 0).sum())
    return [len(labels) / (present * count) if count else 1.0 for count in counts.tolist()]


def mean_terms(parts: Sequence[tuple[float, LossTerms]]) -> LossTerms:
    """One network's terms of a batch from those of its parts, each with its weight; detached."""
    if len(parts) == 1:
        return parts[0][1]
    terms = [LossTerms(*(None if t is None else weight * t.detach() for t in own)) for weight, own in parts]
    return LossTerms(*(None if each[0] is None else sum(each[1:], start=each[0]) for each in zip(*terms, strict=True)))


def total_loss(terms: dict[Network, LossTerms], objective: ObjectiveConfig, decay: float) -> Tensor:
    """The one scalar to differentiate: peers are detached, so each network gets the gradient of its own terms only."""
    totals = [terms[net].total(getattr(objective, net), decay) for net in terms]
    present = [t for t in totals if t is not None]
    return sum(present[1:], start=present[0])


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softened predictions; logits (batch, classes), mean over the batch."""
    target = F.log_softmax(teacher.detach() / temperature, dim=1)
    guess = F.log_softmax(student / temperature, dim=1)
    return F.kl_div(guess, target, reduction="batchmean", log_target=True) * temperature**2


def hint_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], pool: str, norm: bool = True) -> Tensor:
    """Sum over blocks of the mean squared error between (layer-normalised) maps (batch, rows, cols, width)."""
    losses = [block_hint(s, t.detach(), pool, norm) for s, t in zip(student, teacher, strict=True)]
    return sum(losses[1:], start=losses[0])


def block_hint(student: Tensor, teacher: Tensor, pool: str, norm: bool = True) -> Tensor:
    """One block's hint; the longer map is mean-pooled to the size of the shorter first."""
    s, t = to_same_length(student, teacher, pool)
    if not norm:
        return F.mse_loss(s, t)
    return F.mse_loss(F.layer_norm(s, s.shape[-1:]), F.layer_norm(t, t.shape[-1:]))


def to_same_length(a: Tensor, b: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Both maps as sequences (batch, tokens, width) of the length of the shorter one.

    grid: mean over rectangles of the map, so that positions coincide. raster: mean over consecutive runs of the
    raster order, as the reference does (parity README, quirk 10). Raises `ValueError` where one is no whole multiple.
    """
    if a.shape[1] * a.shape[2] < b.shape[1] * b.shape[2]:
        shorter, longer = to_same_length(b, a, pool)[::-1]
        return shorter, longer
    rows, cols = b.shape[1:3]
    if pool == "raster":
        runs, rest = divmod(a.shape[1] * a.shape[2], rows * cols)
        if rest:
            raise ValueError(f"a map of {tuple(a.shape[1:3])} is no whole multiple of {(rows, cols)}")
        return a.reshape(a.shape[0], rows * cols, runs, -1).mean(2), b.flatten(1, 2)
    if a.shape[1] % rows or a.shape[2] % cols:
        raise ValueError(f"a map of {tuple(a.shape[1:3])} is no whole multiple of {(rows, cols)}")
    tiles = a.reshape(a.shape[0], rows, a.shape[1] // rows, cols, a.shape[2] // cols, -1)
    return tiles.mean((2, 4)).flatten(1, 2), b.flatten(1, 2)
