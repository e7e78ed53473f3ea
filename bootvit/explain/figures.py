"""Figures of what is inside of a run's networks, each with the sentence that says what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bootvit.explain.measure import Array, Explained
from bootvit.report.plots import COLOURS, panels, save

SHOWN = 8  # images
ARROWS = {-1: "↑", 0: "", 1: "↓"}, {-1: "←", 0: "", 1: "→"}
NAMES = {"cka": "CKA of ViT and agent", "hint": "hint distance", "tap": "share on own tap", "distance": "distance (px)"}


class Figure(NamedTuple):
    """A picture and its caption."""

    path: Path
    caption: str


def draw(found: Explained, out: Path) -> list[Figure]:
    """Every figure that there are numbers for."""
    figures = [draw_rollout(found, out / "attention.png"), draw_heads(found, out / "heads.png")]
    figures += [draw_agent(found, out / "agent.png")] if found.inside.cka is not None else []
    figures += [draw_epochs(found, out / "epochs.png")] if len(found.over_epochs) > 1 else []
    return figures


def draw_rollout(found: Explained, path: Path) -> Figure:
    """Images beside where the ViT looks."""
    from matplotlib.figure import Figure as Canvas

    count = min(SHOWN, len(found.keys))
    across = min(4, count)  # pairs
    down = -(-count // across)
    figure = Canvas(figsize=(2.9 * across, 1.7 * down), dpi=130, layout="constrained")
    axes = list(figure.subplots(down, 2 * across, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for place in range(count):
        picture, seen = found.pictures[place], found.inside.rollout[place]
        axes[2 * place].imshow(picture)
        label = found.labels[place]
        said = found.guesses[place] if label is None else f"{label} → {found.guesses[place]}"
        axes[2 * place].set_title(said if len(said) < 24 else f"{said[:22]}…", fontsize=9)
        axes[2 * place + 1].imshow(picture)
        axes[2 * place + 1].imshow(enlarged(seen, picture.shape[:2]), cmap="inferno", alpha=0.65)
    caption = (
        f"Attention rollout of the ViT on {count} images (label → prediction): bright is where what the classifier "
        "gets comes from, each image on its own scale"
    )
    return Figure(save(figure, path), caption)


def enlarged(seen: Array, size: tuple[int, int]) -> Array:
    """A map (R, C) at the size of its image, smoothly."""
    small = Image.fromarray(seen.astype(np.float32), mode="F")
    return np.asarray(small.resize((size[1], size[0]), Image.Resampling.BILINEAR), dtype=np.float64)


def draw_heads(found: Explained, path: Path) -> Figure:
    """How far each head reaches, and how much of its attention is on its tap."""
    share, blocks = found.inside.tap_share, np.arange(1, len(found.inside.distance) + 1)
    figure, axes = panels(2 if share is None else 3, height=3.4)
    _dots(axes[0], blocks, found.inside.distance, "mean attention distance (px)")
    text = "Each dot is a head, the line their mean. How far heads look"
    if share is None:
        axes[1].remove()
    else:
        _dots(axes[1], blocks, share, "share of attention on its own tap")
        axes[1].axhline(1 / found.tokens, color="#9AA5B5", linestyle=":", linewidth=1.4)
        _draw_taps(axes[2], found, share)
        text += (
            "; how convolutional they are: the share on the pixel that the agent's convolution reads for that head "
            f"(dotted: chance, 1 of {found.tokens} tokens); and that share head by head, under the place of each tap"
        )
    return Figure(save(figure, path), text)


def _dots(axis: Any, blocks: Any, values: Array, name: str) -> None:
    heads = values.shape[1]
    for head in range(heads):
        shift = 0.3 * ((head + 0.5) / heads - 0.5)
        axis.plot(blocks + shift, values[:, head], "o", markersize=4, color=COLOURS["vit"], alpha=0.6)
    axis.plot(blocks, values.mean(1), color=COLOURS["agent"], linewidth=1.6)
    axis.set_xticks(blocks)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("block", fontsize=9)
    axis.set_title(name, fontsize=10, loc="left")


def _draw_taps(axis: Any, found: Explained, share: Array) -> None:
    assert found.taps is not None
    image = axis.imshow(
        share, cmap="viridis", vmin=0, vmax=max(float(np.nanmax(share)), 2 / found.tokens), aspect="auto"
    )
    axis.grid(False)
    axis.set_xticks(range(len(found.taps)), [tap_name(tap) for tap in found.taps], fontsize=8)
    axis.set_yticks(range(len(share)), [str(block + 1) for block in range(len(share))])
    axis.set_xlabel("head, by its tap", fontsize=9)
    axis.set_ylabel("block", fontsize=9)
    axis.set_title("share on own tap", fontsize=10, loc="left")
    axis.figure.colorbar(image, ax=axis, fraction=0.05)


def tap_name(tap: tuple[int, int]) -> str:
    """An arrow for a neighbour, a point for the middle, (rows, columns) for what is farther away."""
    if max(map(abs, tap)) > 1:
        return f"{tap[0]},{tap[1]}"
    diagonal = {(-1, -1): "↖", (-1, 1): "↗", (1, -1): "↙", (1, 1): "↘"}
    return diagonal.get(tap) or ARROWS[0][tap[0]] + ARROWS[1][tap[1]] or "·"


def draw_agent(found: Explained, path: Path) -> Figure:
    """How alike ViT and agent are, block by block."""
    cka, hint = found.inside.cka, found.inside.hint
    assert cka is not None
    assert hint is not None
    figure, (left, right) = panels(2, height=3.4)
    image = left.imshow(cka, cmap="viridis", vmin=0, vmax=1, origin="lower")
    left.grid(False)
    for axis, size in ((left.xaxis, cka.shape[1]), (left.yaxis, cka.shape[0])):
        axis.set_ticks(range(size), [str(block + 1) for block in range(size)])
    left.set_xlabel("block of the agent", fontsize=9)
    left.set_ylabel("block of the ViT", fontsize=9)
    left.set_title("linear CKA", fontsize=10, loc="left")
    figure.colorbar(image, ax=left, fraction=0.05)
    right.bar(np.arange(1, len(hint) + 1), hint, color=COLOURS["shared"], width=0.6)
    right.set_xticks(np.arange(1, len(hint) + 1))
    right.set_xlabel("block", fontsize=9)
    right.set_title("hint distance", fontsize=10, loc="left")
    caption = (
        "ViT and agent: linear CKA of the features of every pair of blocks (1: alike up to rotation and scale), and "
        "the mean squared distance of the layer-normalised features that the hint trains on"
    )
    return Figure(save(figure, path), caption)


def draw_epochs(found: Explained, path: Path) -> Figure:
    """What one number a block says, over training."""
    epochs = sorted(found.over_epochs)
    names = [name for name in NAMES if all(name in found.over_epochs[epoch] for epoch in epochs)]
    figure, axes = panels(len(names), height=2.9, across=2)
    from matplotlib import colormaps

    for axis, name in zip(axes, names, strict=True):
        values = np.array([found.over_epochs[epoch][name] for epoch in epochs])  # (epochs, blocks)
        for block in range(values.shape[1]):
            own = colormaps["viridis"](0.9 * block / max(values.shape[1] - 1, 1))
            axis.plot(epochs, values[:, block], color=own, marker="o", markersize=3, label=f"block {block + 1}")
        axis.set_title(NAMES[name], fontsize=10, loc="left")
        axis.set_xlabel("epochs", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return Figure(save(figure, path), "The same over training, a line a block (means over its heads)")
