"""Cases of one forward and backward pass: single networks and pairs."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from parity_kit import (
    JOINT_ITEMS,
    NAMES,
    SHARED_ITEMS,
    Case,
    ParityError,
    build,
    compare_items,
    loss_items,
)
from torch import Tensor

from bootvit.config import Config
from bootvit.learner import Learner, Networks
from bootvit.models import Features
from bootvit.objective import loss_terms, total_loss
from bootvit.optim import linear_decay
from bootvit.reference import WeightNames
from bootvit.reference.files import Node
from bootvit.reference.training import read_mutual_loss

COARSE = 1e-4  # our float32 against the reference's
ROUNDED = 1e-6  # accuracies, which the reference computes in float32


def run_single(case: Case) -> None:
    """One network: logits, cross entropy, every gradient, BatchNorm's buffers."""
    learner, names = build(case)
    networks, config = learner.networks, learner.config
    (net,) = config.networks
    x, labels = case.input("x"), case.input("label")
    with torch.no_grad():
        networks.eval()
        logits = networks.features(x)[net].logits
        case.close("output.eval", logits, case.golden("output.eval"))
        case.close("ce_eval", torch.nn.functional.cross_entropy(logits, labels), case.scalars["ce_eval"])
        single = copy.deepcopy(networks).float().features(x.float())[net].logits
        case.close("output_fp32.eval", single, case.golden("output_fp32.eval"), COARSE)
    networks.train()
    own = networks.features(x)[net]
    case.close("output.train", own.logits, case.golden("output.train"))
    loss = loss_items(case, config, {net: own}, labels)["cls"]
    case.close("ce_train", loss, case.scalars["ce_train"])
    if "output.train_dist" in case.tensors:
        case.close("output.train_dist", own.kd_logits, case.golden("output.train_dist"))
        distilled = torch.nn.functional.cross_entropy(own.kd_logits, labels)
        case.close("ce_train_dist", distilled, case.scalars["ce_train_dist"])
        loss = loss + 0.5 * distilled
    loss.backward()
    compare_buffers(case, networks, names)
    grads = gradients(networks, names)
    without = {names.theirs(name) for name, p in networks.named_parameters() if p.grad is None}
    case.equal("params_without_grad", sorted(without), sorted(case.scalars.get("params_without_grad", [])))
    compare_gradients(case, {f"grad.{name}": grad for name, grad in grads.items()})


def run_mutual(case: Case) -> None:
    """Two networks: features, every loss item, totals at several epochs, the gradients of the totals."""
    learner, names = build(case)
    networks, config = learner.networks, learner.config
    x, labels = case.input("x"), case.input("label")
    check_evaluation(case, learner, x, labels)
    networks.train()
    features = networks.features(x)
    compare_outputs(case, features)
    compare_features(case, features, config)
    compare_buffers(case, networks, names)
    compare_items(
        case, "loss_items_train", loss_items(case, config, features, labels), case.scalars["loss_items_train"]
    )
    terms = {net: loss_terms(*_sides(features, net), labels, getattr(config.objective, net), config.objective)
             for net in features}  # fmt: skip
    for epoch, totals in case.scalars["totals_train_by_epoch"].items():
        compare_items(case, f"totals at {epoch}", named_totals(terms, config, learner.decay(int(epoch))), totals)
    check_decay(case, learner)
    total_loss(terms, config.objective, learner.decay(case.config["grad_epoch"])).backward()
    total = {"vit": "joint", "cnn": "joint"} if config.method == "shared" else {"vit": "vit", "cnn": "cnn"}
    grads = gradients(networks, names)
    compare_gradients(case, {f"grad.{total[name.split('.')[1]]}_total.{name}": grad for name, grad in grads.items()})
    counts = {NAMES[net]: sum(p.grad is not None for p in networks.own_parameters(net)) for net in features}
    last = list(case.scalars["grad_params_present_at_step"].values())[-1]
    case.equal("parameters with a gradient", counts, last)


def _sides(features: dict[Any, Features], net: str) -> tuple[Features, Features]:
    return features[net], features["agent" if net == "vit" else "vit"]


def check_evaluation(case: Case, learner: Learner, x: Tensor, labels: Tensor) -> None:
    """The reference evaluator's values: eval mode, never decayed."""
    networks, config, expected = learner.networks, learner.config, case.scalars["eval"]
    networks.eval()
    with torch.no_grad():
        features = networks.features(x)
        terms = networks(x, labels)
        coarse = copy.deepcopy(networks).float().features(x.float())
    for net, own in features.items():
        key = f"eval.{NAMES[net]}"
        case.close(f"output.{key}", own.logits, case.golden(f"output.{key}"))
        case.close(f"output_fp32.{key}", coarse[net].logits, case.golden(f"output_fp32.{key}"), COARSE)
    compare_items(case, "eval", loss_items(case, config, features, labels), expected["loss_dict"])
    compare_items(case, "eval totals", named_totals(terms, config, 1.0), expected["totals"])
    for net, counts in learner.evaluate([case.batch(x, labels)]).items():
        case.close(f"{net} top-1", counts.top1 / 100, expected["acc1"][NAMES[net]], ROUNDED)
        case.close(f"{net} top-5", counts.top5 / 100, expected["acc5"][NAMES[net]], ROUNDED)


