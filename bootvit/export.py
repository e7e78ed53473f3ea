"""A run's network in a format that others load: plain timm, plain torch, ONNX, `torch.export` or TorchScript."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from bootvit import standalone
from bootvit.card import model_card
from bootvit.config import Config, Network
from bootvit.data.facts import DataFacts, Preparation
from bootvit.data.resize import normalise
from bootvit.errors import RunFailed, UserError
from bootvit.evaluate import read_checkpoint
from bootvit.files import write_atomic, write_json
from bootvit.learner import Networks
from bootvit.models import Features
from bootvit.models.agent import Agent, TimmCNN
from bootvit.models.plain import plain
from bootvit.models.shapes import mirrors, vit_shape
from bootvit.models.shared import standing_alone
from bootvit.standalone.images import centre_crop, covered, enlarge
from bootvit.standalone.networks import load

ENDINGS = {"timm": "", "torch": "-torch", "onnx": ".onnx", "pt2": ".pt2", "torchscript": ".pt"}
PACKAGE = "bootvit_networks"  # the name that `bootvit.standalone` has outside of bootvit
FOLDER = ("config.json", "model.safetensors", "README.md")
FOLDERS = {"timm": {*FOLDER}, "torch": {*FOLDER, PACKAGE}}  # formats that are folders, and what is in them
FACTS = "facts.json"  # inside a TorchScript or a pt2 file

# timm's own models of the right kind, by the epsilon of their LayerNorm, which a file cannot name otherwise.
# The CLIP tower differs from a plain ViT in a norm before the blocks, and that can be switched off.
PLAIN: dict[float, tuple[str, dict[str, Any]]] = {
    1e-6: ("vit_base_patch16_224", {}),
    1e-5: ("vit_base_patch16_clip_224", {"pre_norm": False}),
}
DISTILLED: dict[float, tuple[str, dict[str, Any]]] = {1e-6: ("deit_base_distilled_patch16_224", {})}


ANY_BATCH = {0: torch.export.Dim("batch", min=1)}
TIMM_USE = """
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()  # or this folder's path
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
chances = model(transform(image)[None]).softmax(1)  # image: a PIL image in RGB; classes: label_names in config.json
""".strip()
TORCH_USE = """
from bootvit_networks.networks import load  # the package in this folder, which needs torch, timm and Pillow

network = load(".")  # or this folder's path
network.classify([open("image.jpg", "rb").read()])  # [{class: probability, ...}]
network.module  # normalised images (batch, 3, rows, columns) -> logits (batch, classes)
""".strip()


class Classifier(nn.Module):
    """One network of a run and nothing else: images (batch, 3, rows, cols), normalised, to logits (batch, classes)."""

    def __init__(self, config: Config, networks: Networks, net: Network, *, convolutions: bool = False) -> None:
        super().__init__()
        if convolutions:
            self.network: nn.Module | None = plain(config, network_of(networks, net))[0]
        elif net == "vit":
            self.network = networks.vit
        else:  # a shared agent computes with the ViT's weights, so it gets copies of those
            self.network = standing_alone(networks.agent) if isinstance(networks.agent, Agent) else networks.agent
        assert self.network is not None

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, rows, cols) -> (batch, classes)."""
        assert self.network is not None
        out = self.network(images)
        return out.logits if isinstance(out, Features) else out


class Facts(NamedTuple):
    """What a reader of the export needs to know besides the weights; `described` is it as JSON."""

    network: Network
    data: DataFacts

    def described(self) -> dict[str, Any]:
        """Plain lists, texts and numbers."""
        preparation = self.data.preparation
        whole = preparation.kind == "resize"
        return {
            "network": self.network,
            "classes": list(self.data.classes),
            "image_size": list(preparation.size),
            "mean": list(preparation.mean),
            "std": list(preparation.std),
            "kind": preparation.kind,
            "resize_to": list(preparation.size if whole else covered(preparation.size)),
            "interpolation": "bilinear",
            **crop_of(preparation),
            "fingerprint": self.data.fingerprint,
        }


def network_of(networks: Networks, net: Network) -> nn.Module:
    """One network of a run."""
    network = networks.vit if net == "vit" else networks.agent
    assert network is not None
    return network


