"""A run's network in a format that others load: plain timm, ONNX or TorchScript."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bootvit.checkpoint import write_atomic, write_json
from bootvit.config import Config, Network
from bootvit.errors import RunFailed, UserError
from bootvit.evaluate import newest_checkpoint
from bootvit.learner import Networks
from bootvit.models.agent import TimmCNN
from bootvit.models.zoo import mirrors, vit_shape

ENDINGS = {"timm": "", "onnx": ".onnx", "torchscript": ".pt"}  # timm writes a folder

# timm's own models of the right kind, by the epsilon of their LayerNorm, which a file cannot name otherwise.
# The CLIP tower differs from a plain ViT in a norm before the blocks, and that can be switched off.
PLAIN: dict[float, tuple[str, dict[str, Any]]] = {
    1e-6: ("vit_base_patch16_224", {}),
    1e-5: ("vit_base_patch16_clip_224", {"pre_norm": False}),
}
DISTILLED: dict[float, tuple[str, dict[str, Any]]] = {1e-6: ("deit_base_distilled_patch16_224", {})}


class Classifier(nn.Module):
    """One network of a run: images (batch, 3, rows, cols), normalised, to logits (batch, classes)."""

    def __init__(self, networks: Networks, network: Network) -> None:
        super().__init__()
        self.networks = networks  # all of them: a shared agent computes with the ViT's weights
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, rows, cols) -> (batch, classes)."""
        if self.network == "vit":
            assert self.networks.vit is not None
            return self.networks.vit(images)  # type: ignore[no-any-return]
        assert self.networks.agent is not None
        return self.networks.agent(images).logits  # type: ignore[no-any-return]


def export(config: Config, run_dir: Path, form: str, *, network: str | None = None, out: Path | None = None) -> Path:
    """Write one network of the run's newest checkpoint; returns the file (timm: the folder) that was written.

    Beside an ONNX or TorchScript file lies a JSON file with classes, image size, mean and deviation.
    """
    if form not in ENDINGS:
        raise UserError(f"--format {form}: expected {', '.join(ENDINGS)}")
    net = next((own for own in config.networks if network in (None, own)), None)
    if net is None:
        raise UserError(f"--network {network}: this run (method={config.method}) has only {', '.join(config.networks)}")
    state = newest_checkpoint(run_dir)
    facts = state["data"] | {"network": net, "image_size": list(config.image_size)}
    networks = Networks(config, len(facts["classes"]))
    networks.load_state_dict(state["learner"]["networks"])
    networks.float().eval()
    target = out or run_dir / "export" / f"{config.name}-{net}{ENDINGS[form]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if form == "timm":
        write_timm(config, networks, net, facts, target)
        return target
    write = write_onnx if form == "onnx" else write_torchscript
    write(Classifier(networks, net).eval(), example(config), target)
    write_json(target.with_suffix(".json"), facts)
    return target


def example(config: Config) -> Tensor:
    """Two random images."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *config.image_size, generator=generator)


# -------------------------------------------------------------------------------------------------- timm


def write_timm(config: Config, networks: Networks, net: Network, facts: dict[str, Any], folder: Path) -> None:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads, and what it needs to say so.

    The folder is loaded again and its logits compared before this returns.
    """
    model, architecture, arguments = timm_model(config, networks, net)
    folder.mkdir(parents=True, exist_ok=True)
    if any(child.name not in ("config.json", "model.safetensors") for child in folder.iterdir()):
        raise UserError(f"--out {folder}: there are other files in this folder")
    weights = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows, cols = config.image_size
    described = {
        "architecture": architecture,
        "num_classes": len(facts["classes"]),
        "model_args": arguments,
        "label_names": facts["classes"],
        "pretrained_cfg": {
            "input_size": [3, rows, cols],
            "fixed_input_size": net == "vit",
            "num_classes": len(facts["classes"]),
            "mean": facts["mean"],
            "std": facts["std"],
            "interpolation": "bilinear",
        },
    }
    write_atomic(folder / "config.json", (json.dumps(described, indent=2) + "\n").encode())
    images = example(config)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        difference = float((plain(images) - model(images)).abs().max())
    if difference > 0:
        raise RunFailed(f"{folder}: timm's {architecture} differs by {difference:.3g} from the run's network")


def timm_model(config: Config, networks: Networks, net: Network) -> tuple[nn.Module, str, dict[str, Any]]:
    """(the module, timm's name, arguments of `create_model`); raises `UserError` where plain timm has no such model."""
    if net == "agent":
        if mirrors(config.model.agent):
            raise UserError(f"--format timm: {config.model.agent.name} is no model of timm; use onnx or torchscript")
        assert isinstance(networks.agent, TimmCNN)
        return networks.agent.cnn, config.model.agent.name, {}
    vit, model = config.model.vit, networks.vit
    assert model is not None
    if vit.attention != "softmax":
        raise UserError(f"--format timm: model.vit.attention={vit.attention} is not in timm; use onnx or torchscript")
    shape = vit_shape(vit)
    arguments: dict[str, Any] = {
        "img_size": list(config.image_size),
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
            raise UserError(f"--format timm: {vit.name} with model.vit.norm_eps={eps} is not in timm; use onnx")
        return model, vit.name, arguments
    known = DISTILLED if shape.prefix_tokens == 2 else PLAIN
    if eps not in known:
        raise UserError(f"--format timm: model.vit.norm_eps={eps} is not in timm's {vit.name}; use onnx or torchscript")
    architecture, extra = known[eps]
    return model, architecture, arguments | extra


# ----------------------------------------------------------------------------------- graphs without Python


def write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    """An ONNX graph for any batch size."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as err:
        raise UserError("--format onnx needs the packages onnx and onnxscript: pip install 'bootvit[export]'") from err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own internals while it exports
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert program is not None
    program.save(path)


def write_torchscript(model: nn.Module, images: Tensor, path: Path) -> None:
    """A traced module, which `torch.jit.load` reads without bootvit or timm."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch calls its own format deprecated; it still writes and reads it
        traced = torch.jit.trace(model, images)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, path)
