"""The loss terms against loops over pixels and classes."""

import math

import pytest
import torch
from helpers import tiny
from torch import Tensor

from bootvit.config import NetworkObjective, ObjectiveConfig
from bootvit.learner import Networks
from bootvit.models import Features
from bootvit.objective import hint_loss, kd_loss, loss_terms, to_same_length, total_loss


def normalised(vector: list[float]) -> list[float]:
    mean = sum(vector) / len(vector)
    var = sum((v - mean) ** 2 for v in vector) / len(vector)
    return [(v - mean) / math.sqrt(var + 1e-5) for v in vector]


def test_kd_is_the_softened_divergence_of_the_peer() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    slow = 0.0
    for s, t in zip((student / 4).softmax(1).tolist(), (teacher / 4).softmax(1).tolist(), strict=True):
        slow += sum(q * math.log(q / p) for p, q in zip(s, t, strict=True)) / 3
    assert kd_loss(student, teacher, 4.0).item() == pytest.approx(16 * slow, rel=1e-12)


def slow_hint(student: Tensor, teacher: Tensor) -> float:
    """Both (batch, rows, cols, width), of one size."""
    errors = []
    for s, t in zip(student.flatten(0, 2).tolist(), teacher.flatten(0, 2).tolist(), strict=True):
        errors += [(a - b) ** 2 for a, b in zip(normalised(s), normalised(t), strict=True)]
    return sum(errors) / len(errors)


def test_hint_sums_over_blocks_the_mean_error_of_normalised_tokens() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 4, 5).double() for _ in range(4)]
    slow = slow_hint(maps[0], maps[2]) + slow_hint(maps[1], maps[3])
    assert hint_loss((maps[0], maps[1]), (maps[2], maps[3]), "grid").item() == pytest.approx(slow, rel=1e-9)


def test_grid_pooling_averages_rectangles_and_raster_runs() -> None:
    large = torch.arange(24.0).reshape(1, 4, 6, 1)
    small = torch.zeros(1, 2, 3, 1)
    grid, _ = to_same_length(large, small, "grid")
    assert grid.flatten().tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5]
    raster, _ = to_same_length(large, small, "raster")
    assert raster.flatten().tolist() == [1.5, 5.5, 9.5, 13.5, 17.5, 21.5]
    _, swapped = to_same_length(small, large, "grid")
    assert torch.equal(swapped, grid)


@pytest.mark.parametrize("pool", ["grid", "raster"])
def test_maps_that_are_no_whole_multiples_are_refused(pool: str) -> None:
    with pytest.raises(ValueError, match="whole multiple"):
        to_same_length(torch.zeros(1, 3, 3, 1), torch.zeros(1, 2, 2, 1), pool)


def features() -> Features:
    logits = torch.randn(2, 3, requires_grad=True)
    return Features(logits, logits, (torch.randn(2, 2, 2, 4, requires_grad=True),))


def test_terms_of_weight_zero_are_not_computed() -> None:
    broken = Features(torch.randn(2, 3), torch.full((2, 3), float("nan")), (torch.full((2, 2, 2, 4), float("nan")),))
    weights = NetworkObjective(ce=1, kd=0, hint=0)
    terms = loss_terms(features(), broken, torch.tensor([0, 1]), weights, ObjectiveConfig())
    assert terms.kd is None
    assert terms.hint is None
    total = terms.total(weights, 1.0)
    assert total is not None
    assert torch.isfinite(total)


def test_one_backward_pass_gives_each_network_the_gradient_of_its_own_terms() -> None:
    config = tiny(objective__agent__hint=0.5)
    networks = Networks(config, 10).double().eval()
    images, labels = torch.randn(3, 3, 8, 8).double(), torch.tensor([1, 2, 3])
    objective = config.objective

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        networks.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return {n: p.grad.clone() for n, p in networks.named_parameters() if p.grad is not None}

    once = gradients(total_loss(networks(images, labels), objective, 0.5))
    apart: dict[str, Tensor] = {}
    for net in ("vit", "agent"):
        own = networks(images, labels)[net].total(getattr(objective, net), 0.5)
        apart |= {n: g for n, g in gradients(own).items() if n.startswith(net)}
    assert set(once) == set(apart)
    for name, gradient in once.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-12, atol=1e-14)


def test_the_hint_decays_and_nothing_else_does() -> None:
    weights = NetworkObjective(ce=1, kd=2, hint=3)
    one, other = features(), features()
    terms = loss_terms(one, other, torch.tensor([0, 1]), weights, ObjectiveConfig())
    assert terms.ce is not None
    assert terms.kd is not None
    assert terms.hint is not None
    expected = terms.ce + 2 * terms.kd + 3 * 0.25 * terms.hint
    torch.testing.assert_close(terms.total(weights, 0.25), expected)
