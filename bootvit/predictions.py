"""What a run's last evaluation has answered, image by image: `predictions.parquet` in the run's folder.

A row an image, in the order of its subset: `split`, `key`, `label`, and for each network the class that it predicts,
the probability of that class and the probability of the label. Those that a network was most wrong about have a
thumbnail. The names of the classes are in the file's metadata, as JSON under `classes`. Accuracy by class, confusion
and the most wrong images follow from it (`bootvit.report.answers`).
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from bootvit.config import Network
from bootvit.data.decode import BrokenImage, Picture, failing_as_broken, for_the_eye
from bootvit.data.fractions import Subset
from bootvit.data.loaders import opened_by_place
from bootvit.errors import RunFailed, UserError
from bootvit.files import write_atomic

if TYPE_CHECKING:
    from bootvit.data.batches import Batch

SHOWN = 12  # images that each network was most wrong about, of which the file has a picture
SIDE = 96  # pixels of a thumbnail's longer side

Columns = dict[str, np.ndarray]


def first_five(logits: Tensor) -> Tensor:
    """The most probable classes, the first one first: (batch, classes) -> (batch, at most 5)."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


class Answers:
    """What the networks say of each image of one subset; every worker has its own images."""

    def __init__(self) -> None:
        self._parts: list[Columns] = []

    def add(self, batch: Batch, logits: Mapping[Network, Tensor]) -> None:
        """A batch of the evaluation, with each network's logits (batch, classes)."""
        assert batch.places is not None
        part: Columns = {"place": batch.places, "label": batch.labels.int().cpu().numpy()}
        for net, own in logits.items():
            chances, guessed = own.double().softmax(1), first_five(own.double())[:, :1]
            part[f"{net}_class"] = guessed[:, 0].int().cpu().numpy()
            part[f"{net}_probability"] = chances.gather(1, guessed)[:, 0].float().cpu().numpy()
            part[f"{net}_label_probability"] = chances.gather(1, batch.labels[:, None])[:, 0].float().cpu().numpy()
        self._parts.append(part)

    def table(self, split: str, subset: Subset, rank: int, world: int) -> pa.Table | None:
        """The answers of all workers, in the subset's order, with thumbnails; only on rank 0, but all must call it."""
        every: list[list[Columns]] = [self._parts] * world
        if world > 1:
            dist.all_gather_object(every, self._parts)
        parts = [part for own in every for part in own]
        if rank > 0 or not parts:
            return None
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(whole["place"])
        columns = {name: values[order] for name, values in whole.items()}
        places = columns.pop("place")
        rows = subset.indices[places]
        table = {
            "split": pa.array([split] * len(rows)).dictionary_encode(),
            "key": subset.table.rows["key"].take(pa.array(rows)),
            **{name: pa.array(values) for name, values in columns.items()},
            "thumbnail": _thumbnails(subset, places, columns),
        }
        return pa.table(table)


def most_wrong(label: np.ndarray, guessed: np.ndarray, of_label: np.ndarray, count: int) -> np.ndarray:
    """The places of the wrong answers that gave the label the least probability, the least first."""
    wrong = np.flatnonzero(guessed != label)
    return wrong[np.argsort(of_label[wrong], kind="stable")[:count]]


def _thumbnails(subset: Subset, places: np.ndarray, columns: Columns) -> pa.Array:
    """Pictures in the rows of the images that a network was most wrong about; none of what cannot be read any more."""
    nets = [name.removesuffix("_class") for name in columns if name.endswith("_class")]
    chosen = [
        most_wrong(columns["label"], columns[f"{net}_class"], columns[f"{net}_label_probability"], SHOWN)
        for net in nets
    ]
    found: list[bytes | None] = [None] * len(places)
    try:
        opened = opened_by_place(subset)
        for row in np.unique(np.concatenate(chosen)).tolist():
            found[row] = thumbnail(in_rgb(opened(int(places[row]))))
    except (BrokenImage, UserError, RunFailed, OSError) as err:  # a finished run is not to fail for want of a picture
        print(f"bootvit: warning: no pictures of the most wrong images: {err}", file=sys.stderr, flush=True)
    return pa.array(found, pa.binary())


def in_rgb(image: Picture) -> Image.Image:
    """An image of other channels as it is shown."""
    return image if isinstance(image, Image.Image) else Image.fromarray(for_the_eye(image.pixels))


def thumbnail(image: Image.Image) -> bytes:
    """An image as a small PNG, or as JPEG where it has been shrunk."""
    out = io.BytesIO()
    with failing_as_broken():
        small = image.copy()
        small.thumbnail((SIDE, SIDE))
        small.save(out, format="PNG" if small.size == image.size else "JPEG", quality=85)
    return out.getvalue()


def write_predictions(tables: Iterable[pa.Table | None], classes: Sequence[str], path: Path) -> None:
    """The answers of all splits as one file."""
    there = [table for table in tables if table is not None]
    if not there:
        return
    whole = pa.concat_tables([table.unify_dictionaries() for table in there])
    whole = whole.replace_schema_metadata({"classes": json.dumps(list(classes))})
    out = io.BytesIO()
    pq.write_table(whole, out, compression="zstd")
    write_atomic(path, out.getvalue())
