"""Starting from somebody's weights: those of a run, of an export, of a file in timm's format, or of timm's hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from bootvit import checkpoint
from bootvit.config import Config, Network
from bootvit.errors import RunFailed, UserError
from bootvit.files import read_json, write_atomic
from bootvit.learner import Networks
from bootvit.models.agent import TimmCNN
from bootvit.models.zoo import build_vit, pretrained

EXPECTED = "expected a run's folder, its checkpoint, a timm export, or a file (.pth, .pt, .bin, .safetensors, .npz)"
ABOUT = "bootvit"  # metadata of a file of ours: the data's facts, epoch and step, as JSON
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys under which files keep weights; timm's order

Tensors = dict[str, Tensor]


class Source(NamedTuple):
    """What a config's `weights` stands for."""

    tensors: Tensors  # by the network's own names, or, where `foreign`, by names that timm translates
    classes: tuple[str, ...] | None = None  # the names of its head's classes; None: nobody knows
    grid: tuple[int, int] | None = None  # (rows, cols) of patches that its position table has; None: as timm guesses
    foreign: bool = False


class Fitted(NamedTuple):
    """Those of a source's tensors that a network takes, and one line about the rest."""

    tensors: Tensors
    note: str


def warm_start(networks: Networks, config: Config, classes: tuple[str, ...]) -> list[str]:
    """Load what `model.vit.weights` and `model.agent.weights` name; returns a line for each: what is used, what not.

    A head is used only for the same class names in the same order, or, where a file does not name its classes, for
    as many. Raises `UserError` where nothing fits.
    """
    notes = []
    for net in named(config):
        fitted = fit(network_of(networks, net), read(config, net), classes, key_of(config, net))
        network_of(networks, net).load_state_dict(fitted.tensors, strict=False)
        notes.append(fitted.note)
    return notes


def check_weights(config: Config, classes: tuple[str, ...] | None = None) -> list[str]:
    """Refuse weights that `warm_start` could not use; returns its lines. `classes` None: heads are not looked at."""
    if not named(config):
        return []
    with torch.device("meta"):
        networks = Networks(config, len(classes or "ab"))
    for net in named(config):
        given = getattr(config.model, net).weights
        if given != "timm" and Path(given).is_relative_to(config.run_dir):
            raise UserError(
                f"{key_of(config, net)}: lies in this run's own folder, which starts anew: use another name="
            )
    return [
        fit(network_of(networks, net), read(config, net), classes, key_of(config, net)).note for net in named(config)
    ]


def named(config: Config) -> list[Network]:
    """The networks of the run whose config names weights."""
    return [net for net in config.networks if getattr(config.model, net).weights is not None]


def key_of(config: Config, net: Network) -> str:
    """`key=value`, for messages."""
    return f"model.{net}.weights={getattr(config.model, net).weights}"


def network_of(networks: Networks, net: Network) -> nn.Module:
    """One network, a CNN of timm without our wrapper: a shared agent has none of the ViT's parameters."""
    module = networks.vit if net == "vit" else networks.agent
    assert module is not None
    return module.cnn if isinstance(module, TimmCNN) else module


# ------------------------------------------------------------------------------------------------- reading


def read(config: Config, net: Network) -> Source:
    """The weights that the config names; `UserError` for what is none."""
    given, key = getattr(config.model, net).weights, key_of(config, net)
    if given == "timm":
        return from_hub(config, net)
    if "://" in given:
        raise UserError(f"{key}: is not read from there: download it, and give the file's path")
    path = Path(given)
    if not path.exists():
        raise UserError(f"{key}: there is no such file or folder; {EXPECTED}")
    if not path.is_dir():
        return from_file(config, net, path)
    if (path / "config.yaml").is_file():
        state = newest_state(path)
        if state is None:
            raise UserError(f"{key}: this run has no usable checkpoint")
        return from_run(state, net, key)
    if (path / "model.safetensors").is_file():
        return from_file(config, net, path / "model.safetensors")
    raise UserError(f"{key}: this folder is neither a run nor a timm export; {EXPECTED}")


def from_hub(config: Config, net: Network) -> Source:
    """timm's own weights, which it downloads or has at hand."""
    name, key = getattr(config.model, net).name, key_of(config, net)
    known = timm.models.get_pretrained_cfg(name)
    if known is None or not known.has_weights:
        raise UserError(f"{key}: timm has no weights of {name}; {EXPECTED}")
    try:
        return Source(pretrained(config, net).state_dict())
    except Exception as err:  # a network and a hub fail in many ways, which have no class in common
        reason = " ".join(str(err).split())[:200]
        if "loading state_dict" in reason:
            raise UserError(f"{key}: timm's {name} has other sizes than model.{net} asks for: {reason}") from err
        raise RunFailed(f"{key}: the weights of {name} could not be downloaded: {reason}") from err


