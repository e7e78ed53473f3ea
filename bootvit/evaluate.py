"""Evaluation and prediction with a run's newest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bootvit import checkpoint
from bootvit.config import Config, validate
from bootvit.data import open_splits, preprocess
from bootvit.data.batches import EvalBatches
from bootvit.errors import UserError
from bootvit.learner import Counts, Learner, World
from bootvit.loop import check_evaluable
from bootvit.train import on_workers, pick_device, ray_world, start_ray

Document = dict[str, dict[str, float | int]]


def newest_checkpoint(run_dir: Path) -> dict[str, Any]:
    """The content of a run's newest verified checkpoint."""
    saved = checkpoint.newest(run_dir / "checkpoints")
    if saved is None:
        raise UserError(f"{run_dir}: no usable checkpoint in it")
    return checkpoint.load(saved.path)


def evaluate(config: Config, run_dir: Path, *, local: bool) -> Document:
    """Exact counts of every network of the run on its test set (its held-out part where there is none)."""
    check_evaluable(config, open_splits(config.data))
    newest_checkpoint(run_dir)
    if local:
        return evaluate_here(config, run_dir, World(0, 1, pick_device(config.ray.use_gpu)))
    start_ray(config)
    job = {"config": config.model_dump(mode="json"), "run_dir": str(run_dir)}
    return dict(on_workers(config, eval_worker, job))


def evaluate_here(config: Config, run_dir: Path, world: World) -> Document:
    """This worker's part; every rank returns the counts over all."""
    splits = open_splits(config.data)
    state = newest_checkpoint(run_dir)
    classes = len(state["data"]["classes"])
    if classes != len(splits.classes):
        raise UserError(f"data.root={config.data.root}: {len(splits.classes)} classes, but the run has {classes}")
    learner = Learner(config, len(splits.classes), world)
    learner.networks.load_state_dict(state["learner"]["networks"])
    subset = splits.test or splits.held_out
    assert subset is not None
    batches = EvalBatches(subset, config, rank=world.rank, world=world.size, device=world.device)
    return {net: document(counts) for net, counts in learner.evaluate(batches).items()}


def document(counts: Counts) -> dict[str, float | int]:
    """`eval --json`'s value for one network."""
    return {
        "correct": counts.correct,
        "correct5": counts.correct5,
        "total": counts.total,
        "top1": round(counts.top1, 4),
        "top5": round(counts.top5, 4),
    }


def eval_worker(job: dict[str, Any]) -> Document:
    """One worker of Ray Train."""
    config = validate(Config, job["config"], "job")
    return evaluate_here(config, Path(job["run_dir"]), ray_world(config))


def predict(config: Config, run_dir: Path, images: list[Path], top: int = 5) -> list[dict[str, Any]]:
    """For every image and network the most probable classes: {"image", "network", "classes": {name: probability}}."""
    from PIL import Image, UnidentifiedImageError

    state = newest_checkpoint(run_dir)
    facts = state["data"]
    pictures = []
    for path in images:
        try:
            picture = Image.open(path)
            picture.load()
            pictures.append(picture)
        except (OSError, UnidentifiedImageError) as err:
            raise UserError(f"{path}: not a readable image: {err}") from err
    learner = Learner(config, len(facts["classes"]), World(0, 1, pick_device(config.ray.use_gpu)))
    learner.networks.load_state_dict(state["learner"]["networks"])
    learner.networks.eval()
    pixels = preprocess(pictures, config, tuple(facts["mean"]), tuple(facts["std"])).to(learner.world.device)
    with torch.no_grad():
        features = learner.networks.features(pixels)
    out = []
    for i, path in enumerate(images):
        for net, own in features.items():
            chances = own.logits[i].softmax(0)
            order = chances.topk(min(top, len(chances))).indices.tolist()
            classes = {facts["classes"][j]: round(float(chances[j]), 6) for j in order}
            out.append({"image": str(path), "network": net, "classes": classes})
    return out
