"""Less memory for the same gradients: a batch in parts, and blocks that are computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ONE, batch, tiny
from torch import Tensor, nn

from bootvit.data.batches import Batch
from bootvit.errors import UserError
from bootvit.learner import Learner
from bootvit.models.agent import AgentBlock

METHODS = ("vit", "agent", "joint", "shared")


def one_step(method: str, dropout: float = 0.0, **changes: Any) -> tuple[Learner, dict[str, Tensor], Tensor]:
    """A step of seven images in float64: the learner, its gradients, and the terms it reports."""
    hint = {"objective": {"vit": {"hint": 1.0 if method in ("joint", "shared") else 0.0}}}
    rates = {"vit": {"dropout": dropout}, "agent": {"dropout": dropout, "residual_dropout": dropout}}
    given = {"optim__clip_norm": None, **changes}
    learner = Learner(tiny(method=method, precision="fp64", model=rates, **hint, **given), 10, ONE)
    images = batch(7, seed=3)
    terms = learner.step(Batch(images.images.double(), images.labels, 7), 0, 0, 0.0)
    grads = {name: p.grad for name, p in learner.networks.named_parameters() if p.grad is not None}
    return learner, grads, terms


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def with_running_statistics(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(
    method: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without batch norm's view of its part alone; 7 images are no multiple of 2 and 3."""
    monkeypatch.setattr(nn.BatchNorm2d, "forward", with_running_statistics)
    _, whole, terms = one_step(method)
    _, summed, terms_of_parts = one_step(method, optim__accumulate=parts)
    assert_same(whole, summed)
    torch.testing.assert_close(terms_of_parts, terms, rtol=1e-12, atol=0)


def test_batch_norms_see_the_parts() -> None:
    """So the agent's gradients are those of smaller batches, and the ViT's own, from labels alone, are not."""
    learner, whole, _ = one_step("joint", objective__vit={"ce": 1, "kd": 0, "hint": 0})
    in_parts, summed, _ = one_step("joint", objective__vit={"ce": 1, "kd": 0, "hint": 0}, optim__accumulate=3)
    assert_same(
        {n: g for n, g in whole.items() if n.startswith("vit.")}, {n: g for n, g in summed.items() if "vit." in n}
    )
    assert not torch.allclose(whole["agent.stem.weight"], summed["agent.stem.weight"], rtol=1e-3)
    counts = [own.networks.agent.norm.num_batches_tracked.item() for own in (learner, in_parts)]  # type: ignore[union-attr]
    assert counts == [1, 3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_blocks_computed_again_give_the_same_gradients(
    method: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same dropout masks, and running statistics that count each batch once."""
    plain, wanted, terms = one_step(method, dropout)
    calls = []
    forward = AgentBlock.forward
    monkeypatch.setattr(AgentBlock, "forward", lambda self, x: calls.append(1) or forward(self, x))
    again, grads, terms_again = one_step(method, dropout, model__checkpoint_blocks=True)
    assert_same(wanted, grads, 0.0)
    assert torch.equal(terms, terms_again)
    for (name, one), two in zip(plain.networks.state_dict().items(), again.networks.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert len(calls) == (0 if method == "vit" else 2 * 2)  # two blocks, each twice


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__accumulate": 33}, r"data.batch_size=32 is smaller than optim.accumulate=33 times ray.num_workers=1"),
        ({"model__checkpoint_blocks": True, "compile": True}, r"model.checkpoint_blocks=true: the compiler"),
        (
            {
                "method": "agent",
                "model__agent__name": "resnet18",
                "model__checkpoint_blocks": True,
                "data__image_size": 32,
            },
            r"model.checkpoint_blocks=true: resnet18 is a CNN of timm",
        ),
    ],
)
def test_what_cannot_be_is_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        tiny(**changes)
