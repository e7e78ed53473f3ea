"""Counting."""

import pytest
import torch

from bootvit.learner import count


def test_counts() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    labels = torch.tensor([0, 1, 5])  # right; among the first five; wrong
    correct, correct5, total, loss = count(logits, labels).tolist()
    assert (correct, correct5, total) == (1, 2, 3)
    slow = sum(torch.log(torch.exp(row - row[label]).sum()).item() for row, label in zip(logits, labels, strict=True))
    assert loss == pytest.approx(slow, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_one_logit_that_is_not_finite_makes_the_loss_nan(bad: float, place: int) -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    logits[0, place] = bad
    assert count(logits, torch.tensor([0, 0]))[3].isnan()
