"""Files that are replaced as a whole."""

import os
from pathlib import Path
from typing import Any

from bootvit.runs import take_lease


def test_a_finished_run_keeps_nothing_of_what_killed_processes_were_writing(tmp_path: Path) -> None:
    folder = take_lease(tmp_path)
    began = (tmp_path / "lease.json").stat().st_mtime
    (tmp_path / "checkpoints").mkdir()
    parts = [tmp_path / ".result.json.17.part", tmp_path / "checkpoints" / ".step-00000003.safetensors.17.part"]
    another = tmp_path / ".mlflow.json.18.part"  # of a process that writes now
    for part, at in [*((part, began - 1) for part in parts), (another, began + 1)]:
        part.touch()
        os.utime(part, (at, at))
    unfinished: Any = {"status": "interrupted"}
    folder.write_result(unfinished)
    assert all(part.exists() for part in parts)
    folder.write_result(unfinished | {"status": "finished"})
    assert [part.name for part in tmp_path.rglob("*.part")] == [another.name]
