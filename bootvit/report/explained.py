"""What `bootvit explain` has left in the folders of runs, as parts of a page."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from bootvit.files import read_json
from bootvit.report.page import Block, Heading, Picture, Text
from bootvit.report.rows import RunRow

SHOWN = 6  # runs
DATA = "explain.json"


def explained_blocks(runs: Sequence[RunRow], out: Path) -> list[Block]:
    """The figures of the runs that were explained, copied to `out`, with what they show."""
    blocks: list[Block] = []
    found = [row for row in runs if row.folder is not None and (row.folder / "explain" / DATA).exists()]
    for row in found[:SHOWN]:
        assert row.folder is not None
        document = read_json(row.folder / "explain" / DATA)
        blocks += [Heading(f"Inside {row.name}"), *(Text(note) for note in document.get("notes", []))]
        for figure in document.get("figures", []):
            source = row.folder / "explain" / Path(figure["file"]).name
            if source.exists():
                target = out / f"explain-{row.name}-{source.name}"
                shutil.copyfile(source, target)
                blocks.append(Picture(target, figure["caption"]))
    if len(found) > SHOWN:
        blocks.append(Text(f"{len(found) - SHOWN} more runs have an explain/ folder."))
    return blocks