class Source(NamedTuple):
    """The network that is written."""

    config: Config
    run_dir: Path
    networks: Networks
    facts: Facts
    convolutions: bool  # an agent is written as an ordinary CNN
    best: bool

    @property
    def classifier(self) -> Classifier:
        """It alone."""
        return Classifier(self.config, self.networks, self.facts.network, convolutions=self.convolutions).eval()

    def card(self, usage: str, library: str) -> str:
        """Its model card."""
        own = self.facts
        return model_card(self.config, self.run_dir, own.network, own.data, usage, library=library, best=self.best)


def export(
    config: Config,
    run_dir: Path,
    form: str,
    *,
    network: str | None = None,
    out: Path | None = None,
    best: bool = False,
    ema: bool = False,
    convolutions: bool = False,
) -> Path:
    """Write one network of the run's newest checkpoint, or its best; returns the file or the folder written.

    With `ema` its averaged weights.

    Beside a file lies a JSON file with what the file itself holds too: class names and how an image is prepared.
    `convolutions` makes of an agent an ordinary CNN of Conv2d layers with the same outputs, as `torch` always does.
    Nothing is at the target unless all of it is there and was checked.
    """
    if form not in ENDINGS:
        raise UserError(f"--format {form}: expected {', '.join(ENDINGS)}")
    if convolutions:
        check_convolutions(config, form, network)
        network = "agent"
    net = next((own for own in config.networks if network in (None, own)), None)
    if net is None:
        raise UserError(f"--network {network}: this run (method={config.method}) has only {', '.join(config.networks)}")
    target = out or run_dir / "export" / f"{config.name}-{net}{'-ema' if ema else ''}{ENDINGS[form]}"
    check_target(target, form, given=out is not None)
    if form == "torch" and config.data.channels != 3:
        raise UserError(f"--format torch: reads RGB images, and data.channels={config.data.channels}; use another one")
    source = opened(config, run_dir, net, best=best, ema=ema, convolutions=convolutions)
    write = {
        "timm": write_timm,
        "torch": write_torch,
        "onnx": write_onnx,
        "pt2": write_pt2,
        "torchscript": write_torchscript,
    }[form]
    if out is None:
        target.parent.mkdir(exist_ok=True)
    with staged(target) as made:
        write(source, made)
        if form not in FOLDERS:
            write_json(made.with_suffix(".json"), source.facts.described())
    return target


def opened(
    config: Config, run_dir: Path, net: Network, *, best: bool = False, ema: bool = False, convolutions: bool = False
) -> Source:
    """One network of a run's newest checkpoint, or its best, or its averaged weights, to be written."""
    state = read_checkpoint(run_dir, best=best, ema=ema)
    facts = Facts(net, DataFacts.from_dict(state["data"]))
    networks = Networks(config, len(facts.data.classes))
    networks.load_state_dict(state["learner"]["networks"])
    networks.float().eval()
    return Source(config, run_dir, networks, facts, convolutions, best)


def check_convolutions(config: Config, form: str, network: str | None) -> None:
    """Refuse --convolutions where there is no agent of ours to write."""
    if network == "vit" or "agent" not in config.networks:
        raise UserError("--convolutions: only an agent is an ordinary CNN: --network agent")
    if not mirrors(config.model.agent):
        raise UserError(f"--convolutions: {config.model.agent.name} is a CNN of timm already: leave it out")
    if form == "timm":
        raise UserError("--format timm: the agent is no model of timm; use torch, onnx, pt2 or torchscript")


def check_target(target: Path, form: str, *, given: bool) -> None:
    """Refuse a place that cannot be written to, before anything is computed."""
    if given and not target.parent.is_dir():
        raise UserError(f"--out {target}: there is no folder {target.parent}")
    if form not in FOLDERS:
        if target.is_dir():
            raise UserError(f"--out {target}: is a folder; --format {form} writes a file")
        if target.suffix == ".json":
            raise UserError(f"--out {target}: the JSON file beside the model has this name; use {ENDINGS[form]}")
        return
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target}: is a file; --format {form} writes a folder")
    if target.is_dir() and any(child.name not in FOLDERS[form] and child.suffix != ".py" for child in target.iterdir()):
        raise UserError(f"--out {target}: there are other files in this folder")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A place of the target's name in a hidden folder beside it; what is there at the end, and only then, is moved."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        yield hidden / target.name
        for made in sorted(hidden.iterdir()):
            place = target.parent / made.name
            if made.is_dir() and place.is_dir():  # an earlier export
                for file in made.iterdir():
                    if file.is_dir():
                        shutil.rmtree(place / file.name, ignore_errors=True)
                    os.replace(file, place / file.name)
            else:
                os.replace(made, place)
    finally:
        shutil.rmtree(hidden)


