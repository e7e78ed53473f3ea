"""Progress on the terminal, read from the run's journal: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

from bootvit.config import Config
from bootvit.data import DataSplits
from bootvit.loop import total_steps
from bootvit.result import Result
from bootvit.runs import RunFolder, place_of
from bootvit.tracking import Record, read_journal
from bootvit.tracking.link import charts

if TYPE_CHECKING:
    from rich.console import Console, Group


def follow_progress(
    config: Config, folder: RunFolder, stop: threading.Event, steps: int, out: TextIO | None = None
) -> None:
    """Show what the journal gains until `stop` is set and everything in it is shown; `steps` are those of the run."""
    view: _Bar | _Lines = _Bar(config, steps) if (out or sys.stdout).isatty() else _Lines(config, out or sys.stdout)
    offset, inode, shown = 0, -1, 0.0
    with view:
        while True:
            last = stop.wait(0.3)
            now = folder.journal.stat().st_ino if folder.journal.exists() else -1
            cut = now != inode  # by a run that goes on: another file, in which the place means nothing
            records, offset = read_journal(folder.journal, 0 if cut else offset)
            view.show([record for record in records if record.time > shown] if cut else records)
            inode, shown = now, records[-1].time if records else shown
            if last:
                return


def run_steps(config: Config, splits: DataSplits) -> int:
    """Optimiser steps of the whole run."""
    images = len(splits.train)
    return total_steps(config, images // min(config.data.batch_size, images))


def opening(config: Config, splits: DataSplits, device: torch.device | None) -> str:
    """What is trained on what, before it starts; `device` None is Ray's workers."""
    from bootvit.models.sizes import cost_of

    parameters, gflops = cost_of(config, len(splits.classes))
    images = [f"{len(splits.train)} training"]
    images += [f"{len(part)} {word}" for part, word in ((splits.held_out, "held-out"), (splits.test, "test")) if part]
    rows, cols = config.image_size
    where = f"on {device}" if device else f"by {config.ray.num_workers} workers under Ray Train"
    steps, epochs = run_steps(config, splits), config.schedule.epochs
    return (
        f"{config.name}: method {config.method}, {parameters / 1e6:.2f} M parameters, {gflops:.3g} GFLOPs an image, "
        f"{where}\n"
        f"{', '.join(images)} images of {len(splits.classes)} classes at {rows}x{cols}\n"
        f"{epochs} epochs, {steps} steps of {config.data.batch_size}\n"
        f"folder: {place_of(config)}"
    )


def what_next(config: Config) -> str:
    """What to type when a run has finished, and where its curves are."""
    place = place_of(config)
    below = Path("runs").resolve() / config.name
    run = config.name if place == below else place
    look = "explain" if "vit" in config.networks else "show"
    commands = (f"eval {run} --local", f"predict {run} IMAGE", f"{look} {run}")
    shown = charts(place) if isinstance(place, Path) else None
    return (
        "next: "
        + "\n      ".join(f"bootvit {command}" for command in commands)
        + (f"\ncharts: {shown}" if shown else "")
    )


def scores(values: dict[str, float], names: tuple[str, ...]) -> str:
    """`test vit 45.8% agent 90.4%  held-out vit 44.0% agent 89.9%`: of what was evaluated."""
    parts = []
    for split, word in (("test", "test"), ("held_out", "held-out")):
        own = [f"{net} {values[f'{split}/{net}/top1']:.1f}%" for net in names if f"{split}/{net}/top1" in values]
        parts += [f"{word} {' '.join(own)}"] if own else []
    return "  ".join(parts)


def running(values: dict[str, float], names: tuple[str, ...]) -> str:
    """`310 images/s  loss vit 1.234 agent 0.871  rate 0.002`: the newest of each."""
    parts = []
    if "train/images_per_second" in values:
        parts.append(f"{values['train/images_per_second']:.0f} images/s")
    losses = [f"{net} {values[f'train/{net}/loss']:.3f}" for net in names if f"train/{net}/loss" in values]
    parts += [f"loss {' '.join(losses)}"] if losses else []
    if "train/lr" in values:
        parts.append(f"rate {values['train/lr']:.2g}")
    return "  ".join(parts)


def without_scores(values: dict[str, float]) -> dict[str, float]:
    """What goes on from one epoch to the next: an evaluation counts only where it was made."""
    return {name: value for name, value in values.items() if name.startswith(("train/", "data/"))}


