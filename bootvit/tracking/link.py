"""`mlflow.json`: which MLflow run belongs to a folder, and how far it has got there."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bootvit.addresses import MASK
from bootvit.errors import UserError
from bootvit.files import write_json
from bootvit.tracking.store import DATABASES

Status = Literal["FINISHED", "FAILED", "KILLED"]


class RunLink(BaseModel):
    """Kept beside the run, so that the same MLflow run is found again whatever happened in between."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_key: str  # ours, made before the run is created: a crash in between cannot make a second one
    run_id: str | None = None  # MLflow's
    uri: str = ""  # for people; without a password
    experiment: str = ""
    experiment_id: str = ""  # MLflow's
    started: float | None = None  # seconds since 1970, as `ended_at`; None: written by an earlier version
    shipped_step: int = -1  # the journal is there up to this step
    ended: Status | None = None  # how the run ended; None while it goes on
    ended_at: float | None = None
    complete: bool = False  # whether MLflow has been told so, artifacts included

    @classmethod
    def load(cls, path: Path, started: float | None = None) -> RunLink:
        """The link that is there, else a new one of a run that began at `started`, or now; it is written at once."""
        if not path.exists():
            link = cls(run_key=uuid.uuid4().hex, started=time.time() if started is None else started)
            link.save(path)
            return link
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as err:
            raise UserError(f"{path}: not what bootvit wrote there; remove it to start a new MLflow run") from err

    def save(self, path: Path) -> None:
        """Replace the file as a whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.model_dump())


def charts(folder: Path) -> str | None:
    """Where MLflow shows the learning curves of a folder's run beside its experiment's; None where it is not there."""
    path = folder / "mlflow.json"
    link = RunLink.load(path) if path.exists() else None
    if link is None or not link.experiment_id or not link.uri.startswith(("http", "sqlite", *DATABASES)):
        return None
    page = f"/#/experiments/{link.experiment_id}/runs?compareRunsMode=CHART"
    if link.uri.startswith("http"):
        return f"{link.uri.replace(f'{MASK}@', '').rstrip('/')}{page}"
    return f"http://127.0.0.1:5000{page} after mlflow ui --backend-store-uri {link.uri}"
