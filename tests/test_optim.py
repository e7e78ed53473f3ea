"""Rates against torch's own schedulers, sharpness-aware steps and clipping against hand-written ones."""

import pytest
import torch
from helpers import ONE, batch, tiny
from torch import nn

from bootvit.config import OptimConfig, ScheduleConfig
from bootvit.learner import Learner
from bootvit.optim import build_optimizer, climb, learning_rate, linear_decay, network_optim, put_back


def test_cosine_per_epoch_is_torchs_scheduler() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    schedule = ScheduleConfig(epochs=10, per="epoch")
    for epoch in range(10):
        for within in (0, 0.4, 0.99):
            assert learning_rate(schedule, 0.05, epoch + within) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_cosine_per_step_falls_within_an_epoch() -> None:
    schedule = ScheduleConfig(epochs=4)
    rates = [learning_rate(schedule, 1.0, t / 8) for t in range(33)]
    assert rates == sorted(rates, reverse=True)
    assert rates[16] == pytest.approx(0.5)
    assert rates[32] == pytest.approx(0)


def test_warmup_modes() -> None:
    linear = ScheduleConfig(epochs=12, warmup_epochs=4, per="epoch")
    assert [round(learning_rate(linear, 1e-3, e) * 1e3, 6) for e in range(5)] == [
        0.2,
        0.393185,
        0.559808,
        0.682843,
        0.75,
    ]
    constant = ScheduleConfig(epochs=12, kind="constant", warmup_epochs=4, warmup_mode="constant", warmup_factor=0.1)
    assert [learning_rate(constant, 1.0, e) for e in (0, 3.9, 4)] == [0.1, 0.1, 1.0]


def test_linear_decay_ends_at_one_epochs_share() -> None:
    assert [linear_decay(e, 4) for e in (0, 1, 3, 4, 9)] == [1, 0.75, 0.25, 0, 0]


def test_the_agents_optimiser_overrides_only_in_joint_training() -> None:
    optim = OptimConfig.model_validate(
        {"lr": 1e-3, "clip_norm": 2.0, "agent": {"lr": 0.5, "name": "sgd", "clip_norm": "none"}}
    )
    agent = network_optim(optim, "agent", joint=True)
    assert (agent.lr, agent.name, agent.clip_norm, agent.weight_decay) == (0.5, "sgd", None, 0.05)
    assert network_optim(optim, "vit", joint=True) == optim
    assert network_optim(optim, "agent", joint=False) == optim


def test_climb_moves_by_rho_along_the_gradient_and_back() -> None:
    weights = [nn.Parameter(torch.randn(3, dtype=torch.float64)), nn.Parameter(torch.randn(2, 2, dtype=torch.float64))]
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.randn_like(w)
    old = climb(weights, 0.1)
    moved = torch.cat([(w.detach() - b).flatten() for w, b in zip(weights, before, strict=True)])
    gradient = torch.cat([w.grad.flatten() for w in weights if w.grad is not None])
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-9)
    assert torch.dot(moved, gradient) / moved.norm() / gradient.norm() == pytest.approx(1.0, rel=1e-9)
    put_back(weights, old)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_fused_optimisers_are_their_formulas(name: str) -> None:
    """Also where weights lie in memory channels last; five steps in float64."""
    optim = OptimConfig(name=name, lr=0.01, weight_decay=0.1, momentum=0.9)  # type: ignore[arg-type]
    shapes = [(5, 3, 3, 3), (7, 5), (7,)]
    weights = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    weights[0] = nn.Parameter(weights[0].detach().to(memory_format=torch.channels_last))
    slow = [w.detach().clone().contiguous() for w in weights]
    first = [torch.zeros_like(w) for w in slow]
    second = [torch.zeros_like(w) for w in slow]
    optimizer = build_optimizer(weights, optim)
    for step in range(1, 6):
        gradients = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        for w, g in zip(weights, gradients, strict=True):
            w.grad = torch.empty_like(w).copy_(g)
        optimizer.step()
        for w, g, m, v in zip(slow, gradients, first, second, strict=True):
            if name == "sgd":
                decayed = g + 0.1 * w
                m.copy_(decayed if step == 1 else 0.9 * m + decayed)
                w.sub_(0.01 * m)
            else:
                w.mul_(1 - 0.01 * 0.1)
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g**2)
                w.sub_(0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    assert all(group["fused"] for group in optimizer.param_groups)
    for w, wanted in zip(weights, slow, strict=True):
        torch.testing.assert_close(w.detach(), wanted, rtol=1e-12, atol=1e-12)


def gradient_norms(config_changes: dict[str, object], steps: int) -> list[list[float]]:
    """Per step, the norm of each optimiser's clipped parameters' gradients as the optimiser sees them."""
    learner = Learner(tiny(**config_changes), 10, ONE)
    norms: list[list[float]] = []
    for step in range(steps):
        learner.step(batch(), step, 0, 0.0)
        norms.append([nn.utils.get_total_norm([p.grad for p in g.clipped]).item() for g in learner.groups])
    return norms


def test_clipping_works_at_every_step_for_each_network() -> None:
    for step in gradient_norms({"optim__clip_norm": 1e-3}, 3):
        assert len(step) == 2
        assert step == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_clipping_only_in_the_first_step_as_the_reference() -> None:
    first, second = gradient_norms({"optim__clip_norm": 1e-3, "optim__clip_when": "first_step"}, 2)
    assert first == pytest.approx([1e-3, 1e-3], rel=1e-2)
    assert min(second) > 1e-2


def test_shared_clipping_of_the_vits_parameters_leaves_the_agents_own_alone() -> None:
    learner = Learner(tiny(method="shared", optim__clip_norm=1e-3, optim__clip_scope="vit"), 10, ONE)
    learner.step(batch(), 0, 0, 0.0)
    own = [p.grad for p in learner.networks.own_parameters("agent")]
    assert nn.utils.get_total_norm(own) > 1e-2
    (group,) = learner.groups
    assert len(group.clipped) + len(own) == len(group.parameters)


@pytest.mark.parametrize("sam_clip", [True, False])
def test_a_sharpness_aware_step(sam_clip: bool) -> None:
    optim = {"sam_rho": 0.1, "sam_clip": sam_clip, "clip_norm": 1e-3, "name": "sgd", "weight_decay": 0.0, "lr": 0.1}
    config = tiny(method="vit", precision="fp64", optim=optim)
    learner, plain = Learner(config, 10, ONE), Learner(config, 10, ONE)
    data = batch()._replace(images=batch().images.double())
    learner.step(data, 0, 0, 0.0)

    parameters = list(plain.networks.parameters())
    ce = torch.nn.functional.cross_entropy
    loss = ce(plain.networks.features(data.images)["vit"].logits, data.labels)
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p.add_(0.1 * g / norm)
    loss = ce(plain.networks.features(data.images)["vit"].logits, data.labels)
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    scale = min(1.0, 1e-3 / norm.item()) if sam_clip else 1.0
    for p, s, g in zip(learner.networks.parameters(), start, gradients, strict=True):
        torch.testing.assert_close(p.detach(), s - 0.1 * scale * g, rtol=1e-6, atol=1e-9)
