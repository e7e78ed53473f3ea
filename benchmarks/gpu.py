"""One GPU, one table: parity first, then what a step costs, what the input gives, and what both make together.

    python -m benchmarks.gpu [--budget 480] [--only PATTERN] [--commit HASH] [--out FOLDER]

Needs torch, timm and this checkout; no Ray, no MLflow, no data. Rows are measured in the order in which they matter and
the JSON file is written after each, so that what was measured before the budget (seconds) ran out, or a row failed, is
kept. A row that fails says why and the script ends with status 1; `out of memory` is a result and not a failure.

FLOPs are those of the networks: `torch.utils.flop_counter` over one forward pass of one image (2 a multiply-add; matrix
products, convolutions and attention products), three times for forward and backward. What a formulation computes beyond
that, such as position matrices, or blocks again, does not count. MFU is the share of the data sheet's dense rate.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import io
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch._dynamo
import torch._inductor.config
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.measure import CLASSES, RESULTS, judged, noise_batch, provenance, result_path, timed, wait
from benchmarks.obvious import BareViT, ObviousStep
from bootvit.config import Config
from bootvit.data.batches import Batch, TrainBatches
from bootvit.data.fractions import Subset, whole
from bootvit.data.table import ArrowImages, ImageTable, PixelImages
from bootvit.files import write_json
from bootvit.learner import Learner, World
from bootvit.load import load_config
from bootvit.models.sizes import cost_of

PARITY = Path(__file__).resolve().parent.parent / "tests" / "parity"
PARITY_CASES = ("deit", "vit_entmax", "agent_base_res_like", "joint", "trajectory_shared")
PARITY_TOLERANCE = 1e-8  # in float64; sums in another order than on the CPU
# dense, TFLOP/s of the NVIDIA data sheets: (a part of the card's name, bf16, fp32 without tensor cores)
DATA_SHEETS = (("H100 PCIe", 756, 51), ("H100", 989, 67), ("H200", 989, 67), ("A100", 312, 19.5), ("B200", 2250, 75))
COMPILED = "compiled"
GRAPHS = "compiled, CUDA graphs"
TIMM = "timm in a bare loop, compiled"
OBVIOUS = "slow obvious"


@dataclass
class Row:
    """One measurement; `what` is a name that `--only` matches."""

    what: str
    images_per_s: float | None = None
    ms: float | None = None  # a step
    tflops: float | None = None
    mfu: float | None = None  # percent
    peak_gib: float | None = None
    batch: int | None = None
    note: str = ""
    seconds: float = 0.0  # that the row took, compiling and warming up included
    failed: bool = False


@dataclass
class Sizes:
    """How large everything is; the test makes it small."""

    batch: int = 64
    largest: int = 1024
    seconds: float = 1.2  # of each measurement
    blocks: int = 3  # of which the median counts; as many steps come before, uncounted
    overrides: tuple[str, ...] = ()
    presets: tuple[str, ...] = ("small", "base")
    image: int = 224
    pixels: int = 10_000  # images of 32 px in memory
    jpegs: int = 512
    matrix: int = 8192
    workers: int = os.cpu_count() or 1


@dataclass
class Bench:
    """The table as it grows."""

    device: torch.device
    sizes: Sizes
    precision: str
    until: float
    only: str = "*"
    commit: str | None = None
    save: Callable[[Bench], None] = lambda bench: None
    rows: list[Row] = field(default_factory=list)
    best: dict[str, int] = field(default_factory=dict)  # batch, by name
    parity: dict[str, str] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)  # by the config's name

    def row(self, what: str, measure: Callable[[Row], None]) -> Row | None:
        """Measure, whatever happens; None where it was not asked for or time is up."""
        if not fnmatch.fnmatch(what, self.only):
            return None
        row, begin = Row(what), time.monotonic()
        if begin > self.until:
            row.note = "not measured: the budget was used up"
        else:
            self._measured(row, measure)
        row.seconds = round(time.monotonic() - begin, 1)
        self.rows.append(row)
        self.save(self)
        print(f"{what}: {shown(row)}", file=sys.stderr, flush=True)
        return row

    def _measured(self, row: Row, measure: Callable[[Row], None]) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            measure(row)
            if self.device.type == "cuda":
                row.peak_gib = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        except torch.OutOfMemoryError:
            row.note = "out of memory"
        except Exception as err:  # the next row may be fine
            row.failed, row.note = True, f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
        finally:
            free(self.device)

    def gflops_of(self, config: Config) -> float:
        """Of one image's forward pass; counted once a config."""
        if config.name not in self.gflops:
            self.gflops[config.name] = cost_of(config, CLASSES)[1]
        return self.gflops[config.name]

    def peak(self) -> float | None:
        """The card's dense TFLOP/s at this precision, by its data sheet; None for others."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        for part, bf16, fp32 in DATA_SHEETS:
            if part in name:
                return bf16 if self.precision == "bf16" else fp32
        return None

    def found(self, what: str) -> Row | None:
        """A row that has a number."""
        return next((row for row in self.rows if row.what == what and row.images_per_s), None)


def free(device: torch.device) -> None:
    """What the last row has left: cached graphs, and memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------- parity