def from_file(config: Config, net: Network, path: Path) -> Source:
    """A file of weights: ours, or in a format that timm reads."""
    key = key_of(config, net)
    if path.stat().st_size == 0:
        raise UserError(f"{key}: {path.name} is empty; {EXPECTED}")
    if path.suffix == ".npz":
        return from_npz(config, net, path)
    if path.suffix == ".safetensors" and ours(path, key):
        return from_run(checkpoint.unpack(path.read_bytes(), key), net, key)
    content = load(path, key)
    wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    weights = clean_state_dict(content[wrapper] if wrapper else content)
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{key}: {path.name} holds no weights; {EXPECTED}")
    about = path.with_name("config.json")
    if path.name != "model.safetensors" or not about.is_file():
        return Source(tensors, foreign=True)
    described = read_json(about)
    labels, size = described.get("label_names"), described.get("pretrained_cfg", {}).get("input_size")
    grid = grid_of(tensors, size[1:]) if size else None
    return Source(tensors, tuple(labels) if labels else None, grid, foreign=grid is None)


def load(path: Path, key: str) -> dict[str, Any]:
    """A file's content; only tensors and plain values are accepted (`weights_only`)."""
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch and safetensors raise many kinds for a file that is none of theirs
        raise UserError(f"{key}: {path.name} is not a readable file of tensors and plain values; {EXPECTED}") from err
    if not isinstance(content, Mapping):
        raise UserError(f"{key}: {path.name} holds no weights by name, but a {type(content).__name__}; {EXPECTED}")
    return dict(content)


def ours(path: Path, key: str) -> bool:
    """Whether a file is a checkpoint of ours; `UserError` if it is not readable."""
    try:
        return checkpoint.is_checkpoint(path)
    except UserError as err:
        raise UserError(f"{key}: {path.name} is not a readable file of tensors and plain values; {EXPECTED}") from err


def weights_only(saved: checkpoint.Saved, folder: Path) -> Path:
    """Write a checkpoint's networks without the optimiser, and what the run knows of its data; returns the file."""
    state = checkpoint.load(saved)
    networks = {key: state["learner"][key] for key in ("networks", "ema") if key in state["learner"]}
    kept = {"learner": networks, "data": state["data"]}
    path = folder / f"weights-{saved.path.stem}.safetensors"
    write_atomic(path, checkpoint.pack(kept))
    return path


def newest_state(run_dir: Path) -> dict[str, Any] | None:
    """The newest verified checkpoint of a run; where a run came from MLflow without one, its newest weights."""
    saved = checkpoint.newest(run_dir / "checkpoints")
    if saved is not None:
        return checkpoint.load(saved)
    weights = sorted((run_dir / "checkpoints").glob("weights-*.safetensors"))
    return checkpoint.unpack(weights[-1].read_bytes(), weights[-1]) if weights else None


def from_npz(config: Config, net: Network, path: Path) -> Source:
    """Google's format, which timm loads into a ViT of ours."""
    key = key_of(config, net)
    if net != "vit":
        raise UserError(f"{key}: only a ViT is read from .npz")
    try:
        with np.load(path) as arrays:
            head = next((arrays[name].shape[-1] for name in arrays.files if name.endswith("head/bias")), None)
        donor = build_vit(config, head or 1)
        donor.load_pretrained(str(path))
    except Exception as err:  # a missing name, another shape, another format: timm checks none of them
        reason = " ".join(str(err).split())[:200]
        raise UserError(f"{key}: timm does not read this as a {config.model.vit.name}: {reason}") from err
    heads = () if head else prefixes(donor)
    return Source({name: value for name, value in donor.state_dict().items() if not name.startswith(tuple(heads))})


def from_run(state: Mapping[str, Any], net: Network, key: str) -> Source:
    """One network of a checkpoint of ours."""
    saved: Tensors = state["learner"]["networks"]
    tensors = {name.removeprefix(f"{net}."): value for name, value in saved.items() if name.startswith(f"{net}.")}
    if not tensors:
        raise UserError(f"{key}: this run has no {net}, only {', '.join({name.split('.')[0] for name in saved})}")
    tensors = {name.removeprefix("cnn."): value for name, value in tensors.items()}  # a CNN of timm
    data = state["data"]
    size = data.get("preparation", {}).get("size")
    return Source(tensors, tuple(data["classes"]), grid_of(tensors, size) if size else None)


