"""Whole trainer runs, through `Learner.step`."""

from __future__ import annotations

from typing import Any

import torch
from parity_kit import NAMES, Case, compare_items, config_of, learner_of, loss_items
from parity_networks import ROUNDED, named_totals
from torch import Tensor

from bootvit.config import Config, override
from bootvit.learner import Learner
from bootvit.models import Features
from bootvit.optim import learning_rate

STEPS = 1e-8  # the tolerance along a trajectory


def run_trajectory(case: Case) -> None:
    """The run as the reference does it, and with clipping at every step where that was recorded too."""
    case.tolerance = max(case.tolerance, STEPS)
    config = config_of(case, list(case.tensors["input.x"].shape[2:]))
    last = train(case, config, case.scalars, "final.")
    if "clip_every_step" in case.scalars:
        every = override(config, {"optim": {"clip_when": "every"}})
        other = train(case, every, case.scalars["clip_every_step"], "final_clip_every_step.")
        moved = max(float((other[name] - last[name]).abs().max()) for name in last if last[name].is_floating_point())
        key = "max_abs_param_difference_faithful_vs_clip_every_step"
        case.close(key, moved, case.scalars[key])


def train(case: Case, config: Config, expected: dict[str, Any], final: str) -> dict[str, Tensor]:
    """Evaluate, train, evaluate; returns the last weights under the reference's names."""
    learner, names = learner_of(case, config)
    seen = record_features(learner)
    evaluations = [evaluate(case, learner)]
    batches = split(case, "", "train_batches")
    for row in expected["steps"]:
        epoch, step = row["epoch"], row["step"]
        position = step - epoch * len(batches)
        images, labels = batches[position]
        seen.clear()
        progress = epoch + position / len(batches)
        record = learner.step(case.batch(images, labels), step, epoch, progress)
        compare_step(case, learner, row, dict(zip(learner.term_names, record, strict=True)), seen, labels)
    evaluations.append(evaluate(case, learner))
    compare_evaluations(case, evaluations, expected["evaluations"])
    compare_end(case, learner, expected, evaluations)
    state = names.dump(learner.networks.state_dict())
    for name, value in case.recorded(final).items():
        case.close(f"{final}{name}", state[name], value)
    return {name: value.cpu() for name, value in state.items()}


def record_features(learner: Learner) -> list[dict[Any, Features]]:
    """What the networks compute inside `step`: a list to which every forward pass appends its features."""
    seen: list[dict[Any, Features]] = []
    compute = learner.networks.features

    def recording(images: Tensor) -> dict[Any, Features]:
        features = compute(images)
        seen.append(features)
        return features

    learner.networks.features = recording  # type: ignore[method-assign]
    return seen


def split(case: Case, prefix: str, key: str) -> list[tuple[Tensor, Tensor]]:
    """The recorded images as consecutive batches."""
    sizes = case.config[key]
    images, labels = case.input(f"{prefix}x").split(sizes), case.input(f"{prefix}label").split(sizes)
    return list(zip(images, labels, strict=True))


def compare_step(
    case: Case,
    learner: Learner,
    row: dict[str, Any],
    record: dict[str, Tensor],
    seen: list[dict[Any, Features]],
    labels: Tensor,
) -> None:
    """One optimiser step: the rates, the items, the totals that were back-propagated, the norm of the weights after."""
    what, config = f"step {row['step']}", learner.config
    rates = [group.optimizer.param_groups[0]["lr"] for group in reversed(learner.groups)]
    case.close(f"{what}: lr", torch.tensor(rates, dtype=torch.float64), torch.tensor(row["lr"], dtype=torch.float64))
    with torch.no_grad():
        compare_items(case, what, loss_items(case, config, seen[0], labels), row["loss_dict"])
        if "second_pass_loss_dict" in row:
            compare_items(
                case, f"{what} again", loss_items(case, config, seen[1], labels), row["second_pass_loss_dict"]
            )
    case.equal(f"{what}: forward passes", len(seen), 2 if config.optim.sam_rho is not None else 1)
    losses = {net: record[f"{net}/loss"] for net in config.networks}
    if config.method == "joint":
        totals = {NAMES[net]: loss for net, loss in losses.items()}
    else:
        totals = {"joint" if config.method == "shared" else "total": sum(losses.values())}
    compare_items(case, f"{what}: totals", totals, row["totals"])
    norm = torch.stack([p.detach().square().sum() for p in learner.networks.parameters()]).sum().sqrt()
    case.close(f"{what}: param_norm", norm, row["param_norm"])


def evaluate(case: Case, learner: Learner) -> dict[str, dict[str, float]]:
    """The reference's evaluation: every value is the mean of the batches' means (quirk 20)."""
    config, batches = learner.config, split(case, "val_", "val_batches")
    rows: list[dict[str, dict[str, float]]] = []
    for images, labels in batches:
        counts = learner.evaluate([case.batch(images, labels)])
        learner.networks.eval()
        with torch.no_grad():
            batch = case.batch(images, labels)
            items = loss_items(case, config, learner.networks.features(batch.images), labels)
            terms = learner.networks(batch.images, labels)
        totals = named_totals(terms, config, 1.0)
        rows.append(
            {
                "loss_dict": {name: float(value) for name, value in items.items()},
                "loss": {name: float(value) for name, value in totals.items()},
                "acc1": {NAMES[net]: count.top1 / 100 for net, count in counts.items()},
                "acc5": {NAMES[net]: count.top5 / 100 for net, count in counts.items()},
            }
        )
    return {
        kind: {name: sum(row[kind][name] for row in rows) / len(rows) for name in rows[0][kind]} for kind in rows[0]
    }


def compare_evaluations(case: Case, actual: list[Any], expected: list[Any]) -> None:
    """Before training and after the last epoch; single networks have no names in theirs."""
    case.equal("evaluations", len(actual), len(expected))
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        what = f"evaluation {i}"
        compare_items(case, what, ours["loss_dict"], theirs["loss_dict"])
        if "acc" in theirs:
            case.close(f"{what}: loss", sum(ours["loss"].values()), theirs["loss"])
            case.close(f"{what}: top-1", sum(ours["acc1"].values()), theirs["acc"]["1"], ROUNDED)
            case.close(f"{what}: top-5", sum(ours["acc5"].values()), theirs["acc"]["5"], ROUNDED)
            continue
        compare_items(case, f"{what}: loss", ours["loss"], theirs["loss"])
        for kind in ("acc1", "acc5"):
            for name, value in theirs[kind].items():
                case.close(f"{what}: {kind} {name}", ours[kind][name], value, ROUNDED)


def compare_end(case: Case, learner: Learner, expected: dict[str, Any], evaluations: list[Any]) -> None:
    """The rate that a further epoch would have, and the best accuracy of the network that counts."""
    epochs = case.config["training"]["train_epochs"]
    rates = [learning_rate(group.schedule, group.base_lr, epochs) for group in reversed(learner.groups)]
    for rate, value in zip(rates, expected.get("lr_after_last_step", rates), strict=True):
        case.close("lr after the last step", rate, value)
    if "best_acc" not in expected:
        return
    case.equal("iterations", len(expected["steps"]), expected["iterations"])
    single = next(iter(evaluations[0]["acc1"]))
    master = case.config.get("mutual", {}).get("master", single)
    best = (0.0, 0)
    for evaluation, iteration in zip(evaluations, (0, expected["iterations"]), strict=True):
        top1 = round(evaluation["acc1"][master], 4)
        best = (top1, iteration) if top1 > best[0] else best
    case.equal("best accuracy, iteration", best, (expected["best_acc"], expected["best_iter"]))
