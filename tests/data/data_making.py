"""Small data sets on disk for the tests of the data layer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bootvit.config import Config, DataConfig


def data_config(**values: Any) -> DataConfig:
    """A data section; `root` may be a Path."""
    if "root" in values:
        values["root"] = str(values["root"])
    return DataConfig(**values)


def config(seed: int = 0, **data: Any) -> Config:
    """A run with this data section."""
    return Config(seed=seed, data=data_config(**data))


def picture(seed: int, rows: int, cols: int, quality: int = 90) -> bytes:
    """A noisy JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (rows // 8 + 2, cols // 8 + 2, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((cols, rows), Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality)
    return out.getvalue()


def write_folder(root: Path, split: str, counts: dict[str, int], size: tuple[int, int] | None = None) -> None:
    """split/class/name.jpg; without `size` every picture has its own."""
    seed = sum(map(ord, split)) * 1000
    for name, count in counts.items():
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            seed += 1
            rows, cols = size or (100 + seed * 7 % 60, 100 + seed * 13 % 60)
            (folder / f"img_{number:04d}.jpg").write_bytes(picture(seed, rows, cols))


def write_hugging_face(
    path: Path, images: list[bytes], labels: list[int], paths: list[str | None], names: list[str] | None = None
) -> None:
    """One Parquet file in the Hugging Face layout."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": data, "path": name} for data, name in zip(images, paths, strict=True)]
    metadata = None
    if names is not None:
        listed = ", ".join(f'"{name}"' for name in names)
        features = f'{{"label": {{"names": [{listed}], "_type": "ClassLabel"}}}}'
        metadata = {b"huggingface": f'{{"info": {{"features": {features}}}}}'.encode()}
    schema = pa.schema([("image", kind), ("label", pa.int64())], metadata=metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": cells, "label": labels}, schema=schema), path, row_group_size=16)


def write_small_parquet(root: Path, per_class: int = 20, classes: int = 3, order: int | None = None) -> None:
    """train-*.parquet (in two files) and test-*.parquet of 16x16 pictures; `order` shuffles the rows."""
    for split, count in (("train", per_class), ("test", 5)):
        rows = [(label, number) for label in range(classes) for number in range(count)]
        if order is not None:
            rows = [rows[i] for i in np.random.default_rng(order).permutation(len(rows))]
        images = [picture(label * 1000 + number + (split == "test") * 500, 16, 16) for label, number in rows]
        labels = [label for label, _ in rows]
        paths: list[str | None] = [f"{label}/{number:03d}.jpg" for label, number in rows]
        names = [f"class {label}" for label in range(classes)]
        half = len(rows) // 2
        for part, here in enumerate((slice(0, half), slice(half, None))):
            target = root / f"{split}-{part:05d}-of-00002.parquet"
            write_hugging_face(target, images[here], labels[here], paths[here], names)
