"""The reference's names of weights and ours, both ways, and the optimiser moments that it numbers.

A single network's names have no prefix; two networks are `models.cnn.` and `models.vit.`. The shared model lists what
both networks use under both prefixes; we keep it once, as the ViT's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bootvit.config import Config, Network
from bootvit.errors import UserError
from bootvit.learner import Learner, Networks
from bootvit.models.shapes import mirrors

Pairs = Sequence[tuple[str, str]]  # (beginning there, beginning here); {} is a block's number

VIT: Pairs = (
    ("cls_token", "cls_token"),
    ("dist_token", "dist_token"),
    ("pos_embed.pos_embed", "pos_embed"),
    ("patch_embed.proj.", "patch_embed.proj."),
    ("transformer.layers.{}.norm1.", "blocks.{}.norm1."),
    ("transformer.layers.{}.norm2.", "blocks.{}.norm2."),
    ("transformer.layers.{}.attention.linear_qkv.", "blocks.{}.attn.qkv."),
    ("transformer.layers.{}.attention.linear_out.", "blocks.{}.attn.proj."),
    ("transformer.layers.{}.attention.softmax.alpha", "blocks.{}.attn.alpha"),
    ("transformer.layers.{}.mlp.linear1.", "blocks.{}.mlp.fc1."),
    ("transformer.layers.{}.mlp.linear2.", "blocks.{}.mlp.fc2."),
    ("transformer.norm.", "norm."),
    ("cls_head.", "head."),
    ("dist_head.", "head_dist."),
)
AGENT: Pairs = (
    ("layers.{}.norm1.", "blocks.{}.norm1."),
    ("layers.{}.norm2.", "blocks.{}.norm2."),
    ("bn.", "norm."),
    ("linear.", "head."),
)
OWN_MLP: Pairs = (
    ("layers.{}.mlp_block.conv1.", "blocks.{}.mlp.0."),
    ("layers.{}.mlp_block.conv2.", "blocks.{}.mlp.3."),
)
OWN_MIXER = {  # by the agent's name
    "agent_small": ("layers.{}.cnn_block.conv.", "blocks.{}.mixer."),
    "agent_base": ("layers.{}.cnn_block.", "blocks.{}.mixer."),
}
STEM: dict[str, Pairs] = {
    "patch": (("input_proj.", "stem."),),
    "resnet": (
        ("input_proj.conv1.", "stem.0."),
        ("input_proj.norm.", "stem.1."),
        ("input_proj.conv2.", "stem.4."),
    ),
}
TIMM_CNN: Pairs = (("", "cnn."),)
SHARED: Pairs = (  # the CNN's name of a shared tensor: the Transformer's
    ("layers.{}.cnn_block.mhsa.", "transformer.layers.{}.attention."),
    ("layers.{}.mlp_block.", "transformer.layers.{}.mlp."),
)
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class WeightNames:
    """Renames weights between the reference and the networks of one config."""

    def __init__(self, config: Config) -> None:
        self._method = config.method
        self._pairs: dict[Network, Pairs] = {"vit": VIT, "agent": _agent_pairs(config)}
        both = {"models.vit.": "vit", "models.cnn.": "agent"}
        self._prefixes: dict[str, Any] = both if len(config.networks) == 2 else {"": config.networks[0]}

    def ours(self, name: str) -> str:
        """The reference's name -> ours; raises `UserError` for a name that this config has no place for."""
        for prefix, net in self._prefixes.items():
            if not name.startswith(prefix):
                continue
            rest = name.removeprefix(prefix)
            alias = _rename(rest, SHARED) if self._method == "shared" and net == "agent" else None
            if alias is not None:
                net, rest = "vit", alias  # noqa: PLW2901
            renamed = _rename(rest, self._pairs[net])
            if renamed is not None:
                return f"{net}.{renamed}"
        raise UserError(f"weight {name!r} belongs to none of the networks of method={self._method}")

    def theirs(self, name: str) -> str:
        """Our name -> the reference's (the Transformer's, for what both networks use)."""
        prefix, net = next((p, n) for p, n in self._prefixes.items() if name.startswith(f"{n}."))
        renamed = _rename(name.removeprefix(f"{net}."), [(here, there) for there, here in self._pairs[net]])
        if renamed is None:
            raise UserError(f"weight {name!r} has no name in the reference")
        return f"{prefix}{renamed}"

    def load(self, state: Mapping[str, Tensor], networks: Networks) -> dict[str, Tensor]:
        """A state dict of the reference as one of `networks`; `UserError` unless names and shapes fit exactly."""
        wanted = networks.state_dict()
        out: dict[str, Tensor] = {}
        for name, tensor in state.items():
            key, value = self.ours(name), reshape(self.ours(name), tensor)
            if key not in wanted or wanted[key].shape != value.shape:
                have = f"{tuple(wanted[key].shape)} in" if key in wanted else "not in"
                raise UserError(f"weight {name!r} of shape {tuple(tensor.shape)} is {have} the network of the settings")
            if key in out and not torch.equal(out[key], value):
                raise UserError(f"weight {name!r} differs from its other copy in the shared model")
            out[key] = value
        for key in wanted:
            if key not in out:
                raise UserError(f"weight {self.theirs(key)!r} is missing")
        return out

    def dump(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `load`; what both networks use is there once, under the Transformer's name."""
        return {self.theirs(name): reshape(name, tensor) for name, tensor in state.items()}

    def parameters(self, names: Iterable[str]) -> list[str]:
        """Our names in the order in which the reference numbers parameters: no buffers, shared ones once."""
        kept = [name for name in names if not name.endswith(BUFFERS)]
        return list(dict.fromkeys(self.ours(name) for name in kept))


def _agent_pairs(config: Config) -> Pairs:
    agent = config.model.agent
    if not mirrors(agent):
        return TIMM_CNN
    own = () if config.method == "shared" else (OWN_MIXER[agent.name], *OWN_MLP)
    return (*AGENT, *own, *STEM[agent.stem])


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        found = re.fullmatch(re.escape(old).replace(r"\{\}", r"(\d+)") + "(.*)", name)
        if found:
            *numbers, rest = found.groups()
            return new.format(*numbers) + rest
    return None


def reshape(ours: str, tensor: Tensor) -> Tensor:
    """The position table is (tokens, 1, width) there and (1, tokens, width) here; the same way back."""
    return tensor.transpose(0, 1) if ours == "vit.pos_embed" else tensor


def load_moments(
    learner: Learner, names: WeightNames, order: Sequence[str], optimizers: Sequence[Mapping[str, Any]]
) -> None:
    """Give `learner`'s optimisers the state of the reference's, which are in the order cnn, vit.

    `order` lists the names of the reference's state dict in its order, which is how it numbers parameters.
    """
    keys = {id(parameter): name for name, parameter in learner.networks.named_parameters()}
    groups = list(reversed(learner.groups))  # ours come in the order vit, agent
    if len(optimizers) != len(groups):
        raise UserError(f"{len(optimizers)} optimisers, but these settings have {len(groups)}")
    for group, saved in zip(groups, optimizers, strict=True):
        own = [keys[id(parameter)] for parameter in group.parameters]
        numbered = [name for name in names.parameters(order) if name in set(own)]
        state = {own.index(numbered[int(i)]): _moments(numbered[int(i)], s) for i, s in saved["state"].items()}
        group.optimizer.load_state_dict(group.optimizer.state_dict() | {"state": state})


def _moments(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: reshape(name, value) if isinstance(value, Tensor) and value.dim() else value
        for key, value in state.items()
        if value is not None
    }
