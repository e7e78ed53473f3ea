"""Progress on the terminal, read from the run's journal: a bar on a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from bootvit.config import Config
from bootvit.result import Result
from bootvit.runs import RunFolder
from bootvit.tracking import Record, read_journal


def follow_progress(config: Config, folder: RunFolder, stop: threading.Event, out: TextIO | None = None) -> None:
    """Show what the journal gains until `stop` is set and everything in it is shown."""
    view: _Bar | _Lines = _Bar(config) if (out or sys.stdout).isatty() else _Lines(config, out or sys.stdout)
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


def speak(values: dict[str, float], names: tuple[str, ...]) -> str:
    """`vit loss 1.234  vit 45.8%  agent 90.4%  310 images/s` from the newest value of each name."""
    parts = [f"{net} loss {values[f'train/{net}/loss']:.3f}" for net in names if f"train/{net}/loss" in values]
    for split in ("test", "held_out"):
        parts += [f"{net} {values[f'{split}/{net}/top1']:.1f}%" for net in names if f"{split}/{net}/top1" in values]
    if "data/skipped" in values:
        parts.append(f"broken images left out: {values['data/skipped']:.0f}")
    if "train/images_per_second" in values:
        parts.append(f"{values['train/images_per_second']:.0f} images/s")
    return "  ".join(parts)


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
        self.epoch = None

    def _time_left(self, done: int, total: int) -> str:
        now = time.monotonic()
        if self.first is None:
            self.first = (done, now)
            return ""
        epoch, when = self.first
        return f"  {(now - when) / (done - epoch) * (total - done):.0f} s left" if done > epoch else ""


class _Bar:
    """A live bar with losses, accuracies, images/s and the time left."""

    def __init__(self, config: Config) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.config = config
        self.values: dict[str, float] = {}
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task(config.name, total=config.schedule.epochs, text="")

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def show(self, records: list[Record]) -> None:
        """Advance to the newest record."""
        self.values |= {r.name: r.value for r in records}
        done = max((r.epoch + 1 for r in records if not r.name.startswith("train/")), default=None)
        self.bar.update(self.task, completed=done, text=speak(self.values, self.config.networks))
