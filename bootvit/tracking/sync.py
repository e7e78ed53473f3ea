"""`bootvit track sync`: what a tracking server that was down has not got of a run, sent from its folder."""

from __future__ import annotations

from bootvit.addresses import public_address
from bootvit.config import Config
from bootvit.errors import RunFailed, UserError
from bootvit.heartbeat import check_nobody_writes
from bootvit.result import RunStatus, read_result
from bootvit.runs import RunFolder, known_data
from bootvit.tracking.journal import read_journal
from bootvit.tracking.link import RunLink, Status
from bootvit.tracking.run import MlflowRun
from bootvit.tracking.store import check_tracking, mlflow_available, tracking_uri
from bootvit.tracking.tags import run_tags

ENDS: dict[RunStatus, Status] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


def sync_run(config: Config, folder: RunFolder) -> str:
    """Send what is missing, once, and return the line that says where it is.

    Raises `UserError` for a run that somebody trains now, whose driver sends it, and `RunFailed` where MLflow does not
    take it.
    """
    if not mlflow_available():
        raise UserError("MLflow is not installed: pip install 'bootvit[mlflow]'")
    tracked = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": True})})
    check_tracking(tracked)
    check_nobody_writes(folder.place)
    run = MlflowRun(tracked, folder.path, tags=tags_of(tracked, folder))
    uri = tracking_uri(config.tracking.uri)
    folder.publish("mlflow.json")  # with our key, before MLflow hears of it
    note_untracked_end(run, folder)
    sent = run.sync(now=True)
    folder.publish("mlflow.json")
    if not sent:
        raise RunFailed(f"{folder}: MLflow at {public_address(uri)} has not taken all of it")
    return f"MLflow run {run.run_id} at {public_address(uri)} has all of {folder}"


def note_untracked_end(run: MlflowRun, folder: RunFolder) -> None:
    """The end of a run that was not tracked, which nobody has noted down: it was at its last record."""
    if RunLink.load(folder.path / "mlflow.json").ended is not None or not folder.result.exists():
        return
    result = read_result(folder.result)
    run.note_end(ENDS[result["status"]], result, max((r.time for r in read_journal(folder.journal)[0]), default=None))


def tags_of(config: Config, folder: RunFolder) -> dict[str, str]:
    """Those of a run that MLflow has never heard of; the others have theirs."""
    path = folder.path / "mlflow.json"
    if path.exists() and RunLink.load(path).run_id is not None:
        return {}
    if folder.result.exists():
        result = read_result(folder.result)
        return run_tags(config, data_fingerprint=result["data_fingerprint"], subset_digest=result["subset_digest"])
    facts = known_data(folder)
    return run_tags(config, data_fingerprint=facts.fingerprint if facts else None)