def check_parity(bench: Bench) -> None:
    """The largest error of a few golden cases on the device, in float64."""
    if not (PARITY / "cases").is_dir():
        bench.parity = {"all": "not checked: tests/parity/cases is not there"}
        return
    sys.path.insert(0, str(PARITY))
    from parity_kit import names_of, read_case
    from parity_networks import run_mutual, run_single
    from parity_trajectory import run_trajectory

    kinds = {"single": run_single, "mutual": run_mutual, "trajectory": run_trajectory}
    for name in sorted(set(PARITY_CASES) & set(names_of(PARITY / "cases"))):
        case = read_case(PARITY / "cases", name)
        case.device, case.tolerance = bench.device, PARITY_TOLERANCE
        try:
            kinds[case.facts["case"]](case)
            bench.parity[name] = f"{case.worst:.1e}"
        except Exception as err:  # an error, or a value that differs
            bench.parity[name] = f"FAILED: {type(err).__name__}: {' '.join(str(err).split())[:300]}"
        print(f"parity {name}: {bench.parity[name]}", file=sys.stderr, flush=True)
    bench.save(bench)


# -------------------------------------------------------------------------------------------------- steps


def config_of(bench: Bench, name: str, batch: int, *more: str) -> Config:
    """A shipped config at this batch and precision, and at the test's sizes."""
    given = [f"precision={bench.precision}", f"data.batch_size={batch}", f"data.image_size={bench.sizes.image}"]
    return load_config(f"cifar10/{name}", [*given, *bench.sizes.overrides, *more])


def our_step(bench: Bench, config: Config) -> Callable[[Batch], object]:
    """A learner's step, numbered."""
    learner, count = Learner(config, CLASSES, World(0, 1, bench.device)), itertools.count()
    return lambda batch: learner.step(batch, next(count), 0, 0.0)


def time_steps(bench: Bench, row: Row, config: Config, step: Callable[[Batch], object]) -> None:
    """Fill the row: the median of a few blocks of steps."""
    batch, blocks = noise_batch(config, config.data.batch_size, bench.device), bench.sizes.blocks
    for _ in range(blocks):
        step(batch)
    once = timed(lambda: step(batch), bench.device)
    count = max(1, min(200, int(bench.sizes.seconds / blocks / max(once, 1e-6))))

    def block() -> None:
        for _ in range(count):
            step(batch)

    seconds = statistics.median(timed(block, bench.device) for _ in range(blocks)) / count
    fill(bench, row, config, seconds)


def fill(bench: Bench, row: Row, config: Config, seconds: float) -> None:
    """The numbers that follow from the seconds of a step."""
    size = config.data.batch_size
    row.batch, row.ms, row.images_per_s = size, round(seconds * 1e3, 3), round(size / seconds, 1)
    row.tflops = round(3 * bench.gflops_of(config) * size / seconds / 1e3, 2)
    peak = bench.peak()
    row.mfu = round(100 * row.tflops / peak, 1) if peak else None


