"""Keys that a run's config sets and that do nothing in that run: a setting without effect is often a mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bootvit.config import SHIPPED, Config, flatten, leaves, read_layers
from bootvit.data import DataSplits, way_of
from bootvit.models.shapes import mirrors
from bootvit.optim import network_optim, network_schedule

# what these say of a network that a method does not train is not the user's; reference.yaml counts only as a whole
PRESETS = (
    *("base", "baseline", "cifar10", "cifar10-tiny", "cifar100", "digits", "finetune", "imagefolder", "imagenet"),
    *("small", "strong", "strong-224"),
)


@dataclass(frozen=True)
class Run:
    """A run's config, and what its data and the command line decide."""

    config: Config
    augment: str  # data.augment, with auto resolved
    in_memory: bool
    local: bool

    @property
    def one(self) -> bool:
        """Whether only one network is trained."""
        return len(self.config.networks) == 1

    @property
    def cnn(self) -> bool:
        """Whether a CNN of timm stands in the agent's place."""
        return "agent" in self.config.networks and not mirrors(self.config.model.agent)

    @property
    def no_vit(self) -> bool:
        """Whether only the agent is trained."""
        return "vit" not in self.config.networks

    @property
    def unclipped(self) -> bool:
        """Whether no network's gradient is clipped."""
        return all(optim.clip_norm is None for optim in self.optims)

    @property
    def optims(self) -> list[Any]:
        """The settings of every optimiser."""
        config = self.config
        return [network_optim(config.optim, net, config.method == "joint") for net in config.networks]

    @property
    def schedules(self) -> list[Any]:
        """The settings of every learning rate."""
        config = self.config
        return [network_schedule(config.schedule, net, config.method == "joint") for net in config.networks]

    def weighs(self, term: str) -> bool:
        """Whether a loss term between two networks counts."""
        return not self.one and any(getattr(getattr(self.config.objective, n), term) for n in self.config.networks)

    def decays(self) -> bool:
        """Whether a loss term that counts is decayed."""
        terms = ("ce",) if self.one else ("ce", "kd", "hint")
        weights = [getattr(self.config.objective, net) for net in self.config.networks]
        return any(getattr(own, term) for own in weights for term in terms if term in own.decayed)


Rule = tuple[str, Callable[[Run], bool], str]  # the beginnings of keys, when they are idle, and why

RULES: tuple[Rule, ...] = (
    ("model.agent. objective.agent.", lambda r: r.config.method == "vit", "method=vit trains no agent"),
    ("model.vit.", lambda r: r.no_vit and r.cnn, "a CNN of timm mirrors no ViT"),
    ("tracking.explain_images", lambda r: r.no_vit, "method=agent has no attention to look at"),
    (
        "model.vit.attention model.vit.norm_eps model.vit.dropout model.vit.pos_dropout model.vit.drop_path "
        "model.vit.weights "
        "objective.vit.",
        lambda r: r.no_vit,
        "method=agent trains no ViT",
    ),
    (
        "model.agent.norm model.agent.stem model.agent.patch model.agent.downsample model.agent.taps "
        "model.agent.heads model.agent.mlp_width model.agent.dropout model.agent.residual_dropout "
        "model.agent.drop_path model.agent.value_bias",
        lambda r: r.cnn,
        "a CNN of timm is as timm builds it",
    ),
    ("model.agent.value_bias", lambda r: r.config.method != "shared", "method=shared only"),
    ("model.agent.mlp_width", lambda r: r.config.method == "shared", "a shared agent has the ViT's MLPs"),
    (
        "model.agent.taps model.agent.heads",
        lambda r: r.config.method != "shared" and r.config.model.agent.name == "agent_small",
        "agent_small on its own weights has no heads",
    ),
    ("model.agent.stem_width", lambda r: r.config.model.agent.stem == "patch", "stem=resnet only"),
    ("model.agent.patch", lambda r: r.config.model.agent.stem == "resnet", "stem=patch only"),
    ("data.root", lambda r: r.config.data.source in ("digits", "dataset", "fake"), "the source needs no files"),
    ("data.dataset", lambda r: r.config.data.source != "dataset", "data.source=dataset only"),
    ("data.fraction_rule", lambda r: r.config.data.fraction == 1, "data.fraction=1"),
    ("data.crop_padding", lambda r: r.augment != "crop", "augment is not crop"),
    ("data.dct_scaling", lambda r: r.augment != "area" or r.config.data.channels != 3, "it is for areas of RGB images"),
    ("data.flip", lambda r: r.augment == "none", "augment is none"),
    ("data.color_jitter", lambda r: r.config.data.channels not in (1, 3), "the images are neither grey nor RGB"),
    ("data.value_range", lambda r: r.config.data.channels == 3, "RGB images have 8 bits"),
    ("data.policy_layers data.policy_strength", lambda r: r.config.data.policy != "rand", "data.policy is not rand"),
    ("data.resize", lambda r: not r.in_memory, "large images are always resized by PIL"),
    ("data.workers", lambda r: r.in_memory, "these images are kept in memory"),
    (
        "objective.vit.kd objective.vit.hint objective.agent.kd objective.agent.hint",
        lambda r: r.one,
        "only one network is trained",
    ),
    ("objective.temperature", lambda r: not r.weighs("kd"), "there is no kd"),
    ("objective.hint_pool objective.hint_norm", lambda r: not r.weighs("hint"), "there is no hint"),
    ("objective.hint_decay", lambda r: not r.decays(), "no term that counts is decayed"),
    (
        "objective.vit.decayed objective.agent.decayed",
        lambda r: r.config.objective.hint_decay == "none",
        "objective.hint_decay=none",
    ),
    ("optim.agent. schedule.agent.", lambda r: r.config.method != "joint", "method=joint only"),
    ("optim.momentum", lambda r: all(optim.name == "adamw" for optim in r.optims), "adamw has none"),
    ("optim.agent.momentum", lambda r: r.optims[-1].name == "adamw", "adamw has none"),
    ("optim.decay_vectors", lambda r: all(optim.weight_decay == 0 for optim in r.optims), "optim.weight_decay=0"),
    (
        "objective.label_smoothing objective.class_weights",
        lambda r: not any(getattr(r.config.objective, net).ce for net in r.config.networks),
        "there is no ce",
    ),
    ("optim.clip_scope", lambda r: r.config.method != "shared", "method=shared only"),
    ("optim.clip_when optim.clip_scope", lambda r: r.unclipped, "optim.clip_norm=null"),
    ("optim.sam_clip", lambda r: r.config.optim.sam_rho is None, "optim.sam_rho=null"),
    ("optim.sam_clip", lambda r: r.unclipped, "optim.clip_norm=null"),
    ("schedule.period", lambda r: all(s.kind == "constant" for s in r.schedules), "schedule.kind=constant"),
    ("schedule.agent.period", lambda r: r.schedules[-1].kind == "constant", "its kind is constant"),
    (
        "schedule.warmup_mode schedule.warmup_factor",
        lambda r: all(s.warmup_epochs == 0 for s in r.schedules),
        "there is no warm-up",
    ),
    (
        "schedule.agent.warmup_mode schedule.agent.warmup_factor",
        lambda r: r.schedules[-1].warmup_epochs == 0,
        "the agent has no warm-up",
    ),
    ("ray.cpus_per_worker ray.max_failures", lambda r: r.local, "--local"),
    (
        "tracking.uri tracking.experiment tracking.checkpoints tracking.moments tracking.model tracking.register",
        lambda r: not r.config.tracking.enabled,
        "tracking.enabled=false",
    ),
    ("tracking.moments", lambda r: r.config.tracking.checkpoints == "none", "tracking.checkpoints=none"),
)


