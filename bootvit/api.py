"""What Python programs and notebooks use; the command line calls the same functions.

    import bootvit

    run = bootvit.train("digits/joint", {"data.fraction": 0.1}, local=True)
    run.result["final"]["vit"]["top1"]      # percent
    run.networks["vit"]                     # timm's VisionTransformer
    bootvit.load_run("runs/digits-joint").predict("seven.png")

A mistake of the caller's raises `bootvit.errors.UserError` before anything is taken, a run that could not go on
`bootvit.errors.RunFailed`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from torch import nn

from bootvit import load
from bootvit.addresses import is_address
from bootvit.config import Config, Network
from bootvit.data import DataFacts
from bootvit.data.decode import Planes
from bootvit.data.own import pack_own
from bootvit.driver import train as run_training
from bootvit.errors import UserError
from bootvit.evaluate import EVAL_KEYS, evaluate, read_checkpoint
from bootvit.explain.measure import Explained
from bootvit.explain.run import IMAGES, explain
from bootvit.learner import Networks
from bootvit.predict import predict, predict_images
from bootvit.result import Result, read_result
from bootvit.runs import fetch_weights, found_run, open_run, place_of
from bootvit.storage import Place
from bootvit.tracking import read_journal

if TYPE_CHECKING:
    from ray.tune import ResultGrid

Overrides = Mapping[str, Any] | Sequence[str]  # {"data.fraction": 0.1}, or ["data.fraction=0.1"] as on the command line
Picture = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]  # an array is (rows, columns, channels), as RGB
Chances = dict[str, dict[str, float]]  # {network: {class: probability}}, the most probable first


def load_config(name: str | os.PathLike[str], overrides: Overrides = ()) -> Config:
    """A file, or a shipped config such as `digits/joint`, with overrides on top, checked as a whole.

    Raises `UserError` for a missing file, an unknown key, a wrong type or an impossible value.
    """
    return load.load_config(os.fspath(name), as_texts(overrides))


def train(
    config: str | os.PathLike[str] | Config,
    overrides: Overrides = (),
    *,
    data: Any = None,
    local: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    take_over: bool = False,
) -> Run:
    """Train one run to its end, as `bootvit train` does, under Ray Train or (`local`) in this process.

    `data` is a data set of your own, or two, (training, test): anything with `__len__` and `__getitem__` of (image,
    label), and perhaps `classes`. It is written to Parquet files beside the run, so that workers and later commands
    have it.

    Raises `UserError` before anything is taken, and `RunFailed` for a run that could not go on.
    """
    if isinstance(config, Config):
        checked = load.change_config(config, as_texts(overrides), ("",))
    else:
        checked = load_config(config, overrides)
    if data is not None:
        checked = with_data(checked, data)
    run_training(checked, local=local, resume=resume, overwrite=overwrite, take_over=take_over)
    return Run(place_of(checked))


def with_data(config: Config, data: Any) -> Config:
    """The config with a data set that lies in memory; its files are made anew, in NAME-data beside the run's folder."""
    if is_address(config.ray.storage_path):
        raise UserError(f"data=: ray.storage_path={config.ray.storage_path} is no folder; pack it: bootvit data pack")
    out = Path(config.ray.storage_path) / f"{config.name}-data"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        pack_own(data, Path(work) / out.name)
        shutil.rmtree(out, ignore_errors=True)
        (Path(work) / out.name).rename(out)
    return load.change_config(config, ["data.source=parquet", f"data.root={out}"], ("data.",))


def load_run(path: str | os.PathLike[str]) -> Run:
    """A run by its folder or its address, or by its name below ./runs; `UserError` where there is none."""
    return Run(open_run(os.fspath(path))[1].place)


def sweep(name: str | os.PathLike[str], overrides: Overrides = (), **how: Any) -> ResultGrid:
    """Run a sweep as `bootvit sweep` does, and return Ray Tune's ResultGrid; `how` as in `tune.run.driver.sweep`."""
    from tune.run.driver import sweep as run_sweep

    return run_sweep(os.fspath(name), as_texts(overrides), **how)


