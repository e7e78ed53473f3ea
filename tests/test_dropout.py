"""Dropout's masks on the CPU: their statistics, their gradients, and attention with them written out by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import ONE, batch, tiny
from timm.layers import Attention
from torch import Tensor, nn

from bootvit.learner import Learner, seed_from
from bootvit.models.dropout import ByteDropout, kept, use_byte_dropout

COUNT = 1 << 20


def off(mask: Tensor, dropped: int) -> float:
    """By how many standard deviations the share of false elements is off."""
    p = dropped / 256
    return float(((~mask).double().mean() - p).abs() / (p * (1 - p) / mask.numel()) ** 0.5)


@pytest.mark.parametrize("dropped", [1, 26, 128, 200, 255])
def test_masks_have_the_share_asked_for_at_every_place(dropped: int) -> None:
    """The eight bytes of a random number are alike; its sign is random too."""
    seed_from(0, dropped)
    mask = kept(COUNT, dropped)
    assert off(mask, dropped) < 4
    assert all(off(mask[place::8], dropped) < 4.5 for place in range(8))


def test_masks_are_independent_of_their_neighbours_and_of_other_steps_and_ranks() -> None:
    masks = []
    for step, rank in [(0, 0), (1, 0), (0, 1)]:
        seed_from(7, step, rank)
        masks.append(kept(COUNT, 64).double() - 0.75)
    first = masks[0]
    pairs = [(first[:-lag], first[lag:]) for lag in (1, 2, 7, 8, 16, 64, 1152)] + [
        (first, other) for other in masks[1:]
    ]
    for one, two in pairs:
        correlation = (one * two).mean() / (0.25 * 0.75)
        assert abs(float(correlation)) < 4.5 / len(one) ** 0.5


def test_a_mask_is_a_function_of_seed_step_and_rank() -> None:
    seed_from(3, 5, 1)
    first = kept(1001, 26)
    torch.rand(7)
    seed_from(3, 5, 1)
    assert torch.equal(kept(1001, 26), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_stays_is_scaled_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 7, dtype=dtype).transpose(0, 2).requires_grad_()
    upstream = torch.randn(7, 5, 3, dtype=dtype)
    torch.manual_seed(1)
    mask = kept(x.numel(), 26).view(3, 5, 7).transpose(0, 2)  # 0.1 is 26 / 256; in the order of memory
    torch.manual_seed(1)
    out = ByteDropout(0.1)(x)
    out.backward(upstream)
    factor = torch.where(mask, torch.tensor(256 / 230, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    assert torch.equal(out.detach(), x.detach() * factor)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream * factor)


def test_mean_and_variance_are_those_of_dropout() -> None:
    seed_from(11)
    out = ByteDropout(0.1)(torch.ones(COUNT, dtype=torch.float64))
    p = 26 / 256
    assert float(out.mean()) == pytest.approx(1.0, abs=4 * (p / (1 - p) / COUNT) ** 0.5)
    assert float(out.var()) == pytest.approx(p / (1 - p), rel=0.02)


def test_evaluation_drops_nothing() -> None:
    x = torch.randn(100)
    assert torch.equal(ByteDropout(0.5).eval()(x), x)
    assert torch.equal(ByteDropout(0.0)(x), x)


def test_attention_with_dropout_is_its_formula() -> None:
    torch.manual_seed(0)
    attention = nn.Sequential(Attention(12, num_heads=3, qkv_bias=True, attn_drop=0.25, proj_drop=0.5).double())
    use_byte_dropout(attention)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.manual_seed(4)
    found = attention(x)
    torch.manual_seed(4)
    layer = attention[0]
    out = torch.zeros(2, 5, 12, dtype=torch.float64)
    weights_mask = kept(2 * 3 * 5 * 5, 64).view(2, 3, 5, 5)
    for image in range(2):
        q, k, v = layer.qkv(x[image]).chunk(3, dim=1)
        for head in range(3):
            mine = slice(4 * head, 4 * head + 4)
            weights = (q[:, mine] @ k[:, mine].T / 2).softmax(1)
            out[image, :, mine] = (weights * weights_mask[image, head] / 0.75) @ v[:, mine]
    wanted = layer.proj(out) * kept(2 * 5 * 12, 128).view(2, 5, 12) / 0.5
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_learner_on_the_cpu_uses_it_everywhere() -> None:
    rates = {"vit": {"dropout": 0.1, "pos_dropout": 0.1}, "agent": {"dropout": 0.1, "residual_dropout": 0.1}}
    learner = Learner(tiny(method="joint", model=rates), 10, ONE)
    kinds = {type(module) for module in learner.networks.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {ByteDropout}
    assert learner.step(batch(), 0, 0, 0.0).isfinite().all()
