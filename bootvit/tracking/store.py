"""Which MLflow store, and how to reach it: quiet, quick to give up, and created once."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import uuid
from pathlib import Path
from typing import Any

from bootvit.errors import UserError

SQLITE = "sqlite:///"


def mlflow_available() -> bool:
    """Whether MLflow can be imported (looked up, not imported: that takes seconds)."""
    return importlib.util.find_spec("mlflow") is not None


def tracking_uri(given: str | None) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` in the current folder; absolute."""
    name, uri = "tracking.uri", given
    if uri is None and os.environ.get("MLFLOW_TRACKING_URI"):
        name, uri = "MLFLOW_TRACKING_URI", os.environ["MLFLOW_TRACKING_URI"]
    if uri is None:
        uri = f"{SQLITE}mlflow.db"
    if uri != "databricks" and not re.match(r"[a-z][a-z0-9+.-]*://", uri):
        raise UserError(f"{name}={uri!r}: not a URI, such as sqlite:///mlflow.db or http://127.0.0.1:5000")
    path = sqlite_path(uri)
    return f"{SQLITE}{path}" if path else uri


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of an SQLite store's file; None for any other store."""
    return Path(uri.removeprefix(SQLITE)).expanduser().resolve() if uri.startswith(SQLITE) else None


def public(uri: str) -> str:
    """A URI without the password that may be in it, for messages and files."""
    return re.sub(r"://[^/@]*@", "://***@", uri)


def connect(uri: str) -> Any:
    """An `MlflowClient`; an SQLite store is created first if it is not there.

    The client is quiet, and a server that is down makes a call fail within seconds instead of minutes. An SQLite file
    is closed after every call: each connection kept open would cache megabytes of it.
    """
    path = sqlite_path(uri)
    for key, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **({"MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool"} if path else {}),
    }.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if path and not path.exists():
        _create_sqlite(path)
    return MlflowClient(uri)


def _create_sqlite(path: Path) -> None:
    """Create the database under another name and link it into place.

    Processes that create one database together make MLflow's migration crash; this way each makes its own,
    the first one is kept, and a process that is killed meanwhile leaves no half-made database.
    """
    from mlflow.tracking import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    MlflowClient(f"{SQLITE}{temporary}").get_experiment("0")
    try:
        os.link(temporary, path)
    except OSError:
        pass  # another process was first; or no hard links here, and then MLflow creates it in place
    finally:
        temporary.unlink()


def experiment_id(client: Any, uri: str, name: str) -> str:
    """The experiment of that name, created if need be; artifacts of an SQLite store lie beside it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        path = sqlite_path(uri)
        folder = path.parent / "mlruns" / re.sub(r"[^\w-]", "_", name) if path else None
        try:
            return str(client.create_experiment(name, artifact_location=folder.as_uri() if folder else None))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:  # it was not another process that created it meanwhile
                raise
    return str(found.experiment_id)


def forget_artifacts(run_id: str | None) -> None:
    """Drop what MLflow keeps in memory of a run's artifact store: a sweep is done with a trial that has ended.

    MLflow would keep it for the 1,024 newest runs, and has no public call for this.
    """
    from mlflow.tracking._tracking_service import utils

    getattr(utils, "_artifact_repos_cache", {}).pop(run_id, None)
