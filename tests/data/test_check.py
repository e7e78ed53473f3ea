"""`bootvit data check`: every image read once, and everything that is wrong named."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_making import data_config, picture, write_folder, write_small_parquet

from bootvit.__main__ import main
from bootvit.data import check as module
from bootvit.data import open_table
from bootvit.data.check import check, report
from bootvit.data.decode import BrokenImage
from bootvit.data.table import FileImages, ImageTable, Rows


def table_of(root: Path, source: str = "imagefolder") -> ImageTable:
    table = open_table(data_config(source=source, root=root), "train")
    assert table is not None
    return table


@pytest.mark.parametrize("processes", [1, 3])
def test_what_is_found_is_what_reading_one_by_one_finds(tmp_path: Path, processes: int) -> None:
    write_folder(tmp_path, "train", {"a": 90, "b": 60})
    for number in (0, 7, 63, 64, 89):
        (tmp_path / f"train/a/img_{number:04d}.jpg").write_bytes(b"broken")
    table = table_of(tmp_path)
    slow = {}
    for row in range(len(table)):
        try:
            table.images.open(row)  # type: ignore[union-attr]
        except BrokenImage as err:
            slow[row] = str(err)
    found = check(table, "train", processes)
    assert found.images == 150
    assert found.broken == slow
    assert len(slow) == 5
    assert sum(found.sizes.values()) == 145


def test_row_groups_of_parquet_files_are_read_whole(tmp_path: Path) -> None:
    write_small_parquet(tmp_path, per_class=40)
    found = check(table_of(tmp_path, "parquet"), "train", 2)
    assert (found.images, found.broken, found.sizes) == (120, {}, {(16, 16): 120})


def test_an_image_that_kills_its_process_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, "train", {"a": 90, "b": 60}, size=(16, 16))
    (tmp_path / "train/a/img_0033.jpg").write_bytes(b"deadly")
    (tmp_path / "train/b/img_0033.jpg").write_bytes(b"broken")
    real = FileImages.scan

    def scan(self: FileImages, rows: Rows) -> Iterator[tuple[int, bytes]]:
        for place, data in real(self, rows):
            if data == b"deadly":
                os.kill(os.getpid(), signal.SIGKILL)
            yield place, data

    table = table_of(tmp_path)
    monkeypatch.setattr(FileImages, "scan", scan)
    found = check(table, "train", 2)
    names = {table.rows["key"].to_pylist()[row]: reason for row, reason in found.broken.items()}
    assert set(names) == {"a/img_0033.jpg", "b/img_0033.jpg"}
    assert names["a/img_0033.jpg"] == "the process that reads it dies: out of memory?"
    assert found.images == 150
    assert module._table is None


def test_nothing_of_the_reading_processes_is_left_for_the_end_of_the_command(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"a": 90, "b": 60}, size=(16, 16))
    check(table_of(tmp_path), "train", 2)
    assert not [thread for thread in threading.enumerate() if "ExecutorManager" in type(thread).__name__]
    assert not multiprocessing.active_children()


def test_the_report_names_every_kind_of_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path, "train", {"a": 8, "b": 8})
    write_folder(tmp_path, "val", {"a": 3, "b": 3})
    whole = (tmp_path / "train/a/img_0002.jpg").read_bytes()
    (tmp_path / "train/a/img_0000.jpg").write_bytes(b"")
    (tmp_path / "train/a/img_0001.jpg").write_text("<!DOCTYPE html>")
    (tmp_path / "train/a/img_0002.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/b/gone.png").symlink_to("nowhere.png")
    (tmp_path / "val/b/img_0001.jpg").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "x.yaml").write_text(
        f"data: {{source: imagefolder, root: {tmp_path}, image_size: 32}}\nmethod: agent\n"
    )
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path / "x.yaml"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == {"train": 17, "test": 6}
    named = [(p["split"], Path(p["image"]).name) for p in found["problems"]]
    assert sorted(named) == [
        ("test", "img_0001.jpg"),
        ("train", "gone.png"),
        *[("train", f"img_000{i}.jpg") for i in range(3)],
    ]
    assert main(["data", "check", str(tmp_path / "x.yaml")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("17 train, 6 test images read in ")
    assert lines[-1].endswith(": 5 problems")
    for name in ("gone.png", "img_0000.jpg", "img_0001.jpg", "img_0002.jpg"):
        (tmp_path / "train" / ("b" if name == "gone.png" else "a") / name).unlink()
    (tmp_path / "val/b/img_0001.jpg").unlink()
    assert main(["data", "check", str(tmp_path / "x.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("no problems")


def test_sizes_that_cannot_be_trained_together_are_problems(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"a": 40, "b": 40}, size=(16, 16))
    (tmp_path / "train/b/z.jpg").write_bytes(picture(0, 17, 16))  # beyond the images whose size decides
    found = report(data_config(source="imagefolder", root=tmp_path))
    (problem,) = found["problems"]
    assert Path(problem["image"]).name == "z.jpg"
    assert "17x16 pixels, as 1 of 81 images, but most have 16x16" in problem["reason"]
    assert report(data_config(source="imagefolder", root=tmp_path, augment="area"))["problems"] == []


def test_raw_sources_have_nothing_to_be_broken() -> None:
    found = report(data_config(source="digits"))
    assert (found["images"], found["problems"]) == ({"train": 1438, "test": 359}, [])
