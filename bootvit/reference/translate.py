"""The reference's settings as a `Config` in which every quirk of the reference is switched on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bootvit.config import Config, Network, merge, with_overrides
from bootvit.errors import UserError
from bootvit.load import make_config
from bootvit.models.shapes import agent_maps, poolable, vit_grid, vit_shape
from bootvit.reference.files import Node
from bootvit.reference.networks import ReadAgent, ReadViT, read_agent, read_shared_agent, read_vit
from bootvit.reference.training import (
    OTHER,
    Hint,
    Sections,
    read_data,
    read_epochs,
    read_learner,
    read_mutual_loss,
    read_single_loss,
)

QUIRKS: Sections = {
    "model": {"init": "reference"},
    "data": {"fraction_rule": "reference", "resize": "pil"},
}
# the training of a file that only describes networks
NO_TRAINING: Sections = {"optimizer": {"name": "AdamW", "lr": 1e-3, "weight_decay": 0.05}, "lr_schedule": None,
                         "train_epochs": 240}  # fmt: skip


def translate(settings: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """The reference's settings (`read_settings`) under our names, with the user's `KEY=VALUE` on top.

    Raises `UserError` for what the reference refuses or would fail at, and for what we do not support, by name.
    """
    top = Node(settings, f"{origin}: ")
    own, origins = with_overrides({}, overrides)
    if top.has("mutual"):
        mutual = top.section("mutual")
        shared = mutual.only("joint_training", (True, False), default=False)
        sections, hint = (_shared if shared else _joint)(top, mutual)
    else:
        sections, hint = _single(top), None
    data = _common(top, sections, own.get("data", {}))
    config = make_config(merge(merge(QUIRKS, data), own), origin, origins)
    if hint is not None:
        _check_hint(hint, config)
    return config


def _common(top: Node, sections: Sections, given: Mapping[str, Any]) -> Sections:
    """Add what every kind of run has: the data set, its class count, the validation's batch."""
    data: Sections = {}
    if top.has("dataset"):
        data = read_data(top.section("dataset"), given)
    own = sections["data"].get("image_size")
    if own and data and own != data["image_size"] and "image_size" not in given:
        raise UserError(f"{top.where('dataset.resize')}={data['image_size']}: the Transformer is made for {own}")
    validation = top.section("validation", {})
    data["eval_batch_size"] = validation.take("batch_size", 128)
    validation.drop("num_workers")
    validation.done()
    if top.has("num_classes"):
        data["num_classes"] = top.take("num_classes")
    top.drop("sub_configs")
    top.done()
    return merge(sections, {"data": {key: value for key, value in data.items() if value is not None}})


# ------------------------------------------------------------------------------------------- one network


def _single(top: Node) -> Sections:
    model, training = top.section("model"), top.section("training", NO_TRAINING)
    optim, schedule = read_learner(training)
    clip = training.take("clip_max_norm", None)
    sync = training.only("sync_bn", (True, False), default=False)
    training.drop("decay_strategy")  # for mutual training only
    data, epochs, tracking = read_epochs(training)
    weight = read_single_loss(top.section("loss"))
    net = "vit" if model.peek("name") in ("vit", "deit") else "agent"
    if net == "vit":
        vit = read_vit(model)
        models: Sections = {"vit": vit.section}
        data["image_size"] = vit.image_size
    else:
        models = _alone(read_agent(model), sync)
    return {
        "method": net,
        "model": models,
        "data": data,
        "objective": {net: {"ce": weight}},
        "optim": optim | {"clip_norm": clip},
        "schedule": epochs | schedule,
        "tracking": tracking,
    }


def _alone(agent: ReadAgent, sync: bool) -> Sections:
    """Our `model` for a CNN alone: it takes its width and depth from the Transformer that it would mirror."""
    section = agent.section | {"sync_norm": sync}
    if agent.width is None:
        return {"agent": section}
    return {"agent": section, "vit": {"width": agent.width, "depth": agent.depth, "heads": 1}}


# ------------------------------------------------------------------------------------------ two networks


def _joint(top: Node, mutual: Node) -> tuple[Sections, Hint | None]:
    mutual.only("master", ("vit", "cnn"), default="vit")  # decides which accuracy is the best: we keep both
    networks, files = mutual.section("cfg"), top.section("sub_configs", {})
    networks.only("name", ("base_mutual",))
    optims, schedules, layers = {}, {}, {}
    models: dict[Network, Node] = {}
    for net, name in OTHER.items():
        given = networks.section(name)
        path = str(given.take("cfg_path"))
        file = Node(files.take(path), f"{path}: ")
        optims[net], schedules[net] = read_learner(file.section("training", NO_TRAINING))
        if "sam_rho" in optims[net]:
            raise UserError(f"{path}: training.optimizer.sam is not supported in mutual training")
        optims[net]["clip_norm"] = given.take("clip_max_norm", None)
        models[net], layers[net] = file.section("model"), given.listing("extract_layers", str, [])
        given.done()
    for node in (networks, mutual):
        node.done()
    vit, agent = read_vit(models["vit"]), read_agent(models["agent"])
    sections, hint, sync = _mutual(top, top.section("training", NO_TRAINING), shared=False)
    _check_mirror(vit, agent, networks.place)
    if hint is not None:
        _check_layers(layers, vit, agent, networks.place)
    return _paired(sections, vit, agent, sync) | {
        "method": "joint",
        "optim": optims["vit"] | {"agent": _explicit(optims["agent"]), "clip_when": "first_step"},
        "schedule": sections["schedule"] | schedules["vit"] | {"agent": schedules["agent"]},
    }, hint


