"""Counting, and starting from somebody's weights."""

from pathlib import Path

import pytest
import timm
import torch
from helpers import tiny

from bootvit.learner import count
from bootvit.models.zoo import build_vit


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


def test_fine_tuning_starts_from_a_local_file_at_another_size_and_class_count(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=2)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    own_sizes = dict.fromkeys(("width", "heads", "mlp_width", "patch"))
    vit = {"name": "vit_tiny_patch16_224", "weights": str(tmp_path / "vit.pth"), "depth": 2} | own_sizes
    model = build_vit(tiny(method="vit", model={"vit": vit}, data__image_size=48), 10)
    assert model.head.out_features == 10
    assert model.pos_embed.shape == (1, 1 + 9, 192)
    torch.testing.assert_close(model.pos_embed[:, :1], source.pos_embed[:, :1])  # the class token's row is kept
    torch.testing.assert_close(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    torch.testing.assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