def eager_rows(bench: Bench, name: str) -> None:
    """At the batch of the paper, then at twice that as long as it pays; the best is remembered."""
    best, size = 0.0, bench.sizes.batch
    while size <= bench.sizes.largest:

        def measure(row: Row, size: int = size) -> None:
            config = config_of(bench, name, size)
            time_steps(bench, row, config, our_step(bench, config))

        row = bench.row(f"{name}, eager, batch {size}", measure)
        if row is None or not row.images_per_s or row.images_per_s < 1.03 * best:
            break
        best, bench.best[name] = row.images_per_s, size
        size *= 2


def compiled_row(bench: Bench, name: str, size: int, way: str = COMPILED) -> None:
    """The same with compile=true."""

    def measure(row: Row) -> None:
        config = config_of(bench, name, size, "compile=true")
        with torch._inductor.config.patch("triton.cudagraphs", way == GRAPHS):  # type: ignore[no-untyped-call]
            time_steps(bench, row, config, our_step(bench, config))

    bench.row(f"{name}, {way}, batch {size}", measure)


def other_row(bench: Bench, name: str, way: str) -> None:
    """What ours is measured against, at the batch of the paper."""

    def measure(row: Row) -> None:
        config = config_of(bench, name, bench.sizes.batch)
        if way == OBVIOUS:
            time_steps(bench, row, config, ObviousStep(config, CLASSES, bench.device).step)
        else:
            time_steps(bench, row, config, BareViT(config, CLASSES, bench.device, compiled=True).step)

    bench.row(f"{name}, {way}, batch {bench.sizes.batch}", measure)


# -------------------------------------------------------------------------------------------------- input


def as_table(images: PixelImages | ArrowImages, count: int, native: tuple[int, int] | None) -> ImageTable:
    """Images without a data set: labels in turns."""
    labels = np.arange(count, dtype=np.int64) % CLASSES
    rows = pa.table({"label": pa.array(labels), "key": pa.array([str(row) for row in range(count)])})
    classes = tuple(str(label) for label in range(CLASSES))
    grey = (0.5, 0.5, 0.5)
    auto: Any = "crop" if native else "area"
    return ImageTable(rows, np.arange(count), images, classes, grey, grey, "0" * 32, native, auto)


def small_images(sizes: Sizes) -> Subset:
    """Noise of 32 x 32 pixels in memory, as CIFAR is."""
    pixels = np.random.default_rng(0).integers(0, 256, (sizes.pixels, 32, 32, 3), dtype=np.uint8)
    return whole(as_table(PixelImages(pixels), sizes.pixels, (32, 32)))


def large_images(sizes: Sizes) -> Subset:
    """JPEGs of 375 x 500 pixels, as most of ImageNet."""
    encoded = []
    for seed in range(8):
        coarse = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        encoded.append(out.getvalue())
    column = pa.chunked_array([pa.array([encoded[i % 8] for i in range(sizes.jpegs)], pa.binary())])
    return whole(as_table(ArrowImages(column, np.arange(sizes.jpegs)), sizes.jpegs, None))


def endless(batches: TrainBatches) -> Iterator[Batch]:
    """Epoch after epoch."""
    for epoch in itertools.count():
        yield from batches.epoch(epoch)


def pull(bench: Bench, row: Row, config: Config, subset: Subset, step: Callable[[Batch], object] | None) -> None:
    """Take batches for a while, with a training step on each or without; the first three are not counted."""
    source = endless(TrainBatches(subset, config, rank=0, world=1, device=bench.device))
    work: Callable[[Batch], object] = step or (lambda batch: batch)
    for _ in range(3):
        work(next(source))
    wait(bench.device)
    begin, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < bench.sizes.seconds:
        work(next(source))
        count += 1
    wait(bench.device)
    seconds = (time.perf_counter() - begin) / count
    source.close()  # type: ignore[attr-defined]
    if step is not None:
        fill(bench, row, config, seconds)
        return
    size = config.data.batch_size
    row.batch, row.ms, row.images_per_s = size, round(seconds * 1e3, 3), round(size / seconds, 1)