def grid_of(tensors: Tensors, size: list[int]) -> tuple[int, int] | None:
    """(rows, cols) of a ViT's patches in images of `size`; None for other networks."""
    if "patch_embed.proj.weight" not in tensors or "pos_embed" not in tensors:
        return None
    rows, cols = tensors["patch_embed.proj.weight"].shape[-2:]
    return size[0] // rows, size[1] // cols


# ------------------------------------------------------------------------------------------------- fitting


def fit(module: nn.Module, source: Source, classes: tuple[str, ...] | None, key: str) -> Fitted:
    """Choose, by name and shape, what a network takes; `UserError` if that is nothing but a head."""
    own, heads = module.state_dict(), prefixes(module)
    given = translated(module, source, key)
    head, about_head = head_of(own, {n: t for n, t in given.items() if n.startswith(heads)}, source, classes)
    body = {name: tensor for name, tensor in given.items() if not name.startswith(heads)}
    fitting = {name: tensor for name, tensor in body.items() if name in own and own[name].shape == tensor.shape}
    lines = [
        listed("not in the file", [n for n in own if n not in body and n not in given and own[n].is_floating_point()]),
        listed("not in the network", [name for name in body if name not in own]),
        listed("of another shape", [name for name in body if name in own and name not in fitting], given, own),
    ]
    if not any(tensor.ndim > 1 for tensor in fitting.values()):  # a bias, or a norm's counter, fits by accident
        why = "; ".join(line for line in lines if line)
        raise UserError(f"{key}: none of its {len(given)} tensors fits this network, heads aside: {why}")
    taken, rest = fitting | head, "; ".join(line for line in (about_head, *lines) if line)
    return Fitted(taken, f"{key}: {len(taken)} of the network's {len(own)} tensors" + (f"; {rest}" if rest else ""))


def listed(what: str, names: list[str], given: Tensors | None = None, own: Tensors | None = None) -> str:
    """`3 not in the file (a, b, …)`, or nothing; with two sets of tensors also the first's shapes in both."""
    if not names:
        return ""
    shown = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
    if given is not None and own is not None:
        first = names[0]
        shown = f"{first}: {tuple(given[first].shape)}, here {tuple(own[first].shape)}" + ("; …" * (len(names) > 1))
    return f"{len(names)} {what} ({shown})"


def prefixes(module: nn.Module) -> tuple[str, ...]:
    """What the names of the tensors of a network's heads begin with."""
    timms: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {"classifier": "head"}
    names = timms.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def head_of(own: Tensors, given: Tensors, source: Source, classes: tuple[str, ...] | None) -> tuple[Tensors, str]:
    """The head's tensors, if they are used, and what is to be said of that."""
    if not given or classes is None:
        return {}, "" if given else "it has no head: a fresh one"
    fits = all(name in own and own[name].shape == tensor.shape for name, tensor in given.items())
    if source.classes is not None:
        if source.classes == classes and fits:
            return given, ""
        return {}, "a fresh head: its own is for other classes, or for the same in another order"
    if fits:
        return given, f"its head is used: {len(classes)} classes as here, of unknown names"
    count = max(len(tensor) for tensor in given.values())
    return {}, f"a fresh head: its own is for {count} classes, not {len(classes)}"


def translated(module: nn.Module, source: Source, key: str) -> Tensors:
    """A source's tensors under the network's names, with patches and position table resized as timm does it."""
    if not isinstance(module, VisionTransformer):
        return source.tensors
    if source.foreign:
        try:
            return dict(checkpoint_filter_fn(dict(source.tensors), module, adapt_layer_scale=True))
        except (RuntimeError, ValueError, KeyError, AttributeError, IndexError) as err:
            reason = " ".join(str(err).split())[:200]
            raise UserError(f"{key}: timm cannot translate this file for the network: {reason}") from err
    return resized(module, source) if source.grid else source.tensors


def resized(vit: VisionTransformer, source: Source) -> Tensors:
    """Our own patches and position table in the sizes of another ViT; the table's grid need not be square."""
    tensors, grid = dict(source.tensors), source.grid
    assert grid is not None
    table, patches = tensors["pos_embed"], tensors["patch_embed.proj.weight"]
    prefix = table.shape[1] - grid[0] * grid[1]
    if vit.pos_embed is not None and prefix == vit.pos_embed.shape[1] - vit.patch_embed.num_patches:
        size = list(vit.patch_embed.grid_size)
        tensors["pos_embed"] = resample_abs_pos_embed(table, size, list(grid), prefix)
    wanted = vit.patch_embed.proj.weight.shape[-2:]
    if patches.shape[-2:] != wanted:
        tensors["patch_embed.proj.weight"] = resample_patch_embed(patches, list(wanted))
    return tensors