def named_totals(terms: dict[Any, Any], config: Config, decay: float) -> dict[str, Tensor]:
    """The weighted totals under the reference's names."""
    if config.method == "shared":
        return {"joint": total_loss(terms, config.objective, decay)}
    return {NAMES[net]: own.total(getattr(config.objective, net), decay) for net, own in terms.items()}


def check_decay(case: Case, learner: Learner) -> None:
    """`decay_ITEM_by_epoch`: ITEM is a weight's name, such as hint_vit, of a joint loss or of a shared one."""
    own = SHARED_ITEMS if learner.config.method == "shared" else JOINT_ITEMS
    for key, by_epoch in case.scalars.items():
        found = re.fullmatch(r"decay_(.+)_by_epoch", key)
        for epoch, value in by_epoch.items() if found else ():
            if found[1] in own:
                objective = learner.config.objective.model_dump()
                compare_decay(case, f"{key}[{epoch}]", objective, own[found[1]], learner.decay(int(epoch)), value)
            else:  # a name that this loss has no term for: only the settings know of it
                strategy, epochs = case.config["training"].get("decay_strategy", {}), learner.config.schedule.epochs
                check_decay_setting(case, strategy, found[1], int(epoch), epochs, value)


def check_decay_setting(
    case: Case, strategy: dict[str, Any], item: str, epoch: int, epochs: int, expected: float
) -> None:
    """The factor of an item, through the settings of the mutual losses that have such a term: joint, shared or both."""
    losses = [
        (name, shared, items[item])
        for name, shared, items in (
            ("base_mutual_loss", False, JOINT_ITEMS),
            ("joint_mutual_loss", True, SHARED_ITEMS),
        )
        if item in items
    ]
    if not losses:
        raise ParityError(f"{case.name}: no mutual loss has a term {item!r}")
    for name, shared, term in losses:
        loss = {"name": name, "weight_dict": {}, "loss_items": []}
        objective, _ = read_mutual_loss(Node(loss, "loss"), Node(dict(strategy), "decay_strategy"), shared=shared)
        compare_decay(case, f"decay {item} {epoch} ({name})", objective, term, linear_decay(epoch, epochs), expected)


def compare_decay(
    case: Case, what: str, objective: dict[str, Any], term: tuple[tuple[str, ...], str], factor: float, expected: float
) -> None:
    """The recorded factor against `factor` where the objective says that the term fades, and 1 elsewhere."""
    networks, name = term
    for net in networks:
        on = objective["hint_decay"] == "linear" and name in objective[net]["decayed"]
        case.close(f"{what}, {net}", factor if on else 1.0, expected)


def compare_outputs(case: Case, features: dict[Any, Features]) -> None:
    """Train-mode logits; a DeiT's second head has `dist` in its name."""
    for key in [key for key in case.tensors if re.match(r"output\.train[._]", key)]:
        net = "vit" if "vit" in key.split(".") or ".vit_" in key else "agent"
        own = features[net]
        case.close(key, own.kd_logits if "dist" in key else own.logits, case.golden(key))


def compare_features(case: Case, features: dict[Any, Features], config: Config) -> None:
    """The maps that the hint compares; the reference's tokens include the ones in front of the patches."""
    for i, block in enumerate(features["agent"].blocks):
        key = f"output.feature.cnn.layers.{i}"
        case.close(key, block.permute(0, 3, 1, 2), case.golden(key))
    prefix = 2 if "distilled" in config.model.vit.name else 1
    for i, block in enumerate(features["vit"].blocks):
        key = f"output.feature.vit.transformer.layers.{i}"
        case.close(key, block.flatten(1, 2).transpose(0, 1), case.golden(key)[prefix:])


def compare_buffers(case: Case, networks: Networks, names: WeightNames) -> None:
    """BatchNorm's buffers after one train-mode forward."""
    buffers = names.dump(dict(networks.named_buffers()))
    for name, value in case.recorded("after_train_forward.").items():
        case.close(f"after_train_forward.{name}", buffers[name], value)


def gradients(networks: Networks, names: WeightNames) -> dict[str, Tensor]:
    """Every gradient under the reference's name; what both networks use is there once."""
    return names.dump({name: p.grad for name, p in networks.named_parameters() if p.grad is not None})


def compare_gradients(case: Case, actual: dict[str, Tensor]) -> None:
    """Exactly the recorded gradients; where a weight is zero, the reference has zeros and we compute nothing."""
    expected = {key for key in case.tensors if key.startswith("grad.")}
    if actual.keys() - expected:
        raise ParityError(f"{case.name}: a gradient that is not recorded: {sorted(actual.keys() - expected)[0]}")
    for key in sorted(expected):
        value = case.golden(key)
        case.close(key, actual.get(key, torch.zeros_like(value)), value)
