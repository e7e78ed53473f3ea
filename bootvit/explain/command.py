"""What `bootvit explain` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bootvit.explain.run import document, explain, in_words, write
from bootvit.output import print_json
from bootvit.runs import open_run
from bootvit.tracking.attach import attach


def command(
    run: str, images: Sequence[Path], *, count: int, out: Path | None, best: bool = False, as_json: bool = False
) -> None:
    """Explain a run: its figures and data go into its folder and to MLflow, or into `out`; a table to the terminal.

    With `as_json` one document is printed instead, and files are written only if `out` is given.
    """
    config, folder = open_run(run, "all")
    found = explain(config, folder, images, count=count, best=best)
    if as_json:
        print_json(document(found))
    else:
        print(in_words(found))
    if as_json and out is None:
        return
    files = write(found, out or folder.path / "explain")
    if out is None:
        folder.keep_export(files[0])
        attach(folder.path, files, "explain")
    if not as_json:
        print("written: " + ", ".join(str(file) for file in files))