class Run:
    """A run's folder, and what can be done with it. What is read of it is kept: load the run again for news."""

    def __init__(self, place: Place) -> None:
        self.folder = found_run(place)
        self.path = self.folder.path  # of a run in an object store a copy, for as long as this process lives

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @cached_property
    def config(self) -> Config:
        """Everything that the run was started with."""
        return open_run(str(self.path))[0]

    @cached_property
    def result(self) -> Result:
        """How it ended, accuracies in percent; `UserError` for a run that has not ended."""
        path = self.folder.result
        if not path.exists():
            raise UserError(f"{self.folder}: the run has not ended: there is no {path.name}")
        return read_result(path)

    @cached_property
    def metrics(self) -> pa.Table:
        """Every measured value as an Arrow table: step, epoch (0-based), name, value, time (seconds since 1970).

        `run.metrics.to_pandas()` where pandas is installed. Names are as in `test/vit/top1` (percent) and
        `train/vit/loss`.
        """
        records = read_journal(self.folder.journal)[0]
        columns = zip(*records, strict=True) if records else ([],) * 5
        kinds = (pa.int64(), pa.int64(), pa.string(), pa.float64(), pa.float64())
        names = ("step", "epoch", "name", "value", "time")
        return pa.table({n: pa.array(list(c), k) for n, c, k in zip(names, columns, kinds, strict=True)})

    @cached_property
    def data(self) -> DataFacts:
        """Its class names, and how an evaluation image is prepared."""
        fetch_weights(self.folder, "newest")
        return DataFacts.from_dict(read_checkpoint(self.path)["data"])

    @cached_property
    def networks(self) -> dict[Network, nn.Module]:
        """Its networks with the newest checkpoint's weights, on the CPU, in evaluation mode.

        `vit` is a plain VisionTransformer of timm, `agent` a module without one. Each takes images (batch, 3, rows,
        columns), normalised as `data.preparation` says, and gives logits (batch, classes). A shared agent has copies
        of the ViT's weights.
        """
        from bootvit.export import Classifier

        fetch_weights(self.folder, "newest")
        state = read_checkpoint(self.path)
        networks = Networks(self.config, len(self.data.classes))
        networks.load_state_dict(state["learner"]["networks"])
        out: dict[Network, nn.Module] = {}
        for net in self.config.networks:
            module = networks.vit if net == "vit" else Classifier(self.config, networks, "agent")
            assert module is not None
            out[net] = module.eval()
        return out

    def predict(
        self, images: Picture | Sequence[Picture], top: int = 5, *, best: bool = False, ema: bool = False
    ) -> list[Chances]:
        """For each image the `top` most probable classes by network; `best` and `ema` as in `bootvit predict`.

        An image is a file, a PIL image, or an array (rows, columns, channels) of uint8, as RGB, of any size: it is
        prepared as in the evaluation. Raises `UserError` for one that cannot be read.
        """
        fetch_weights(self.folder, "best" if best else "newest")
        given = listed(images)
        if all(isinstance(one, str | os.PathLike) for one in given):
            paths = [Path(one) for one in given]  # type: ignore[arg-type]
            rows = predict(self.config, self.path, paths, top, best=best, ema=ema)
        else:
            pictures = [in_memory(one) for one in given]
            rows = predict_images(self.config, self.path, pictures, top, best=best, ema=ema)
        found: list[Chances] = []
        for row in rows:
            if "error" in row:
                raise UserError(f"{row['image']}: {row['error']}")
            if row["network"] == self.config.networks[0]:
                found.append({})
            found[-1][row["network"]] = row["classes"]
        return found

    def evaluate(
        self, data: Overrides = (), *, local: bool = True, best: bool = False
    ) -> dict[str, dict[str, float | int]]:
        """Exact counts by network, {"vit": {"correct", "correct5", "total", "top1", "top5"}, ...}, top-n in percent.

        `data` says what to count in place of the run's own test set, such as {"data.root": "other/"}: the keys that
        `bootvit eval` takes. Classes are matched by name.
        """
        config = load.change_config(self.config, as_texts(data), EVAL_KEYS)
        fetch_weights(self.folder, "best" if best else "newest")
        return evaluate(config, self.folder, local=local, best=best).counts

    def explain(
        self, images: Picture | Sequence[Picture] = (), *, count: int = IMAGES, best: bool = False
    ) -> Explained:
        """What the run's networks have become, on pictures as `predict` takes them, or on a few of the evaluation set.

        `.inside` has, as arrays: `rollout` (images, rows, cols) each patch's share in what the classifier gets,
        `distance` (blocks, heads) in pixels, `tap_share` (blocks, heads), `cka` (blocks, blocks) and `hint` (blocks,);
        `.over_epochs` one number a block of every checkpoint that is there, `.notes` what was left out. Raises
        `UserError` for a run without a ViT.
        """
        fetch_weights(self.folder, "all")
        return explain(self.config, self.folder, [in_memory(one) for one in listed(images)], count=count, best=best)


def listed(images: Picture | Sequence[Picture]) -> list[Picture]:
    """One picture or several as a list."""
    return [images] if isinstance(images, str | os.PathLike | Image.Image | np.ndarray) else list(images)


def in_memory(image: Picture) -> Image.Image | Planes:
    """Any picture as a PIL image."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3:
            raise UserError(
                f"an image of shape {image.shape} and {image.dtype}: expected (rows, columns, channels) of uint8"
            )
        return Image.fromarray(image) if image.shape[2] == 3 else Planes(image)
    try:
        with Image.open(image) as opened:
            return opened.copy()
    except OSError as err:
        raise UserError(f"{os.fspath(image)}: cannot be read as an image: {err}") from err


def as_texts(overrides: Overrides) -> list[str]:
    """Overrides as on the command line; a value that has no place in a config is a `UserError`."""
    if isinstance(overrides, str):
        raise UserError(f"overrides={overrides!r}: expected a mapping such as {{'data.fraction': 0.1}}, or a list")
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{key}={_as_text(key, value)}" for key, value in overrides.items()]


def _as_text(key: str, value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    try:
        return json.dumps(value.item() if isinstance(value, np.generic) else value)
    except TypeError:
        raise UserError(f"{key}={value!r}: a config has no values of type {type(value).__name__}") from None
