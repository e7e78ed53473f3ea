"""What a recipe of today adds to the step: against torch's, timm's and scikit-learn's own on the same input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ONE, batch, tiny
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from test_loop import after
from timm.layers import DropPath
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import nn

from bootvit import checkpoint
from bootvit.__main__ import main
from bootvit.config import Config, ObjectiveConfig
from bootvit.errors import UserError
from bootvit.learner import Learner, Networks
from bootvit.loop import fit
from bootvit.models.agent import AgentBlock
from bootvit.objective import class_weights, cross_entropy
from bootvit.runs import claim
from bootvit.tracking import read_journal
from bootvit.tracking.artifacts import chosen

METHODS = ("vit", "agent", "joint", "shared")


def trained(steps: int = 3, **changes: Any) -> Learner:
    learner = Learner(tiny(**changes), 10, ONE)
    for step in range(steps):
        learner.step(batch(seed=step), step, 0, 0.1 * step)
    return learner


# --------------------------------------------------------------------------------------------------- losses


def test_smoothed_and_mixed_labels_are_timms() -> None:
    logits, labels = torch.randn(6, 10, dtype=torch.float64), batch().labels
    torch.testing.assert_close(
        cross_entropy(logits, labels, 0.1, None), LabelSmoothingCrossEntropy(0.1)(logits, labels)
    )
    shares = torch.rand(6, 10, dtype=torch.float64)
    shares /= shares.sum(1, keepdim=True)
    torch.testing.assert_close(cross_entropy(logits, shares, 0.0, None), SoftTargetCrossEntropy()(logits, shares))
    torch.testing.assert_close(
        cross_entropy(logits, shares, 0.1, None), SoftTargetCrossEntropy()(logits, 0.9 * shares + 0.01)
    )


def test_class_weights_are_scikit_learns_and_the_same_for_hard_and_soft_labels() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    found = class_weights(ObjectiveConfig(class_weights="balanced"), labels, 4)
    assert found is not None
    np.testing.assert_allclose(found[:3], compute_class_weight("balanced", classes=np.arange(3), y=labels))
    assert found[3] == 1.0
    assert class_weights(ObjectiveConfig(), labels, 4) is None
    with pytest.raises(UserError, match=r"objective.class_weights: 2 weights for 4 classes"):
        class_weights(ObjectiveConfig(class_weights=(1.0, 2.0)), labels, 4)
    logits, weights = torch.randn(7, 4), torch.tensor(found)
    hard = torch.from_numpy(labels)
    slow = torch.stack([weights[y] * F.cross_entropy(row[None], y[None]) for row, y in zip(logits, hard, strict=True)])
    torch.testing.assert_close(cross_entropy(logits, hard, 0.0, weights), slow.mean())
    for smoothing in (0.0, 0.1):
        soft = cross_entropy(logits, F.one_hot(hard, 4).float(), smoothing, weights)
        torch.testing.assert_close(cross_entropy(logits, hard, smoothing, weights), soft)


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_of_classes_reach_every_network(method: str) -> None:
    config = tiny(method=method)
    plain, weighted = Learner(config, 10, ONE), Learner(config, 10, ONE, [3.0] * 10)
    one, other = (learner.step(batch(), 0, 0, 0.0) for learner in (plain, weighted))
    for place, name in enumerate(plain.term_names):
        if name.endswith("/ce"):
            torch.testing.assert_close(other[place], 3 * one[place])


# ---------------------------------------------------------------------------------------------- regularisers


def test_stochastic_depth_rises_as_timms_does() -> None:
    config = tiny(method="joint", model={"vit": {"drop_path": 0.3, "depth": 4}, "agent": {"drop_path": 0.2}})
    networks = Networks(config, 10)
    assert networks.vit is not None
    assert networks.agent is not None

    def rates(module: nn.Module, name: str) -> list[float]:
        paths = [getattr(block, name) for block in module.blocks]  # type: ignore[union-attr]
        return [path.drop_prob if isinstance(path, DropPath) else 0.0 for path in paths]

    assert rates(networks.vit, "drop_path1") == pytest.approx([0, 0.1, 0.2, 0.3])
    assert rates(networks.agent, "path") == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])
    shared = Networks(tiny(method="shared", model={"vit": {"drop_path": 0.3, "depth": 4}}), 10)
    assert shared.agent is not None
    assert rates(shared.agent, "path") == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_block_that_is_left_out_passes_its_input_on() -> None:
    block = AgentBlock(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), 3, "pre", 0.0, 0.5)
    x = torch.randn(64, 3, 4, 4)
    torch.manual_seed(0)
    same = (block.train()(x) == x).flatten(1).all(1)
    assert 4 < int(same.sum()) < 30  # a quarter of 64 has lost both branches
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


# ------------------------------------------------------------------------------------------------ optimisers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [None, 0.7])
def test_groups_of_parameters_are_timms(method: str, layers: float | None) -> None:
    optim = {"decay_vectors": False, "layer_decay": layers, "lr": 1e-2, "weight_decay": 0.1}
    learner = Learner(tiny(method=method, optim=optim), 10, ONE)
    found = {p: g for group in learner.groups for g in group.optimizer.param_groups for p in g["params"]}
    assert set(found) == set(learner.networks.parameters())
    vit = learner.networks.vit
    if vit is not None:
        kind = {"layer_decay": layers} if layers else {}
        timms = create_optimizer_v2(vit, "adamw", 1e-2, 0.1, **kind).param_groups
        for group in timms:
            for p in group["params"]:
                assert found[p]["weight_decay"] == group["weight_decay"]
                assert found[p].get("lr_scale", 1.0) == group.get("lr_scale", 1.0)
    agent = learner.networks.agent
    if agent is not None and layers:
        scales = [found[p]["lr_scale"] for p in (agent.stem.weight, agent.blocks[0].norm1.weight, agent.head.bias)]  # type: ignore
        assert scales == pytest.approx([0.7**3, 0.7**2, 1.0])
        assert found[agent.head.bias]["weight_decay"] == 0  # type: ignore[union-attr, index]
    learner.step(batch(), 0, 0, 0.0)
    assert {g["lr"] / g.get("lr_scale", 1.0) for g in found.values()} == {1e-2}


def test_all_is_decayed_at_one_rate_by_default() -> None:
    for group in Learner(tiny(), 10, ONE).groups:
        (only,) = group.optimizer.param_groups
        assert only["weight_decay"] == 0.05
        assert len(only["params"]) == len(group.parameters)


@pytest.mark.parametrize("name", ["lion", "lamb", "nadamw", "adafactorbv", "muon"])
def test_any_optimiser_of_timm_takes_timms_steps(name: str) -> None:
    learner = Learner(tiny(method="vit", optim={"name": name, "clip_norm": None}), 10, ONE)
    other = Learner(tiny(method="vit", optim={"name": name, "clip_norm": None}), 10, ONE).networks
    optimizer = create_optimizer_v2(list(other.parameters()), name, 2e-3, 0.05, 0.0)
    for step in range(3):
        data = batch(seed=step)
        learner.step(data, step, 0, 0.0)
        optimizer.zero_grad()
        other.train()
        F.cross_entropy(other.features(data.images)["vit"].logits, data.labels).backward()
        optimizer.step()
    for (key, one), two in zip(learner.networks.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamv", "optim.name='adamv': expected adamw, sgd or an optimiser of timm; the nearest is 'adam"),
        ("adahessian", "optim.name='adahessian': timm's optimiser cannot be used here: "),
        ("kron", "optim.name='kron': not used here, because it compiles itself first"),
    ],
)
def test_an_optimiser_that_cannot_be_used_is_one_line(name: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny(optim__name=name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- averaged weights


@pytest.mark.parametrize("method", METHODS)
def test_averaged_weights_by_hand(method: str) -> None:
    config = tiny(method=method, optim__ema=0.6)
    learner = Learner(config, 10, ONE)
    slow = {name: value.clone() for name, value in learner.networks.state_dict().items()}
    for step in range(6):
        learner.step(batch(seed=step), step, 0, 0.0)
        decay = 0.0 if step < 2 else min(0.6, 1 - step ** (-2 / 3))
        for name, value in learner.networks.state_dict().items():
            slow[name] = decay * slow[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
    assert learner.ema is not None
    for name, value in learner.ema.module.state_dict().items():
        torch.testing.assert_close(value, slow[name], msg=lambda m, n=name: f"{n}: {m}")
    counts = learner.evaluate([batch(40, seed=9)])
    apart = Learner(tiny(method=method), 10, ONE)
    apart.networks.load_state_dict(learner.ema.module.state_dict())
    for net, own in apart.evaluate([batch(40, seed=9)]).items():
        averaged = counts[net].ema
        assert averaged is not None
        assert averaged == own


def test_averaged_weights_are_evaluated_predicted_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["optim.ema=0.99", "schedule.epochs=1", "data.fraction=0.1", "tracking.enabled=false"]
    assert main(["train", "digits/shared", "--local", "name=run", *changes]) == 0
    names = {r.name for r in read_journal(tmp_path / "runs" / "run" / "metrics.jsonl")[0]}
    assert {"test/vit/ema_top1", "test/agent/ema_loss"} <= names
    capsys.readouterr()
    assert main(["eval", "run", "--local"]) == 0
    assert "vit, averaged weights: top-1" in capsys.readouterr().out
    assert main(["export", "run", "--format", "timm", "--ema"]) == 0
    assert main(["export", "run", "--format", "timm"]) == 0
    folder = tmp_path / "runs" / "run" / "export"
    one, two = ((folder / name / "model.safetensors").read_bytes() for name in ("run-vit", "run-vit-ema"))
    assert one != two
    assert main(["train", "digits/vit", "--local", "name=none", *changes[1:]]) == 0
    capsys.readouterr()
    assert main(["export", "none", "--format", "timm", "--ema"]) == 2
    assert "--ema: no averaged weights were kept: train with optim.ema=0.9999" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- precision, ending


@pytest.mark.parametrize("method", METHODS)
def test_fp16_scales_the_loss_and_trains_nearly_as_fp32(method: str) -> None:
    plain, half = (trained(4, method=method, precision=p) for p in ("fp32", "fp16"))
    assert half.state_dict()["scaler"]["scale"] > 1
    assert "scaler" not in plain.state_dict()
    pairs = zip(plain.networks.parameters(), half.networks.parameters(), strict=True)
    assert max(float((one - two).detach().abs().max()) for one, two in pairs) < 0.02
    with pytest.raises(UserError, match=r"precision=fp16: sharpness-aware steps are not scaled"):
        tiny(precision="fp16", optim__sam_rho=0.1)


def test_a_step_that_overflows_is_left_out_and_the_scale_falls() -> None:
    learner = Learner(tiny(precision="fp16"), 10, ONE)
    learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": 2.0**40})
    before = [p.detach().clone() for p in learner.networks.parameters()]
    learner.step(batch(), 0, 0, 0.0)
    assert learner.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, old) for p, old in zip(learner.networks.parameters(), before, strict=True))


@pytest.mark.parametrize("cut", [None, 3])
def test_a_run_without_progress_ends_and_is_tested_then(
    cut: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out accuracies 10, 30, 20, 25, ...: with a patience of two the fourth is the last."""
    curve = iter([10, 30, 20, 25, 25])  # the last one is measured again, with the test set
    real = Learner.evaluate

    def scored(self: Learner, batches: Any, answers: Any = None) -> Any:
        counts = real(self, batches, answers)
        if next(iter(counts.values())).total < 100:  # the held-out part
            counts["vit"] = counts["vit"]._replace(correct=next(curve), total=100)
        return counts

    monkeypatch.setattr(Learner, "evaluate", scored)
    config = tiny(
        method="vit", ray__storage_path=str(tmp_path), data={"held_out": 0.05}, schedule={"epochs": 9, "patience": 2}
    )

    def stop(report: Any) -> None:
        if report.epoch == cut:
            raise KeyboardInterrupt

    folder, _ = claim(config, resume=False, overwrite=False)
    if cut is None:
        result = fit(config, ONE, folder, on_epoch=stop)
    else:
        with pytest.raises(KeyboardInterrupt):
            fit(config, ONE, folder, on_epoch=stop)
        result = fit(config, ONE, claim(config, resume=True, overwrite=False)[0])
    assert (result["status"], result["epochs"]) == ("finished", 4)
    assert result["final"] is not None
    records = read_journal(folder.journal)[0]
    assert [r.epoch for r in records if r.name == "test/vit/top1"] == [3]
    assert [saved.epoch for saved in chosen(config, folder.path)] == [4]  # of the two that are kept, for MLflow


