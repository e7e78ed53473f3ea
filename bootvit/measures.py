"""The measures that people report beside accuracy, exact over workers: from counts, and from probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

BINS = 15  # of the calibration error, of equal width
LARGEST = 20_000_000  # probabilities (images x classes) up to which they are gathered for the AUROC
NAMES = ("balanced_accuracy", "macro_f1", "ece", "auroc")  # beside top1, top5 and loss


class Tally:
    """What one network says of the images of an evaluation."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = torch.zeros(classes, 3, dtype=torch.int64, device=device)  # images, guesses, right ones of each
        self.bins = torch.zeros(BINS, 3, dtype=torch.float64, device=device)  # images, right ones, summed confidence
        self.said: list[tuple[Tensor, Tensor]] = []  # probabilities (batch, classes), labels (batch,)
        self.images = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """A batch of this worker's: (batch, classes) and (batch,)."""
        chances = logits.double().softmax(1)
        confidence, guesses = chances.max(1)
        one, right = torch.ones_like(labels), guesses == labels
        for column, (label, amount) in enumerate(((labels, one), (guesses, one), (labels, right.long()))):
            self.classes[:, column].index_add_(0, label, amount)
        places = (confidence * BINS).ceil().long().clamp_(1, BINS) - 1  # bins hold their upper ends
        seen = torch.stack([one.double(), right.double(), confidence], 1)
        self.bins.index_add_(0, places.where(confidence.isfinite(), 0), seen)
        self.images += len(labels)
        if self.images * len(self.classes) <= LARGEST:
            self.said.append((chances.float(), labels))

    def measures(self, world: int) -> tuple[dict[str, float], list[float | None]]:
        """(measures by name, each class's accuracy in percent), of all workers' images, the same on every worker.

        Accuracies and F1 are in percent, the others between 0 and 1. The AUROC is the mean over classes of one against
        the rest, left out of large evaluations; a class without images counts in no mean.
        """
        if world > 1:
            dist.all_reduce(self.classes)
            dist.all_reduce(self.bins)
        counts = self.classes.cpu().numpy()
        found = of_counts(counts) | {"ece": calibration_error(self.bins.cpu().numpy())}
        if counts[:, 0].sum() * len(counts) <= LARGEST and (auroc := self._auroc(world)) is not None:
            found["auroc"] = auroc
        return found, per_class(counts)

    def _auroc(self, world: int) -> float | None:
        own = [(chances.cpu().numpy(), labels.cpu().numpy()) for chances, labels in self.said]
        parts: list[list[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]] = [own]
        if world > 1:
            parts = [[]] * world
            dist.all_gather_object(parts, own)
        chances, labels = (np.concatenate(values) for values in zip(*(p for one in parts for p in one), strict=True))
        return mean_auroc(chances, labels)


def of_counts(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """Balanced accuracy and macro F1 in percent, of each class's (images, guesses, right ones)."""
    images, guesses, right = counts[counts[:, 0] > 0].T
    recalls, f1 = right / images, 2 * right / (images + guesses)
    return {"balanced_accuracy": 100 * float(recalls.mean()), "macro_f1": 100 * float(f1.mean())}


def per_class(counts: npt.NDArray[np.int64]) -> list[float | None]:
    """Percent of each class's images that are right; None: it has none."""
    return [100 * right / images if images else None for images, _, right in counts.tolist()]


def calibration_error(bins: npt.NDArray[np.float64]) -> float:
    """Expected calibration error of `Tally.bins`: the mean over images of |accuracy - confidence| of their bin."""
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())


def mean_auroc(chances: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> float | None:
    """Mean over the classes that are there of the area under the curve of one against the rest; None: one class."""
    from sklearn.metrics import roc_auc_score

    present = np.unique(labels)
    if len(present) < 2:
        return None
    return float(np.mean([roc_auc_score(labels == label, chances[:, label]) for label in present.tolist()]))