def speak(values: dict[str, float], names: tuple[str, ...]) -> str:
    """A whole line of an epoch, from the newest value of each name."""
    broken = [f"broken images left out: {values['data/skipped']:.0f}"] if "data/skipped" in values else []
    return "  ".join(filter(None, [scores(values, names), running(values, names), *broken]))


def print_result(result: Result) -> None:
    """The final table of a run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result['name']}: {result['epochs']} epochs, fraction {result['fraction']:g}", title_justify="left"
    )
    for heading in ("network", "final top-1", "final top-5", "held-out top-1", "best top-1 (epoch)"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for net, final in (result["final"] or result["held_out"] or {}).items():
        held = (result["held_out"] or {}).get(net)
        best = result["best"].get(net)
        table.add_row(
            net,
            f"{final['top1']:.2f}",
            f"{final['top5']:.2f}",
            f"{held['top1']:.2f}" if held else "-",
            f"{best['top1']:.2f} ({best['epoch']})" if best else "-",
        )
    console = Console()
    console.print(table)
    if result["skipped"]:
        console.print(f"broken images left out (data.on_error=skip): {result['skipped']}", highlight=False)
        for image in result["skipped_images"]:
            console.print(f"  {image}", markup=False, highlight=False, soft_wrap=True)


class _Lines:
    """One plain line an epoch."""

    def __init__(self, config: Config, out: TextIO) -> None:
        self.config, self.out = config, out
        self.values: dict[str, float] = {}
        self.epoch: int | None = None
        self.first: tuple[int, float] | None = None  # the first epoch seen to end, and when

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        self._line()

    def show(self, records: list[Record]) -> None:
        """Print the epochs that these records complete."""
        for record in records:
            if self.epoch is not None and record.epoch != self.epoch:
                self._line()
            self.epoch = record.epoch
            self.values[record.name] = record.value

    def _line(self) -> None:
        if self.epoch is None:
            return
        done, total = self.epoch + 1, self.config.schedule.epochs
        text = speak(self.values, self.config.networks) + self._time_left(done, total)
        print(f"{self.config.name}  epoch {done}/{total}  {text}", file=self.out, flush=True)
        self.values = without_scores(self.values)
        self.epoch = None

    def _time_left(self, done: int, total: int) -> str:
        now = time.monotonic()
        if self.first is None:
            self.first = (done, now)
            return ""
        epoch, when = self.first
        return f"  {(now - when) / (done - epoch) * (total - done):.0f} s left" if done > epoch else ""


class _Bar:
    """A live bar of the steps with the time that the run will take, and below it where the epoch stands, with speed,
    losses and rate, on as many lines as they need; evaluations stay above, as lines."""

    def __init__(self, config: Config, steps: int, console: Console | None = None) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self.config, self.steps = config, steps
        self.values: dict[str, float] = {}
        name = Column(max_width=24, no_wrap=True, overflow="ellipsis")
        self.bar = Progress(
            TextColumn("[bold]{task.description}", table_column=name),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            expand=True,
            console=console,
        )
        self.task = self.bar.add_task(config.name, total=steps)
        self.live = Live(self, console=self.bar.console, refresh_per_second=4)

    def __enter__(self) -> _Bar:
        self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.stop()

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        return Group(
            self.bar, Text("  ".join(filter(None, [self._epoch(), running(self.values, self.config.networks)])))
        )

    def show(self, records: list[Record]) -> None:
        """Move to the newest step; an epoch that was evaluated becomes a line above."""
        for record in records:
            self.values[record.name] = record.value
            if record.name == "epoch":
                self._line(record)
        if records:
            self.bar.update(self.task, completed=records[-1].step)

    def _epoch(self) -> str:
        """`epoch 18/25, 0:03 left`; the time is not known before two looks at the journal."""
        task, epochs = self.bar.tasks[0], self.config.schedule.epochs
        long = max(1, round(self.steps / epochs))
        done = int(task.completed)
        epoch = min(done // long + 1, epochs)
        left = min(epoch * long, self.steps) - done
        time_left = f", {clock(left / task.speed)} left" if task.speed and done < self.steps else ""
        return f"epoch {epoch}/{epochs}{time_left}"

    def _line(self, end: Record) -> None:
        text = scores(self.values, self.config.networks)
        if text:
            self.live.console.print(f"epoch {end.epoch + 1}/{self.config.schedule.epochs}  {text}", highlight=False)
        self.values = without_scores(self.values)


def clock(seconds: float) -> str:
    """`0:03`, `12:40`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