def test_patience_needs_held_out_images() -> None:
    with pytest.raises(UserError, match=r"schedule.patience=2: when to stop is decided on held-out images"):
        tiny(schedule__patience=2)


# ------------------------------------------------------------------------------------------------ all of it


def everything(method: str, name: str, storage: Path) -> Config:
    """All that a recipe can have, at once."""
    data = {"policy": "rand", "color_jitter": 0.3, "erase": 0.5, "mixup": 0.8, "cutmix": 1.0, "repeats": 2}
    optim = {"name": "nadamw", "ema": 0.9, "layer_decay": 0.8, "decay_vectors": False}
    return tiny(
        name=name,
        method=method,
        precision="fp16" if method == "joint" else "bf16" if method == "shared" else "fp32",
        model={"vit": {"drop_path": 0.2, "dropout": 0.1}, "agent": {"drop_path": 0.2, "dropout": 0.1}},
        data=data | {"augment": "crop", "crop_padding": 1, "sampling": "balanced", "held_out": 0.1},
        objective={"label_smoothing": 0.1, "class_weights": "balanced"},
        optim=optim | ({} if method == "joint" else {"sam_rho": 0.05}),
        schedule={"patience": 5},
        ray={"storage_path": str(storage)},
    )


@pytest.mark.parametrize("calls", [2, 4])  # of 4 steps an epoch, 3 are asked
@pytest.mark.parametrize("method", METHODS)
def test_with_everything_on_a_run_that_is_stopped_goes_on_bit_for_bit(method: str, calls: int, tmp_path: Path) -> None:
    def run(name: str, *, resume: bool = False, **options: Any) -> Any:
        config = everything(method, name, tmp_path)
        return fit(config, ONE, claim(config, resume=resume, overwrite=False)[0], **options)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", asked=after(calls))
    resumed = run("cut", resume=True)
    one, other = (state_of(tmp_path / name) for name in ("whole", "cut"))
    assert set(one) == set(other)
    assert sum(name.startswith("learner.ema.") for name in one) > 10
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {key: resumed[key] for key in ("final", "held_out", "steps")} == {
        key: whole[key] for key in ("final", "held_out", "steps")
    }


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    return load_file(saved.path)
