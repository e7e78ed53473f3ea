"""Evaluation with a run's newest checkpoint, or its best."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from bootvit import checkpoint
from bootvit.config import Config, validate, whole
from bootvit.data import DataFacts, DataSplits, open_splits
from bootvit.data.batches import EvalBatches
from bootvit.driver import pick_device
from bootvit.errors import UserError
from bootvit.extensions import import_all
from bootvit.learner import Counts, Learner, World
from bootvit.loop import check_evaluable, of_all_workers
from bootvit.ray_connection import start_ray
from bootvit.ray_workers import on_workers, ray_world
from bootvit.runs import RunFolder, fetch_weights, found_run
from bootvit.storage import place_at
from bootvit.weights import newest_state

# what an evaluation may change: which images it counts, how fast and how precisely; the rest is the run's
EVAL_KEYS = (
    *("data.source", "data.root", "data.fraction", "data.fraction_rule", "data.held_out", "data.eval_batch_size"),
    *("data.workers", "data.on_error", "data.resize", "precision", "ray."),
)


class Evaluation(NamedTuple):
    """What `bootvit eval` found."""

    counts: dict[str, dict[str, float | int]]  # by network, as `eval --json` prints it
    skipped: dict[str, str]  # broken images left out (data.on_error=skip): {image: reason}


def read_checkpoint(run_dir: Path, *, best: bool = False, ema: bool = False) -> dict[str, Any]:
    """The content of a run's newest verified checkpoint, or of the weights that MLflow has kept of one.

    `best` is the one that `checkpoint.best` has kept; with `ema` its networks are the averaged ones. Raises `UserError`
    where there is none.
    """
    state = _read(run_dir, best=best)
    if ema:
        if "ema" not in state["learner"]:
            raise UserError(f"{run_dir}: --ema: no averaged weights were kept: train with optim.ema=0.9999")
        state["learner"]["networks"] = state["learner"]["ema"]
    return state


def _read(run_dir: Path, *, best: bool) -> dict[str, Any]:
    if best:
        saved = checkpoint.best_of(run_dir / "checkpoints")
        if saved is None:
            raise UserError(f"{run_dir}: --best: no checkpoint was kept as the best: train with checkpoint.best=true")
        return checkpoint.load(saved)
    state = newest_state(run_dir)
    if state is None:
        raise UserError(f"{run_dir}: no usable checkpoint in it")
    return state


def evaluate(config: Config, folder: RunFolder, *, local: bool, best: bool = False) -> Evaluation:
    """Exact counts of every network of the run on its test set (its held-out part where there is none).

    Images are prepared as the run says; on another data set classes are matched by their names.
    """
    open_for(config, DataFacts.from_dict(read_checkpoint(folder.path, best=best)["data"]))
    if local:
        return evaluate_here(config, folder.path, World(0, 1, pick_device(config.ray.use_gpu)), best=best)
    start_ray(config)
    from cluster.probe import check_nodes, reads

    root = config.data.root
    data = [] if root is None or "://" in root else [reads(f"data.root={root}", Path(root))]
    run = [] if folder.store else [reads(str(folder), folder.config)]  # a store's answer is a worker's
    check_nodes([*run, *data])
    job = {"config": whole(config), "run": folder.address, "best": best}
    return Evaluation(*on_workers(config, eval_worker, job))


def open_for(config: Config, facts: DataFacts) -> DataSplits:
    """The data set, its labels numbered as the run numbers its classes; `UserError` where that cannot be."""
    splits = open_splits(config.data, facts.classes if facts.fingerprint else None)
    check_evaluable(config, splits)
    if len(splits.classes) != len(facts.classes):
        have = len(splits.classes)
        raise UserError(f"data.root={config.data.root}: {have} classes, but the run has {len(facts.classes)}")
    return splits


def evaluate_here(config: Config, run_dir: Path, world: World, *, best: bool = False) -> Evaluation:
    """This worker's part; every rank returns the counts over all."""
    state = read_checkpoint(run_dir, best=best)
    facts = DataFacts.from_dict(state["data"])
    splits = open_for(config, facts)
    learner = Learner(config, len(facts.classes), world)
    learner.load_state_dict({key: own for key, own in state["learner"].items() if key in ("networks", "ema")})
    subset = splits.test or splits.held_out
    assert subset is not None
    batches = EvalBatches(subset, config, facts.preparation, rank=world.rank, world=world.size, device=world.device)
    counts: dict[str, dict[str, float | int]] = {n: document(own) for n, own in learner.evaluate(batches).items()}
    return Evaluation(counts, of_all_workers(batches.broken, config.data, world))


def document(counts: Counts) -> dict[str, float | int]:
    """`eval --json`'s value for one network; what averaged weights do is in keys with `ema_` before them."""
    found = {
        "correct": counts.correct,
        "correct5": counts.correct5,
        "total": counts.total,
        "top1": round(counts.top1, 4),
        "top5": round(counts.top5, 4),
        "loss": round(counts.loss, 6),
        **{name: round(value, 4) for name, value in counts.measures.items()},
    }
    averaged = {} if counts.ema is None else document(counts.ema)
    return found | {f"ema_{name}": value for name, value in averaged.items()}


def eval_worker(job: dict[str, Any]) -> tuple[Any, ...]:
    """One worker of Ray Train."""
    config, folder = validate(Config, job["config"], "job"), found_run(place_at(job["run"]))
    import_all(config.imports)
    fetch_weights(folder, "best" if job["best"] else "newest")
    return tuple(evaluate_here(config, folder.path, ray_world(config), best=job["best"]))
