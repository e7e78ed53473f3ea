"""Which MLflow store, and how to reach it: quiet, quick to give up, and created once."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bootvit.addresses import MASK, public_address, without_secrets
from bootvit.config import Config
from bootvit.errors import UserError

SQLITE = "sqlite:///"
DATABASES = ("postgresql", "mysql", "mssql")  # beside SQLite
FORMS = "sqlite:///FILE, http://HOST:PORT, https://HOST, postgresql://HOST/NAME or databricks://PROFILE"
REQUEST_S = "5"  # for a server to answer, unless MLFLOW_HTTP_REQUEST_TIMEOUT is set
LOCKED_S = 5.0  # for another process to let go of an SQLite file
OPENS_ON_RUNS = {"mlflow.experimentKind": "custom_model_development"}  # else its page first asks what is in it
UPLOAD_BYTES_PER_S = 1e6  # the slowest upload that is waited for
CONNECTIONS = 3  # attempts to reach a database server; MLflow's ten take 100 s


def mlflow_available() -> bool:
    """Whether MLflow can be imported (looked up, not imported: that takes seconds)."""
    return importlib.util.find_spec("mlflow") is not None


def check_tracking(config: Config) -> None:
    """Refuse a tracking address of a wrong form, before anything is taken; one that is not used does not matter."""
    if config.tracking.enabled:
        tracking_uri(config.tracking.uri)


def tracking_uri(given: str | None) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` in the current folder; absolute, of a right form."""
    name, uri = "tracking.uri", given
    if uri is None and os.environ.get("MLFLOW_TRACKING_URI"):
        name, uri = "MLFLOW_TRACKING_URI", os.environ["MLFLOW_TRACKING_URI"]
    if uri is None:
        uri = f"{SQLITE}mlflow.db"
    if MASK in uri:
        uri = _with_secrets(uri)
    wrong = wrong_form(uri)
    if wrong:
        raise UserError(f"{name}={public_address(uri)!r}: {wrong}; give {FORMS}")
    path = sqlite_path(uri)
    return f"{SQLITE}{path}" if path else uri


def _with_secrets(written: str) -> str:
    """The address of which a run's files hold only this much."""
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    if public_address(known) != written:
        raise UserError(
            f"tracking.uri={written!r}: its password is in no file: give the whole address once more, "
            "as tracking.uri=... or in MLFLOW_TRACKING_URI"
        )
    return known


def wrong_form(uri: str) -> str | None:
    """What is wrong with a tracking address, as far as its text says; None if nothing is."""
    if uri in ("databricks", "uc"):
        return None
    match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://(.*)", uri)
    if match is None:
        return "a path is no tracking address" if re.match(r"[./~\w-]+$", uri) else "not a tracking address"
    scheme, rest = match[1], match[2]
    if scheme == "sqlite":
        return None if re.match(r"/[^:?][^?]*$", rest) else "after sqlite: come three slashes and a file, without a ?"
    if scheme in ("http", "https"):
        return _wrong_http(uri)
    if scheme.split("+")[0] in DATABASES:
        return _wrong_database(uri) if rest else "no host"
    return _wrong_scheme(scheme)


def _wrong_scheme(scheme: str) -> str | None:
    known = ("databricks", "uc", *(plugin.name for plugin in entry_points(group="mlflow.tracking_store")))
    if scheme == "file":
        return "MLflow no longer keeps runs in plain files"
    return None if scheme in known else f"no tracking store is known as {scheme}:"


def _wrong_http(uri: str) -> str | None:
    try:
        parts = urlsplit(uri)
        right = bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", uri)
        if "@" in parts.path or parts.query or parts.fragment:  # MLflow puts its own path behind it
            return "it can have no ? or #; write /, ? and # in a password as %2F, %3F and %23"
    except ValueError:  # such as a port that is no number; its message would quote a password
        right = False
    return None if right else "not a host and a port"


def _wrong_database(uri: str) -> str | None:
    """Whether SQLAlchemy understands the address and has a driver for it; nothing is connected."""
    if importlib.util.find_spec("sqlalchemy") is None:
        return None  # then MLflow is not installed either, and tracking is off
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ModuleNotFoundError as err:
        return f"the database's driver is not installed ({err.name})"
    except ArgumentError as err:  # an address that cannot be read, or a driver that is unknown
        return without_secrets(" ".join(str(err).split()), uri)
    return None


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of an SQLite store's file; None for any other store."""
    return Path(uri.removeprefix(SQLITE)).expanduser().resolve() if uri.startswith(SQLITE) else None


def check_writable(uri: str) -> None:
    """Raise `OSError` or `sqlite3.Error` for an SQLite store that cannot be written.

    MLflow itself tries ten times, 100 seconds in all, whatever is wrong: a read-only folder, a folder in the file's
    place, a file that is no database, or one that another process keeps locked.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    probe = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            probe.touch()
    except OSError as err:
        raise OSError(err.errno, err.strerror, str(path)) from None
    try:
        with closing(sqlite3.connect(probe, timeout=LOCKED_S, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("CREATE TABLE bootvit_can_write (x)")  # makes the journal file beside it too
            database.execute("ROLLBACK")
    finally:
        if probe != path:
            probe.unlink(missing_ok=True)


def import_mlflow() -> None:
    """Import MLflow, quiet: for a thread whose other code imports it too, before a second thread does.

    MLflow's modules import each other in circles, so of two threads one may see a module half made. Ray Tune imports
    it when a sweep starts.
    """
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # MLflow sets its level while it is imported
    import mlflow.tracking  # noqa: F401


def connect(uri: str) -> Any:
    """An `MlflowClient`; an SQLite store is created first if it is not there.

    The client is quiet, and a server that is down makes a call fail within seconds instead of minutes. An SQLite file
    is closed after every call: each connection kept open would cache megabytes of it.
    """
    path = sqlite_path(uri)
    for key, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": REQUEST_S,
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **({"MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool"} if path else {}),
    }.items():
        os.environ.setdefault(key, value)
    import_mlflow()
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # for an MLflow that was imported before
        logging.getLogger(name).setLevel(logging.ERROR)
    if path or uri.startswith(DATABASES):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = CONNECTIONS
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
    try:
        MlflowClient(f"{SQLITE}{temporary}").get_experiment("0")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    try:
        os.link(temporary, path)
    except OSError:
        pass  # another process was first; or no hard links here, and then MLflow creates it in place
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def time_to_upload(size: int) -> Iterator[None]:
    """Let a server be silent for as long as an upload of so many bytes may take; other requests stay short.

    MLflow reads the variable at every request, and has no other way to say it.
    """
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    short = os.environ.get(name, REQUEST_S)
    os.environ[name] = str(math.ceil(float(short) + size / UPLOAD_BYTES_PER_S))
    try:
        yield
    finally:
        os.environ[name] = short


def experiment_id(client: Any, uri: str, name: str) -> str:
    """The experiment of that name, created if need be; artifacts of an SQLite store lie beside it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        path = sqlite_path(uri)
        folder = path.parent / "mlruns" / re.sub(r"[^\w-]", "_", name) if path else None
        try:
            place = folder.as_uri() if folder else None
            return str(client.create_experiment(name, artifact_location=place, tags=OPENS_ON_RUNS))
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
