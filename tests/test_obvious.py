"""Our step against the slow obvious one of `benchmarks.obvious`, in float64: losses and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ONE, batch, tiny

from benchmarks.obvious import BareViT, ObviousStep
from bootvit.data.batches import Batch
from bootvit.learner import Learner
from bootvit.models.agent import SameConv

RESNET = {"agent": {"stem": "resnet", "downsample": [0]}}
CASES: dict[str, dict[str, Any]] = {
    "vit": {"method": "vit"},
    "agent": {"method": "agent"},
    "joint": {"method": "joint"},
    "joint, a matrix a head": {"method": "joint", "model": {"agent": {"name": "agent_base"}}},
    "shared": {"method": "shared"},
    "shared, post-norm": {"method": "shared", "model": {"agent": {"name": "agent_base"}}},
    "joint, resnet": {"method": "joint", "model": RESNET, "data": {"image_size": 32}},
    "shared, resnet": {"method": "shared", "model": RESNET, "data": {"image_size": 32}},
}


def config_of(name: str, **more: Any) -> Any:
    """Float64, no clipping, no dropout: the same numbers whatever the order of the sums."""
    given = dict(CASES[name])
    if "data" in given:
        given["model"] = {**given["model"], "vit": {"patch": 8}}
    hint = 1.0 if given["method"] in ("joint", "shared") else 0.0
    return tiny(precision="fp64", optim__clip_norm=None, objective={"vit": {"hint": hint}}, **given, **more)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_our_step_is_the_obvious_one(name: str, compiled: bool) -> None:
    config = config_of(name, compile=compiled)
    ours, slow = Learner(config, 10, ONE), ObviousStep(config, 10, ONE.device, torch.float64)
    given = batch(6, side=config.image_size[0])
    images = Batch(given.images.double(), given.labels, given.global_size)
    for step in range(2):
        slow.networks.load_state_dict(ours.networks.state_dict())  # AdamW makes full steps of gradients that are noise
        terms = dict(zip(ours.term_names, ours.step(images, step, 0, 0.0).tolist(), strict=True))
        total = slow.step(images)
        assert sum(v for k, v in terms.items() if k.endswith("/loss")) == pytest.approx(float(total), rel=1e-11)
        for (where, one), two in zip(ours.networks.named_parameters(), slow.networks.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None), where
            if one.grad is not None:
                torch.testing.assert_close(
                    one.grad, two.grad, rtol=1e-9, atol=1e-11, msg=lambda text, name=where: f"{name}: {text}"
                )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gathered_gradients_are_those_of_the_convolution(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = SameConv(5).double().to(memory_format=layout)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    upstream = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    given = (x, conv.weight, conv.bias)
    fast = torch.autograd.grad(conv.train()(x), given, upstream)
    slow = torch.autograd.grad(conv.eval()(x), given, upstream)
    for one, two in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert conv.train()(x).grad_fn.name().startswith("_GatheredGradient")


def test_the_bare_vit_is_the_obvious_one() -> None:
    config = tiny(method="vit", objective={"vit": {"hint": 0}})
    bare, slow = BareViT(config, 10, ONE.device), ObviousStep(config, 10, ONE.device)
    for _ in range(2):
        torch.testing.assert_close(bare.step(batch()), slow.step(batch()), rtol=1e-4, atol=1e-5)
