"""A case of the parity kit, and the comparison of what we compute with what it recorded.

A case is NAME.json (settings with the reference's keys, numbers) and, for most kinds, NAME.safetensors (tensors).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bootvit.config import Config, override
from bootvit.data.batches import Batch
from bootvit.learner import Learner, World
from bootvit.models import Features
from bootvit.objective import block_hint, kd_loss
from bootvit.reference import WeightNames, translate

SETTINGS = ("model", "mutual", "loss", "training", "dataset", "validation", "sub_configs", "num_classes")
GOLDEN = ("output.", "grad.", "after_train_forward.", "final.", "final_clip_every_step.", "output_fp32.")
CPU = torch.device("cpu")
NAMES = {"vit": "vit", "agent": "cnn"}  # our network: the reference's
# The names of weights, which `decay_items` lists too: {name: (our networks, our term)} of a mutual loss
HINTS = {"hint_vit": (("vit",), "hint"), "hint_cnn": (("agent",), "hint")}
JOINT_ITEMS = {"cls": (("vit", "agent"), "ce"), "kd": (("vit", "agent"), "kd")} | HINTS
SHARED_ITEMS = {
    "cls_vit": (("vit",), "ce"),
    "cls_cnn": (("agent",), "ce"),
    "kd_vit": (("vit",), "kd"),
    "kd_cnn": (("agent",), "kd"),
} | HINTS


class ParityError(AssertionError):
    """A value that differs, or one that the comparison has no place for."""


@dataclass
class Case:
    """One case, on one device and in one precision."""

    name: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    device: torch.device = CPU
    precision: str = "fp64"
    tolerance: float = 1e-9
    worst: float = 0.0  # the largest error so far, |a - b| / (1 + |b|)
    where: str = ""
    unused: set[str] = field(default_factory=set)

    @property
    def config(self) -> dict[str, Any]:
        """The case's settings."""
        return dict(self.facts["config"])

    @property
    def scalars(self) -> dict[str, Any]:
        """The recorded numbers."""
        return dict(self.facts.get("scalars", {}))

    def close(self, what: str, actual: Any, expected: Any, tolerance: float | None = None) -> None:
        """Compare numbers or tensors, absolutely and relatively; remember the largest error."""
        a = torch.as_tensor(actual, dtype=torch.float64).detach().cpu()
        b = torch.as_tensor(expected, dtype=torch.float64).cpu()
        if a.shape != b.shape:
            raise ParityError(f"{self.name}: {what}: shape {tuple(a.shape)}, recorded {tuple(b.shape)}")
        error = float(((a - b).abs() / (1 + b.abs())).max()) if a.numel() else 0.0
        if tolerance is None and not error <= self.worst:
            self.worst, self.where = error, what
        if not error <= (tolerance or self.tolerance):
            raise ParityError(f"{self.name}: {what}: error {error:.3g}, allowed {tolerance or self.tolerance:.0e}")

    def equal(self, what: str, actual: Any, expected: Any) -> None:
        """Compare what has no rounding."""
        if actual != expected:
            raise ParityError(f"{self.name}: {what}: {actual!r}, recorded {expected!r}")

    def golden(self, key: str) -> Tensor:
        """A recorded tensor, which counts as compared from now on."""
        if key not in self.tensors:
            raise ParityError(f"{self.name}: the case has no tensor {key!r}")
        self.unused.discard(key)
        return self.tensors[key]

    def recorded(self, prefix: str) -> dict[str, Tensor]:
        """Every recorded tensor under a prefix, without it."""
        return {k.removeprefix(prefix): self.golden(k) for k in self.tensors if k.startswith(prefix)}

    def input(self, key: str) -> Tensor:
        """An input, in float64 on the device (labels stay integers)."""
        value = self.tensors[f"input.{key}"].to(self.device)
        return value.double() if value.is_floating_point() else value

    def batch(self, images: Tensor, labels: Tensor) -> Batch:
        """A batch as the learner wants it."""
        return Batch(images if self.precision == "fp64" else images.float(), labels, len(labels))

    def done(self) -> None:
        """Fail if a recorded tensor was compared with nothing."""
        if self.unused:
            raise ParityError(
                f"{self.name}: nothing here computes {sorted(self.unused)[0]!r} ({len(self.unused)} in all)"
            )


