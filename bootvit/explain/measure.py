"""What is measured inside of a run's networks, on a few images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from bootvit.config import Config
from bootvit.data import DataSplits, Subset
from bootvit.data.batches import EvalBatches
from bootvit.data.facts import Preparation
from bootvit.errors import UserError
from bootvit.explain.attention import attention_maps, mean_distance, rollout, seen_by_head, tap_share
from bootvit.explain.similarity import cka_matrix, hint_distances
from bootvit.learner import Networks
from bootvit.models.shapes import Tap, agent_taps, head_taps, mirrors, tap_rule, vit_grid, vit_shape

Array = npt.NDArray[np.float64]
AT_ONCE = 16  # images


@dataclass(frozen=True)
class Inside:
    """One moment of a run."""

    rollout: Array  # (images, R, C) each patch's share in what the classifier gets
    distance: Array  # (blocks, heads) pixels
    tap_share: Array | None  # (blocks, heads); None where heads have no taps
    cka: Array | None  # (blocks of the ViT, blocks of the agent); None without an agent that mirrors it
    hint: Array | None  # (blocks,)

    def by_block(self) -> dict[str, Array]:
        """What one number a block says: {"distance", "tap", "cka", "hint"}, those that there are."""
        found: dict[str, Array] = {"distance": self.distance.mean(1)}
        if self.tap_share is not None:
            found["tap"] = self.tap_share.mean(1)
        if self.cka is not None and self.hint is not None:
            found |= {"cka": self.cka.diagonal().copy(), "hint": self.hint}
        return found


@dataclass(frozen=True)
class Explained:
    """A run's ViT and agent seen from inside, on a few images."""

    name: str
    keys: tuple[str, ...]  # of the images
    labels: tuple[str | None, ...]
    guesses: tuple[str, ...]  # of the ViT
    pictures: npt.NDArray[np.uint8]  # (images, rows, cols, 3), as the networks see them
    patch: tuple[int, int]
    tokens: int  # of the ViT: 1 / tokens is what attention without a preference gives each
    taps: tuple[Tap, ...] | None
    inside: Inside
    over_epochs: dict[float, dict[str, Array]] = field(default_factory=dict)  # {epochs done: as `Inside.by_block`}
    notes: tuple[str, ...] = ()  # what was left out, and why


def check_explainable(config: Config) -> None:
    """`UserError` for a run without attention."""
    if "vit" not in config.networks:
        raise UserError(f"{config.name}: method={config.method} has no ViT, and so no attention to explain")


def vit_taps(config: Config) -> tuple[tuple[Tap, ...] | None, str]:
    """The tap of each head of the ViT, as the agent that mirrors it has them; or None, and why there are none."""
    heads = vit_shape(config.model.vit).heads
    try:
        same = config.model.agent.heads in (None, heads)
        rule = tap_rule(config.model.agent, config.model.vit.name)
        return (agent_taps(config) if same else head_taps(heads, rule)), ""
    except UserError as err:
        return None, str(err)


def few(splits: DataSplits, count: int) -> Subset:
    """The first images of the held-out part, of the test set where nothing is held out; they are in hash order."""
    subset = splits.held_out or splits.test
    assert subset is not None
    return Subset(subset.table, subset.indices[:count])


def pixels_of(config: Config, subset: Subset, preparation: Preparation) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """((images, 3, rows, cols) normalised, (images,) labels, (images,) keys) on the CPU, of those that can be read."""
    batches = list(EvalBatches(subset, config, preparation, rank=0, world=1, device="cpu"))
    if not batches:
        raise UserError("none of the images can be read")
    keys = subset.keys
    places = [int(place) for batch in batches for place in (batch.places if batch.places is not None else ())]
    images, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels"))
    return images, labels, tuple(keys[place] for place in places)


def batches_of(images: Tensor) -> Iterator[Tensor]:
    """A few at a time: attention is large."""
    for first in range(0, len(images), AT_ONCE):
        yield images[first : first + AT_ONCE]


@torch.no_grad()
def look_inside(networks: Networks, batches: Iterable[Tensor]) -> Inside:
    """Measure on images (batch, 3, rows, cols), normalised; the networks go into evaluation mode."""
    networks.eval()
    vit, config = networks.vit, networks.config
    assert vit is not None
    taps, grid = vit_taps(config)[0], vit_grid(config)
    patch = vit_shape(config.model.vit).patch
    compared = networks.agent is not None and mirrors(config.model.agent)
    seen: list[Tensor] = []
    reach: list[tuple[int, Tensor, Tensor | None]] = []
    maps: tuple[list[Any], list[Any]] = ([], [])
    for batch in batches:
        images = batch.to(next(vit.parameters()))
        rolled, distance, share = _attention_of(vit, images, grid, patch, taps)
        seen.append(rolled)
        reach.append((len(images), distance, share))
        if compared:
            features = networks.features(images)
            maps[0].append(features["vit"].blocks)
            maps[1].append(features["agent"].blocks)
    total = sum(count for count, _, _ in reach)
    vit_maps, agent_maps = ([torch.cat(block) for block in zip(*own, strict=True)] for own in maps)
    return Inside(
        rollout=_array(torch.cat(seen)),
        distance=_array(_weighted([(count, distance) for count, distance, _ in reach], total)),
        tap_share=None if taps is None else _array(_weighted([(n, s) for n, _, s in reach if s is not None], total)),
        cka=_array(cka_matrix(vit_maps, agent_maps)) if compared else None,
        hint=_array(hint_distances(vit_maps, agent_maps, config.objective)) if compared else None,
    )


def _attention_of(
    vit: VisionTransformer, images: Tensor, grid: tuple[int, int], patch: tuple[int, int], taps: Sequence[Tap] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rollout (B, R, C), distances (blocks, H), shares on taps (blocks, H)) in one pass over the blocks."""
    prefix = vit.num_prefix_tokens
    reach, shares = [], []

    def measured() -> Iterator[Tensor]:
        for attention in attention_maps(vit, images):
            reach.append(mean_distance(attention, grid, patch, prefix))
            if taps is not None:
                shares.append(tap_share(attention, taps, grid, prefix))
            yield attention

    rolled = rollout(measured())
    seen = seen_by_head(rolled, grid, prefix, vit.global_pool == "token")
    return seen, torch.stack(reach), torch.stack(shares) if taps is not None else None


def _weighted(parts: Sequence[tuple[int, Tensor]], total: int) -> Tensor:
    return sum((count / total * value for count, value in parts[1:]), start=parts[0][0] / total * parts[0][1])


def _array(values: Tensor) -> Array:
    out: Array = values.double().cpu().numpy()
    return out


def records_of(inside: Inside) -> dict[str, float]:
    """One number a block, by the journal's names: `explain/cka/block1`."""
    return {
        f"explain/{what}/block{place + 1}": float(value)
        for what, values in inside.by_block().items()
        for place, value in enumerate(values)
    }