def idle_keys(config: Config, *, augment: str, in_memory: bool, local: bool) -> list[str]:
    """`key (why)` of every key that is not at its default and that this run does not use, in the schema's order.

    `augment` is `data.augment` with auto resolved; `in_memory` says whether the images are kept decoded.
    """
    run = Run(config, augment, in_memory, local)
    reasons = [(prefixes.split(), why) for prefixes, idle, why in RULES if idle(run)]
    found = []
    for key in _set_keys(config):
        why = next((why for prefixes, why in reasons if any(_begins(key, p) for p in prefixes)), None)
        if why is not None:
            found.append(f"{key} ({why})")
    return found


def _begins(key: str, prefix: str) -> bool:
    return key.startswith(prefix) if prefix.endswith(".") else key == prefix


def _set_keys(config: Config) -> Iterator[str]:
    """The keys that differ from the schema's defaults, less those that the preset of these networks sets."""
    now, default = flatten(config), flatten(Config())
    shipped = [preset for name in PRESETS if _extends(now, preset := _leaves(name))]
    reference = _leaves("reference")
    whole = all(now[key] == value for key, value in reference.items())
    for key, value in now.items():
        bundled = whole and key in reference
        if value != default[key] and not bundled and not _says(shipped, key, value):
            yield key


def _says(presets: list[dict[str, Any]], key: str, value: Any) -> bool:
    """Whether a preset sets a key to this value; those of the data are the user's choice."""
    return not key.startswith("data.") and any(key in preset and preset[key] == value for preset in presets)


def _extends(now: dict[str, Any], preset: dict[str, Any]) -> bool:
    """Whether a run has a preset's ViT, so that the rest of it that agrees may well come from there."""
    return all(now[key] == value for key, value in preset.items() if key.startswith("model.vit."))


@lru_cache
def _leaves(preset: str) -> dict[str, Any]:
    """{dotted key: value} of a preset's file."""
    return leaves(read_layers(SHIPPED / "presets" / f"{preset}.yaml"))


def warn_of_idle_keys(config: Config, splits: DataSplits, *, local: bool) -> None:
    """Name the idle keys of a run that is about to be trained, in one line on stderr."""
    way = way_of(splits.train.table, config.data)
    idle = idle_keys(config, augment=way.augment, in_memory=way.place == "memory", local=local)
    if idle:
        print(f"bootvit: warning: these keys do nothing in this run: {', '.join(idle)}", file=sys.stderr)