def input_rows(bench: Bench) -> None:
    """Batches alone."""
    sizes, batch = bench.sizes, [f"data.batch_size={bench.sizes.batch}"]

    def enlarged(row: Row) -> None:
        pull(bench, row, config_of(bench, "joint-small", sizes.batch), small_images(sizes), None)

    def as_they_are(row: Row) -> None:
        pull(bench, row, load_config("cifar10/joint-tiny", batch), small_images(sizes), None)

    def decoded(row: Row) -> None:
        config = config_of(bench, "joint-small", sizes.batch, f"data.workers={sizes.workers}")
        pull(bench, row, config, large_images(sizes), None)

    bench.row(f"input, 32 px in memory to {sizes.image} px on the device", enlarged)
    bench.row("input, 32 px in memory", as_they_are)
    bench.row(f"input, JPEGs of 375x500 px, {sizes.workers} processes", decoded)


def whole_rows(bench: Bench, *ways: str) -> None:
    """Batches and steps together, from 32-px images, at the best batch of the step."""
    size = bench.best.get("joint-small", bench.sizes.batch)
    for way in ways:

        def measure(row: Row, way: str = way) -> None:
            config = config_of(bench, "joint-small", size, f"compile={str(way == COMPILED).lower()}")
            pull(bench, row, config, small_images(bench.sizes), our_step(bench, config))

        bench.row(f"joint-small, {way}, end to end, batch {size}", measure)


# --------------------------------------------------------------------------------------------------- all


def other_stem(preset: str) -> str:
    """The ending of the configs whose agent has the stem that the preset's own ones have not."""
    return "-resnet" if preset == "small" else "-patch"


def measure_all(bench: Bench) -> None:
    """Every row, the most wanted first."""
    presets, paper = bench.sizes.presets, bench.sizes.batch
    check_parity(bench)
    bench.row("matrix product", lambda row: matrix_product(bench, row))
    for preset, method in itertools.product(presets, ("vit", "joint", "shared")):
        eager_rows(bench, f"{method}-{preset}")
        if method != "vit":
            other_row(bench, f"{method}-{preset}", OBVIOUS)
    input_rows(bench)
    whole_rows(bench, "eager")
    for preset in presets:
        compiled_row(bench, f"joint-{preset}", bench.best.get(f"joint-{preset}", paper))
    whole_rows(bench, COMPILED)
    for preset in presets:
        compiled_row(bench, f"vit-{preset}", paper)
        other_row(bench, f"vit-{preset}", TIMM)
    for preset in presets:
        compiled_row(bench, f"shared-{preset}", paper)
        if bench.best.get(f"joint-{preset}", paper) != paper:
            compiled_row(bench, f"joint-{preset}", paper)
        compiled_row(bench, f"joint-{preset}", paper, GRAPHS)
    for preset, method in itertools.product(presets, ("joint", "shared")):
        eager_rows(bench, f"{method}-{preset}{other_stem(preset)}")
    for preset, method in itertools.product(presets, ("joint", "shared")):
        compiled_row(bench, f"{method}-{preset}{other_stem(preset)}", paper)


def matrix_product(bench: Bench, row: Row) -> None:
    """What the device gives a large square product, beside the data sheet."""
    n = bench.sizes.matrix
    a = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16 if bench.precision == "bf16" else torch.float32)
    seconds = statistics.median(timed(lambda: a @ a, bench.device) for _ in range(5))
    row.tflops = round(2 * n**3 / seconds / 1e12, 2)
    row.ms, row.note = round(seconds * 1e3, 3), f"{n} x {n}"
    peak = bench.peak()
    row.mfu = round(100 * row.tflops / peak, 1) if peak else None