def example(config: Config) -> Tensor:
    """Two random images."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, config.data.channels, *config.image_size, generator=generator)


def crop_of(preparation: Preparation) -> dict[str, Any]:
    """timm's `crop_pct` and `crop_mode`, with which its evaluation transform prepares an image as we do."""
    if preparation.kind == "resize":
        return {"crop_pct": 1.0, "crop_mode": "squash"}
    rows, cols = preparation.size
    if rows != cols:
        return {"crop_pct": 224 / 256, "crop_mode": "center"}
    side = covered(preparation.size)[0]
    exact = rows / side
    # timm shrinks to floor(rows / crop_pct), which must not fall below the side by a rounding error
    return {"crop_pct": exact if math.floor(rows / exact) == side else rows / (side + 0.5), "crop_mode": "center"}


# -------------------------------------------------------------------------------------------------- timm


def write_timm(source: Source, folder: Path) -> None:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads, and what it needs to say so.

    The folder is loaded again, and its logits and its preparation of images compared, before this returns.
    """
    config, facts = source.config, source.facts
    model, architecture, arguments = timm_model(config, source.networks, facts.network)
    folder.mkdir()
    write_weights(model, folder)
    known, classes = facts.described(), list(facts.data.classes)
    timms: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    described = {
        "architecture": architecture,
        "num_classes": len(classes),
        "model_args": arguments,
        "label_names": classes,
        "pretrained_cfg": {
            "input_size": [config.data.channels, *known["image_size"]],
            "fixed_input_size": facts.network == "vit",
            "num_classes": len(classes),
            **{key: known[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
            # to fine-tune: a new head, other colours; timm would take weights of other channels for those of RGB
            "first_conv": timms.get("first_conv") if config.data.channels == 3 else None,
            "classifier": timms.get("classifier"),
        },
    }
    write_json(folder / "config.json", described)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = example(config)
    with torch.no_grad():
        difference = float((loaded(images) - model(images)).abs().max())
    if difference > 0:
        raise RunFailed(f"{folder}: timm's {architecture} differs by {difference:.3g} from the run's network")
    if config.data.channels == 3:  # timm's transforms are for RGB
        check_preparation(loaded, facts.data.preparation)
    write_atomic(folder / "README.md", source.card(TIMM_USE, "timm").encode())


def write_weights(model: nn.Module, folder: Path) -> None:
    """model.safetensors."""
    weights = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomic(folder / "model.safetensors", safetensors.torch.save(weights, metadata={"format": "pt"}))


def check_preparation(model: nn.Module, preparation: Preparation) -> None:
    """Raise `RunFailed` unless timm's own transform for this model makes of images what the run made of them."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    random = np.random.default_rng(0)
    for rows, cols in ((37, 53), (64, 64), (211, 149), (150, 401)):
        image = Image.fromarray(random.integers(0, 256, (rows, cols, 3), dtype=np.uint8))
        difference = float((transform(image) - prepared(image, preparation)).abs().max())
        if difference > 0:
            size = "x".join(map(str, preparation.size))
            raise RunFailed(f"timm prepares an image of {rows}x{cols} for {size} otherwise, by up to {difference:.3g}")


def prepared(image: Image.Image, preparation: Preparation) -> Tensor:
    """An RGB image as the run's evaluation sees it, (3, rows, cols)."""
    make = enlarge if preparation.kind == "resize" else centre_crop
    pixels = np.array(make(image, preparation.size))
    return normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None], preparation.mean, preparation.std)[0]


