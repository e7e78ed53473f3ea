"""What `bootvit report` does."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from bootvit.addresses import is_address
from bootvit.config import RayConfig
from bootvit.errors import UserError
from bootvit.files import read_json, write_atomic
from bootvit.output import print_json
from bootvit.report.from_mlflow import collect_mlflow
from bootvit.report.rows import collect_folders
from bootvit.report.sweep import print_sweep, sweep_json, write_sweep_report
from bootvit.report.write import print_table, report_json, write_report
from bootvit.storage import Store, place_at
from bootvit.tracking import tracking_uri
from bootvit.tracking.attach import attach


def command(
    folders: Sequence[str],
    *,
    experiment: str | None = None,
    sweep: str | None = None,
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Report runs from folders (by default the storage path) or from MLflow, or a sweep.

    The table goes to the terminal, the page into `out`: by default `./report`, or `report` in the sweep's folder.
    With `as_json` one document is printed instead, and a page written only if `out` is given.
    """
    if sum((bool(folders), experiment is not None, sweep is not None)) > 1:
        raise UserError("FOLDER, --experiment and --sweep exclude one another: give one of them")
    if sweep is not None:
        place = place_at(sweep) if is_address(sweep) else find_sweep(sweep)
        return _sweep_in_store(place, out, as_json) if isinstance(place, Store) else _sweep(place, out, as_json)
    if experiment is not None:
        rows = collect_mlflow(tracking_uri(None), experiment)
    else:
        rows = collect_folders([place_at(folder) for folder in folders] or [storage()])
    if as_json:
        print_json(report_json(rows))
    else:
        print_table(rows)
    if out or not as_json:
        _say(write_report(rows, out or Path("report")), quiet=as_json)
    return None


def storage() -> Path:
    """Where runs are stored by default."""
    return Path(RayConfig().storage_path)


def find_sweep(name: str) -> Path:
    """A sweep's folder, or its name below the storage path."""
    for folder in (Path(name), storage() / name):
        if (folder / "sweep.json").is_file():
            return folder
    raise UserError(f"--sweep {name}: no sweep.json in {name} or {storage() / name}; run: bootvit sweep SWEEP")


def _sweep_in_store(store: Store, out: Path | None, as_json: bool) -> None:
    """The same from a copy of what is small of it; without `out` the page goes to the store, beside the last one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sweep(store, folder)
        _sweep(folder, out, as_json)
        for file in sorted((folder / "report").glob("*")):
            store.write(f"report/{file.name}", file)


def copy_sweep(store: Store, folder: Path) -> None:
    """What a report reads: the sweep's state, its link to MLflow, and its trials' configs."""
    for name in ("sweep.json", "mlflow.json"):
        if (data := store.read(name)) is not None:
            write_atomic(folder / name, data)
    if not (folder / "sweep.json").exists():
        raise UserError(f"--sweep {store}: no sweep.json there; run: bootvit sweep SWEEP")
    runs = [str(trial["run"]) for trial in read_json(folder / "sweep.json").get("trials", ())]
    for run, data in zip(runs, store.read_all([f"{run}/config.yaml" for run in runs]), strict=True):
        if data is not None:
            (folder / run).mkdir(parents=True)
            write_atomic(folder / run / "config.yaml", data)


def _sweep(folder: Path, out: Path | None, as_json: bool) -> None:
    if as_json:
        print_json(sweep_json(folder))
    else:
        print_sweep(folder)
    if out or not as_json:
        files = write_sweep_report(folder, out or folder / "report")
        attach(folder, files, "report")
        _say(files, quiet=as_json)


def _say(files: Sequence[Path], *, quiet: bool) -> None:
    if not quiet:
        print("written: " + ", ".join(str(file) for file in files))