def goals(bench: Bench) -> list[dict[str, Any]]:
    """The issue's table: what was measured beside what is wanted."""
    at, out = bench.sizes.batch, []

    def rate(name: str, ways: tuple[str, ...], batch: int) -> float | None:
        rows = [bench.found(f"{name}, {way}, batch {batch}") for way in ways]
        return max((row.images_per_s for row in rows if row and row.images_per_s), default=None)

    def add(what: str, goal: float, value: float | None) -> None:
        out.append(judged(what, goal, value))

    ours = ("eager", COMPILED, GRAPHS)
    for preset in bench.sizes.presets:
        name = f"vit-{preset}"
        add(f"{name} / timm's compiled, batch {at}", 1.0, over(rate(name, ours, at), rate(name, (TIMM,), at)))
    for name, goal in (("joint-small", 3.0), ("joint-base", 3.0), ("shared-small", 4.0), ("shared-base", 5.0)):
        if name.split("-")[1] in bench.sizes.presets:
            value = over(rate(name, ours, at), rate(name, (OBVIOUS,), at))
            add(f"{name} / slow obvious, batch {at}", goal, value)
    for name, goal in (("joint-small", 30.0), ("joint-base", 35.0)):
        of = [row.mfu for row in bench.rows if row.what.startswith(f"{name}, ") and row.mfu and "slow" not in row.what]
        if name.split("-")[1] in bench.sizes.presets:
            add(f"{name}: MFU at its best batch, %", goal, max(of, default=None))
    best = bench.best.get("joint-small", at)
    for way in ("eager", COMPILED):
        end, step = (rate("joint-small", (w,), best) for w in (f"{way}, end to end", way))
        add(f"joint-small, {way}: end to end / step alone", 0.97, over(end, step))
    add(
        "joint-small end to end, images/s",
        1e4,
        rate("joint-small", ("eager, end to end", "compiled, end to end"), best),
    )
    return out


def over(a: float | None, b: float | None) -> float | None:
    """a / b where both were measured."""
    return a / b if a and b else None


def shown(row: Row) -> str:
    """One row's numbers as text."""
    parts = [
        f"{row.images_per_s:,.0f} images/s" if row.images_per_s else "",
        f"{row.ms:.2f} ms" if row.ms else "",
        f"{row.tflops} TFLOP/s" if row.tflops else "",
        f"MFU {row.mfu}%" if row.mfu is not None else "",
        f"{row.peak_gib} GiB" if row.peak_gib is not None else "",
        row.note,
    ]
    return ", ".join(part for part in parts if part)


def print_table(bench: Bench) -> None:
    """Everything, for people."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title=f"{bench.precision} on {bench.device}; parity: {bench.parity}")
    for column in ("what", "images/s", "ms a step", "TFLOP/s", "MFU %", "peak GiB", "seconds", "note"):
        table.add_column(column, justify="left" if column in ("what", "note") else "right")
    for row in bench.rows:
        numbers = (row.images_per_s, row.ms, row.tflops, row.mfu, row.peak_gib, row.seconds)
        texts = ("" if n is None else f"{n:,.2f}" for n in numbers)
        table.add_row(row.what, *texts, escape(row.note))
    console.print(table)
    wanted = Table(title="goals")
    for column in ("what", "goal", "measured", "state"):
        wanted.add_column(column)
    for one in goals(bench):
        measured = "" if one["measured"] is None else f"{one['measured']:g}"
        wanted.add_row(one["what"], one["goal"], measured, one["state"])
    console.print(wanted)


def failed(bench: Bench) -> bool:
    """Whether a row or a parity case failed."""
    return any(row.failed for row in bench.rows) or any("FAILED" in text for text in bench.parity.values())


def document(bench: Bench) -> dict[str, Any]:
    """The JSON file."""
    given = {"commit": bench.commit} if bench.commit else {}
    return provenance(
        "benchmarks.gpu",
        bench.device,
        **given,
        seed=0,
        precision=bench.precision,
        flops="3 x torch.utils.flop_counter's count of a forward pass; no position matrices, no recomputation",
        data_sheet_tflops=bench.peak(),
        parity=bench.parity,
        goals=goals(bench),
        rows=[asdict(row) for row in bench.rows],
    )


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> int:
    """Measure, print, write `benchmarks/results/gpu_<device>_<date>.json`; 1 if a row or a parity case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no row is begun")
    parser.add_argument("--only", default="*", help="names of rows, such as 'joint-small,*'")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="of this copy, where it has no .git")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: error: there is no CUDA device (--device cpu tries the script)", file=sys.stderr)
        return 2
    path = result_path(options.out, "gpu", device)
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        device,
        sizes or Sizes(),
        precision="bf16" if device.type == "cuda" else "fp32",
        until=time.monotonic() + options.budget,
        only=options.only,
        commit=options.commit,
        save=lambda bench: write_json(path, document(bench)),
    )
    measure_all(bench)
    print_table(bench)
    print(path)
    return int(failed(bench))


if __name__ == "__main__":
    sys.exit(main())