def timm_model(config: Config, networks: Networks, net: Network) -> tuple[nn.Module, str, dict[str, Any]]:
    """(the module, timm's name, arguments of `create_model`); raises `UserError` where plain timm has no such model."""
    channels = config.data.channels
    if net == "agent":
        if mirrors(config.model.agent):
            raise UserError(
                f"--format timm: {config.model.agent.name} is no model of timm; use torch, onnx, pt2 or torchscript"
            )
        assert isinstance(networks.agent, TimmCNN)
        return networks.agent.cnn, config.model.agent.name, {} if channels == 3 else {"in_chans": channels}
    vit, model = config.model.vit, networks.vit
    assert model is not None
    if vit.attention != "softmax":
        raise UserError(f"--format timm: model.vit.attention={vit.attention} is not in timm; use torch or onnx")
    shape = vit_shape(vit)
    arguments: dict[str, Any] = {
        "img_size": list(config.image_size),
        **({} if channels == 3 else {"in_chans": channels}),
        "patch_size": list(shape.patch),
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": (shape.mlp_width + 0.5) / shape.width,  # timm truncates the product
    }
    eps = model.norm.eps
    if not vit.name.startswith("bootvit_"):
        default = timm.create_model(vit.name, img_size=config.image_size) if vit.norm_eps is not None else model
        if default.norm.eps != eps:
            raise UserError(
                f"--format timm: {vit.name} with model.vit.norm_eps={eps} is not in timm; use torch or onnx"
            )
        return model, vit.name, arguments
    known = DISTILLED if shape.prefix_tokens == 2 else PLAIN
    if eps not in known:
        raise UserError(f"--format timm: model.vit.norm_eps={eps} is not in timm's {vit.name}; use torch or onnx")
    architecture, extra = known[eps]
    return model, architecture, arguments | extra


# ------------------------------------------------------------------------------------------- plain torch


def write_torch(source: Source, folder: Path) -> None:
    """A folder with the code that loads it, for torch and timm alone: an agent is an ordinary CNN in it.

    The folder is loaded again, and its logits compared, before this returns.
    """
    folder.mkdir()
    copy_package(folder / PACKAGE)
    write_weights_and_facts(source, folder)
    write_atomic(folder / "README.md", source.card(TORCH_USE, "pytorch").encode())
    images = example(source.config)
    with torch.no_grad():
        wanted, found = source.classifier(images), load(folder).module(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=lambda text: f"{folder}: {text}")


def write_weights_and_facts(source: Source, folder: Path) -> None:
    """model.safetensors and config.json, as `bootvit.standalone.networks.load` reads them."""
    module, architecture = plain(source.config, network_of(source.networks, source.facts.network))
    write_weights(module, folder)
    for given in source.config.imports if architecture.get("imports") else ():  # they register the network with timm
        if given.endswith(".py"):
            shutil.copyfile(given, folder / Path(given).name)
    write_json(folder / "config.json", {"architecture": architecture, **source.facts.described()})


def copy_package(target: Path) -> None:
    """The code that loads a network, under the name that it has outside of bootvit."""
    shutil.copytree(Path(standalone.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))


# ----------------------------------------------------------------------------------- graphs without Python


def write_onnx(source: Source, path: Path) -> None:
    """An ONNX graph for any batch size; its `metadata_props` are the facts, lists and numbers as JSON."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as err:
        raise UserError("--format onnx needs the packages onnx and onnxscript: pip install 'bootvit[export]'") from err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own internals while it exports
        program = torch.onnx.export(
            source.classifier,
            (example(source.config),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(ANY_BATCH,),
            verbose=False,
        )
    assert program is not None
    for key, value in source.facts.described().items():
        program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    program.save(path)


def write_pt2(source: Source, path: Path) -> None:
    """A graph of `torch.export` for any batch size, which `torch.export.load` reads; its extra file is the facts."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(source.classifier, (example(source.config),), dynamic_shapes=(ANY_BATCH,))
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={FACTS: json.dumps(source.facts.described())})
    write_atomic(path, buffer.getvalue())


def write_torchscript(source: Source, path: Path) -> None:
    """A traced module, which `torch.jit.load` reads without bootvit or timm; its extra file facts.json is the facts."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch calls its own format deprecated; it still writes and reads it
        traced = torch.jit.trace(source.classifier, example(source.config))  # type: ignore[no-untyped-call]
        buffer = io.BytesIO()  # torch's own writing hides why it fails, such as a full disk
        torch.jit.save(traced, buffer, _extra_files={FACTS: json.dumps(source.facts.described())})
    write_atomic(path, buffer.getvalue())
