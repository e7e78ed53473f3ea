"""The `training`, `loss` and `dataset` sections of the reference's settings as our sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bootvit.config import Network
from bootvit.errors import UserError
from bootvit.reference.files import Node

OTHER: dict[Network, str] = {"vit": "vit", "agent": "cnn"}  # our name of a network: the reference's
SOURCES = {"cifar_10": "cifar10", "cifar_100": "cifar100", "imagenet": "imagenet"}
WEIGHT_DECAY = {"adamw": 0.01, "sgd": 0.0}  # the framework's, where a file gives none

Sections = dict[str, Any]


def read_optimizer(optimizer: Node) -> Sections:
    """`optimizer` as our `optim`: name, lr, weight decay, momentum, and the radius of SAM."""
    if optimizer.has("base"):
        sam = optimizer.section("sam")
        sam.only("adaptive", (False,), default=False)
        rho = sam.number("rho", 0.05)
        section = read_optimizer(optimizer.section("base")) | {"sam_rho": rho, "sam_clip": False}
        sam.done()
    else:
        name = str(optimizer.only("name", ("AdamW", "SGD", "adamw", "sgd"))).lower()
        section = {
            "name": name,
            "lr": optimizer.number("lr"),
            "weight_decay": optimizer.number("weight_decay", WEIGHT_DECAY[name]),
            "momentum": optimizer.number("momentum", 0.0) if name == "sgd" else 0.0,
        }
    optimizer.done()
    return section


def read_schedule(schedule: Node | None) -> Sections:
    """`lr_schedule` as our `schedule`, without the number of epochs; null is a constant rate."""
    if schedule is None:
        return {"kind": "constant", "warmup_epochs": 0.0}
    schedule.only("name", ("cosine_annealing",))
    schedule.only("eta_min", (0,), default=0)
    section = {
        "kind": "cosine",
        "period": schedule.whole("T_max"),
        "warmup_epochs": schedule.number("warmup_iters", 0),
        "warmup_mode": schedule.only("warmup_mode", ("linear", "constant"), default="linear"),
        "warmup_factor": schedule.number("warmup_factor", 0.2),
    }
    schedule.done()
    return section


def read_learner(training: Node) -> tuple[Sections, Sections]:
    """(optim, schedule) of one optimiser."""
    optim = read_optimizer(training.section("optimizer"))
    given = training.take("lr_schedule")
    return optim, read_schedule(None if given is None else Node(given, training.where("lr_schedule")))


def read_epochs(training: Node) -> tuple[Sections, Sections, Sections]:
    """(data, schedule, tracking): what the main file's `training` says besides optimisers; the rest must be read."""
    data = {"batch_size": training.take("batch_size", 64)}
    schedule = {"epochs": training.take("train_epochs"), "per": "epoch"}
    tracking = {"log_every": training.take("print_interval", 20)}
    training.drop("val_interval", "num_workers")  # we evaluate by epochs; results do not depend on either
    training.done()
    return data, schedule, tracking


def read_single_loss(loss: Node) -> float:
    """The weight of the cross entropy."""
    loss.only("name", ("ce_loss",))
    weights = loss.section("weight_dict")
    weight = weights.number("cls")
    weights.done()
    loss.done()
    return float(weight)


class Hint(NamedTuple):
    """`hint_cfg`: what it demands of the networks."""

    place: str
    start_id: int
    norm: bool
    embed_dim: int | None
    auto_resample: bool


def read_mutual_loss(loss: Node, decay: Node, *, shared: bool) -> tuple[Sections, Hint | None]:
    """The mutual `loss` and the `decay_strategy` as our `objective`, and the hint if it is among the terms."""
    loss.only("name", ("joint_mutual_loss" if shared else "base_mutual_loss",))
    items = dict(zip(("joint_ce", "joint_kd", "joint_hint") if shared else
                     ("cross_entropy", "mutual_kd", "mutual_hint"), ("ce", "kd", "hint"), strict=True))  # fmt: skip
    listed = loss.listing("loss_items", str)
    unknown = [item for item in listed if item not in items]
    if unknown:
        raise UserError(f"{loss.where('loss_items')}: {unknown[0]!r} is not supported, only {', '.join(items)}")
    terms = {items[item] for item in listed}
    weights, decayed = _read_weights(loss.section("weight_dict"), shared=shared), _decayed(decay)
    networks: Sections = {}
    for net in OTHER:
        keys = _weight_names(net, shared=shared)
        networks[net] = {term: weights[key] if term in terms else 0.0 for term, key in keys.items()}
        networks[net]["decayed"] = [term for term, key in keys.items() if key in decayed]
    hint = _read_hint(loss.section("hint_cfg")) if "hint" in terms else None
    objective = {
        "temperature": loss.number("kd_temp", 4.0),
        "hint_pool": "raster",
        "hint_norm": hint.norm if hint else True,
        "hint_decay": "linear" if decayed else "none",
    }
    loss.drop("hint_cfg")
    loss.done()
    return objective | networks, hint


def _weight_names(net: Network, *, shared: bool) -> dict[str, str]:
    """{our term: the name of its weight, which `decay_items` lists too} of one network in a mutual loss."""
    name = OTHER[net]
    own = f"_{name}" if shared else ""  # in joint training both networks have one weight
    return {"ce": f"cls{own}", "kd": f"kd{own}", "hint": f"hint_{name}"}


def _all_weight_names(*, shared: bool) -> list[str]:
    return list(dict.fromkeys(name for net in OTHER for name in _weight_names(net, shared=shared).values()))


def _read_weights(weights: Node, *, shared: bool) -> dict[str, float]:
    """Every weight that a loss item can have; an item without one is ignored."""
    read = {name: float(weights.number(name, 0.0)) for name in _all_weight_names(shared=shared)}
    weights.done()
    return read


def _decayed(decay: Node) -> list[str]:
    """The weights that fade to zero.

    The names of the other kind of mutual loss are taken too: there they fade a term, here none, as in the reference.
    """
    items = decay.listing("decay_items", str, [])
    known = list(dict.fromkeys(_all_weight_names(shared=False) + _all_weight_names(shared=True)))
    unknown = [item for item in items if item not in known]
    if unknown:
        raise UserError(f"{decay.where('decay_items')}: {unknown[0]!r} is no term of a loss, only {', '.join(known)}")
    used = decay.only("use_decay", (True, False), default=False)
    decay.done()
    return items if used else []


def _read_hint(hint: Node) -> Hint:
    hint.only("proj_student", (False,), default=False)
    read = Hint(
        hint.place,
        hint.whole("start_id", 1),
        hint.only("norm", (True, False), default=False),
        hint.take("embed_dim", None),
        hint.only("auto_resample", (True, False), default=False),
    )
    hint.done()
    return read


def read_data(dataset: Node, given: Mapping[str, Any]) -> Sections:
    """`dataset` as our `data`; `given` are the user's own `data` settings, which go before."""
    name = dataset.take("name")
    if "source" not in given and name not in SOURCES:
        raise UserError(
            f"{dataset.where('name')}={name!r} has no source here: give data.source=imagefolder and data.root"
        )
    train, val = dataset.section("train"), dataset.section("val", {})
    train.only("split", ("train",), default="train")
    val.drop("split")
    section: Sections = {"root": dataset.take("root", None), "image_size": dataset.size("resize", 224)}
    fraction = train.take("make_partial", None)
    section |= {"source": SOURCES.get(name), "fraction": 1.0 if fraction is None else fraction}
    for node in (train, val, dataset):
        node.done()
    return section
