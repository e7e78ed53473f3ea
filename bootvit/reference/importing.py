"""A checkpoint of the reference becomes a run that eval, predict, train --resume and export accept."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bootvit import checkpoint
from bootvit.config import Config
from bootvit.data import DataFacts, DataSplits, Preparation, facts_of, open_splits
from bootvit.data.batches import TrainBatches
from bootvit.data.cifar import MEAN, STD
from bootvit.data.sources import IMAGENET
from bootvit.errors import UserError
from bootvit.learner import Learner, World
from bootvit.loop import Progress
from bootvit.reference.files import read_settings
from bootvit.reference.names import WeightNames, load_moments
from bootvit.reference.translate import translate
from bootvit.runs import claim
from bootvit.storage import Place
from bootvit.tracking import Journal, Record

HERE = World(0, 1, torch.device("cpu"))


class Imported(NamedTuple):
    """What `bootvit import` prints."""

    run: Place
    epoch: int  # epochs completed
    moments: bool  # whether the optimiser's moments came with the weights


def import_checkpoint(
    path: Path, settings: Path, overrides: Sequence[str] = (), *, name: str | None = None, overwrite: bool = False
) -> Imported:
    """Write a run directory with the weights, moments and epoch of a checkpoint of the reference.

    Raises `UserError` where settings or weights are not supported, do not fit one another, or the run exists.
    """
    saved = load(path)
    named = [f"name={name or settings.stem}", *overrides]
    config = translate(read_settings(settings), str(settings), named)
    classes = class_count(saved["model"], config, path)
    splits = open_data(config, classes, path)
    learner = Learner(config, classes, HERE)
    names = WeightNames(config)
    learner.networks.load_state_dict(names.load(saved["model"], learner.networks))
    optimizers = saved.get("optimizers") or [saved[key] for key in ("optimizer",) if key in saved]
    if optimizers:
        load_moments(learner, names, list(saved["model"]), optimizers)
    epoch = completed_epochs(saved, config)
    step = epoch * steps_per_epoch(splits, config) if splits else int(saved.get("iter", 0))
    progress = Progress(epoch=epoch, step=step)
    state = {
        "learner": learner.state_dict() if optimizers else {"networks": learner.networks.state_dict()},
        "progress": asdict(progress),
        "data": (facts_of(splits, config) if splits else unseen(config, classes)).to_dict(),
    }
    folder, _ = claim(config, resume=False, overwrite=overwrite)
    final = epoch >= config.schedule.epochs
    with folder.sent():
        checkpoint.write(folder.checkpoints, checkpoint.pack(state), step=step, epoch=epoch, final=final)
        if epoch:  # over, and not to be evaluated again when the run goes on
            Journal(folder.journal).write([Record(step, epoch - 1, "epoch", float(epoch), time.time())])
    folder.leave()
    return Imported(folder.place, epoch, bool(optimizers))


def load(path: Path) -> dict[str, Any]:
    """The checkpoint's content, without running code from it."""
    try:
        with torch.serialization.safe_globals([defaultdict, OrderedDict, dict, list, float, int]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises many kinds for a file that is no checkpoint
        raise UserError(f"{path}: not a readable checkpoint: {str(err).splitlines()[0]}") from err
    if not isinstance(saved, Mapping) or not isinstance(saved.get("model"), Mapping):
        raise UserError(f"{path}: no checkpoint of the reference: it has no 'model'")
    return dict(saved)


def class_count(model: Mapping[str, Tensor], config: Config, path: Path) -> int:
    """The classes that the checkpoint's networks tell apart."""
    heads = ("cls_head.weight", "linear.weight", "fc.weight", "classifier.weight")
    found = next((tensor for name, tensor in model.items() if name.split("models.vit.")[-1].endswith(heads)), None)
    if found is None:
        raise UserError(f"{path}: none of its weights is a head ({', '.join(heads)})")
    classes = len(found)
    if config.data.num_classes not in (None, classes):
        raise UserError(f"{path}: has {classes} classes, but data.num_classes={config.data.num_classes}")
    return classes


def open_data(config: Config, classes: int, path: Path) -> DataSplits | None:
    """The data set, or None where it is not on this machine: import, predict and export do without it."""
    try:
        splits = open_splits(config.data)
    except UserError as err:
        print(f"bootvit: the data set is not used: {err}", file=sys.stderr)
        return None
    if len(splits.classes) != classes:
        raise UserError(
            f"{path}: has {classes} classes, but data.source={config.data.source} has {len(splits.classes)}"
        )
    return splits


def steps_per_epoch(splits: DataSplits, config: Config) -> int:
    """Steps of one epoch here, which count differently from the reference's where the data set is another one."""
    return TrainBatches(splits.train, config, rank=0, world=1, device=HERE.device).steps_per_epoch


def unseen(config: Config, classes: int) -> DataFacts:
    """The facts about a data set that was not there: classes are numbers."""
    data = config.data
    mean, std = (MEAN[data.source], STD) if data.source in MEAN else IMAGENET
    small = data.augment == "crop" or (data.augment != "area" and data.source in MEAN)
    preparation = Preparation(
        "resize" if small else "centre_crop", config.image_size, data.mean or mean, data.std or std
    )
    return DataFacts(tuple(str(label) for label in range(classes)), "", preparation)


def completed_epochs(saved: Mapping[str, Any], config: Config) -> int:
    """Epochs that the checkpoint has behind it: as often as the schedule has stepped.

    `epoch` alone does not tell: the reference writes it in the middle of that epoch, and again after the last one.
    An epoch that was interrupted is done again from its start (the reference skips the rest of it).
    """
    schedules = saved.get("lr_schedulers") or [saved.get("lr_scheduler") or {}]
    stepped = schedules[0].get("last_epoch")
    if stepped is None:
        stepped = saved.get("epoch", 0) + 1 if saved.get("iter", 0) else 0
    return min(int(stepped), config.schedule.epochs)