def names_of(folder: Path) -> list[str]:
    """Every case of a folder."""
    return sorted(path.stem for path in folder.glob("*.json"))


def read_case(folder: Path, name: str) -> Case:
    """Load a case; one without tensors has none."""
    facts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    file = folder / f"{name}.safetensors"
    return as_case(name, facts, load_file(file) if file.exists() else {})


def as_case(name: str, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Case:
    """A case from its parts."""
    return Case(name, facts, tensors, unused={key for key in tensors if key.startswith(GOLDEN)})


def settings(case: Case) -> dict[str, Any]:
    """The part of a case's config that a YAML file of the reference would have."""
    return {key: value for key, value in case.config.items() if key in SETTINGS}


def config_of(case: Case, image_size: list[int] | None = None) -> Config:
    """The case's settings as our config; a CNN alone does not say how large its images are."""
    single_cnn = case.config.get("model", {}).get("name") in ("cnn", "official_models")
    sizes = [f"data.image_size={image_size}"] if image_size and single_cnn else []
    return override(translate(settings(case), case.name, sizes), {"precision": case.precision})


def learner_of(case: Case, config: Config) -> tuple[Learner, WeightNames]:
    """Networks with the recorded weights, and their optimisers, fresh."""
    learner = Learner(config, case.config["num_classes"], World(0, 1, case.device))
    names = WeightNames(config)
    state = {key.removeprefix("state."): value for key, value in case.tensors.items() if key.startswith("state.")}
    learner.networks.load_state_dict(names.load(state, learner.networks))
    return learner, names


def build(case: Case) -> tuple[Learner, WeightNames]:
    """The same, from the case's own settings."""
    return learner_of(case, config_of(case, list(case.tensors["input.x"].shape[2:])))


def loss_items(case: Case, config: Config, features: dict[Any, Features], labels: Tensor) -> dict[str, Tensor]:
    """Every undecayed loss item under the reference's name, whatever its weight."""
    if len(features) == 1:
        return {"cls": torch.nn.functional.cross_entropy(next(iter(features.values())).logits, labels)}
    shared, listed = config.method == "shared", case.config["loss"]["loss_items"]
    out: dict[str, Tensor] = {}
    for net, own in features.items():
        peer_net = "agent" if net == "vit" else "vit"
        peer, me, other = features[peer_net], NAMES[net], NAMES[peer_net]
        if "joint_ce" in listed or "cross_entropy" in listed:
            ce = torch.nn.functional.cross_entropy(own.logits, labels)
            out[f"joint.cls_{me}" if shared else f"{me}.cls"] = ce
        if "joint_kd" in listed or "mutual_kd" in listed:
            kd = kd_loss(own.kd_logits, peer.kd_logits, config.objective.temperature)
            out[f"joint.kd_{me}.{other}" if shared else f"{me}.kd.{other}"] = kd
        if "joint_hint" in listed or "mutual_hint" in listed:
            beginning = f"joint.hint_{me}.{other}" if shared else f"{me}.hint_{me}.{other}"
            for i, (a, b) in enumerate(zip(own.blocks, peer.blocks, strict=True)):
                hint = block_hint(a, b.detach(), config.objective.hint_pool, config.objective.hint_norm)
                out[f"{beginning}_layer_{i}"] = hint
    return out


def compare_items(case: Case, what: str, actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same names with the same values."""
    case.equal(f"{what}: names", sorted(actual), sorted(expected))
    for name, value in expected.items():
        case.close(f"{what}.{name}", actual[name], value)
