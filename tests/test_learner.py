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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_whose_logits_are_not_finite_is_wrong(bad: float) -> None:
    logits = torch.tensor([[bad, 0.0, 0.0], [bad, bad, bad], [1.0, 0.0, 0.0]])
    assert count(logits, torch.tensor([0, 0, 0]))[:3].tolist() == [1, 1, 3]