def _shared(top: Node, mutual: Node) -> tuple[Sections, Hint | None]:
    networks, training = mutual.section("cfg"), top.section("training", NO_TRAINING)
    networks.only("name", ("joint_model",))
    vit = read_vit(networks.section("vit"))
    agent = read_shared_agent(networks.section("cnn"), vit)
    clipping = networks.section("joint", {})
    clip = clipping.take("clip_max_norm", None)
    mutual.only("master", ("vit", "cnn") if clip is None else ("vit",), default="vit")  # whose weights are clipped
    layers = {net: networks.listing(f"extract_layers_{name}", str, []) for net, name in OTHER.items()}
    for node in (clipping, networks, mutual):
        node.done()
    optim, schedule = read_learner(training)
    if "sam_rho" in optim:
        raise UserError(f"{training.where('optimizer.sam')} is not supported in mutual training")
    sections, hint, sync = _mutual(top, training, shared=True)
    if hint is not None:
        _check_layers(layers, vit, agent, networks.place)
    return _paired(sections, vit, agent, sync) | {
        "method": "shared",
        "optim": optim | {"clip_norm": clip, "clip_when": "first_step", "clip_scope": "vit"},
        "schedule": sections["schedule"] | schedule,
    }, hint


def _mutual(top: Node, training: Node, *, shared: bool) -> tuple[Sections, Hint | None, bool]:
    """What both kinds of mutual training say in the main file: (sections, hint, whether BatchNorm is synchronised)."""
    sync = training.only("sync_bn", (True, False), default=False)
    training.drop("optimizer", "lr_schedule", "clip_max_norm")  # read where they count, or without effect
    decay = training.section("decay_strategy", {})
    objective, hint = read_mutual_loss(top.section("loss"), decay, shared=shared)
    data, epochs, tracking = read_epochs(training)
    return {"objective": objective, "data": data, "schedule": epochs, "tracking": tracking}, hint, sync


def _paired(sections: Sections, vit: ReadViT, agent: ReadAgent, sync: bool) -> Sections:
    models = {"vit": vit.section, "agent": agent.section | {"sync_norm": sync}}
    return sections | {"model": models, "data": sections["data"] | {"image_size": vit.image_size}}


def _explicit(optim: Sections) -> Sections:
    """The agent's own settings, in which null would mean the Transformer's."""
    return optim | {"clip_norm": "none" if optim["clip_norm"] is None else optim["clip_norm"]}


# ------------------------------------------------------------------------------------------------ checks


def _check_mirror(vit: ReadViT, agent: ReadAgent, place: str) -> None:
    if agent.width is not None and (agent.width, agent.depth) != (vit.width, vit.depth):
        raise UserError(
            f"{place}: a CNN of {agent.depth} layers {agent.width} wide with a Transformer of {vit.depth}, "
            f"{vit.width} wide, is not supported, only equal ones"
        )


def _check_layers(layers: Mapping[Network, Any], vit: ReadViT, agent: ReadAgent, place: str) -> None:
    """The hint compares every pair of layers, in order."""
    if agent.depth is None:
        raise UserError(f"{place}: a hint between a Transformer and {agent.section['name']} is not supported")
    forms: dict[Network, str] = {"vit": "transformer.layers.{}", "agent": "layers.{}"}
    for net, form in forms.items():
        if list(layers[net]) != [form.format(i) for i in range(vit.depth)]:
            raise UserError(
                f"{place}: extract_layers of {OTHER[net]} = {layers[net]}: only all of "
                f"{form.format(0)} to {form.format(vit.depth - 1)}, in order, is supported"
            )


def _check_hint(hint: Hint, config: Config) -> None:
    """What the reference asserts when it computes the hint, whatever its weight."""
    shape = vit_shape(config.model.vit)
    if hint.start_id != shape.prefix_tokens:
        raise UserError(
            f"{hint.place}.start_id={hint.start_id} is not supported: this Transformer has {shape.prefix_tokens} "
            "tokens before its patches"
        )
    if hint.norm and hint.embed_dim != shape.width:
        raise UserError(f"{hint.place}.embed_dim={hint.embed_dim}: the networks are {shape.width} wide")
    grid = vit_grid(config)
    for i, sides in enumerate(agent_maps(config)):
        equal = grid[0] * grid[1] == sides[0] * sides[1]
        if not equal and not hint.auto_resample:
            reason = "needs auto_resample"
        elif not poolable(grid, sides, "raster"):
            reason = "is no whole ratio"
        else:
            continue
        raise UserError(
            f"{hint.place}: layer {i}, {grid[0]}x{grid[1]} tokens (ViT) to {sides[0]}x{sides[1]} (CNN), {reason}"
        )
