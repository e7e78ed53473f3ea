"""Runs as rows of a report, read from an MLflow experiment."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from bootvit.addresses import public, without_secrets
from bootvit.errors import UserError
from bootvit.report.rows import Points, RunRow, thinned
from bootvit.tracking.store import connect, mlflow_available, sqlite_path

STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "interrupted"}


def collect_mlflow(uri: str, experiment: str) -> list[RunRow]:
    """Every training run of an experiment, trials too; `UserError` where there is no store or no such run."""
    if not mlflow_available():
        raise UserError("MLflow is not installed: pip install 'bootvit[mlflow]', or report from run folders")
    path = sqlite_path(uri)
    if path and not path.exists():
        raise UserError(f"{path}: no MLflow database there; train first, such as: bootvit train digits/joint")
    from mlflow.exceptions import MlflowException

    try:
        client = connect(uri)
        rows = [_row(client, run) for run in _runs(client, uri, experiment)]
    except MlflowException as err:
        raise UserError(f"MLflow at {public(uri)}: {without_secrets(str(err), uri).splitlines()[0][:200]}") from err
    if not rows:
        raise UserError(f"experiment {experiment!r} at {public(uri)}: no runs of bootvit there; train first")
    return rows


def _runs(client: Any, uri: str, experiment: str) -> Iterator[Any]:
    found = client.get_experiment_by_name(experiment)
    if found is None:
        known = [each.name for each in client.search_experiments()]
        near = get_close_matches(experiment, known, n=1) or known
        raise UserError(f"{public(uri)}: no experiment {experiment!r}; there is {near[0]!r}")
    token = None
    while True:
        page = client.search_runs([found.experiment_id], "tags.`bootvit.kind` != 'sweep'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _row(client: Any, run: Any) -> RunRow:
    tags, metrics = run.data.tags, run.data.metrics
    final = _by_network(metrics, "final")
    held_out = _by_network(metrics, "final/held_out")
    tested = any(name.startswith("test/") for name in metrics)
    status = STATUS.get(run.info.status, "unfinished")
    return RunRow(
        name=tags.get("mlflow.runName", run.info.run_name),
        place=run.info.run_id,
        method=tags["bootvit.method"],
        status=status,
        data=tags["bootvit.data"],
        fraction=float(tags["bootvit.fraction"]),
        seed=int(tags["bootvit.seed"]),
        config=run.data.params,
        held_out=held_out,
        test=final if tested or final != held_out else {},
        curves=_curves(client, run),
        epochs=int(metrics.get("final/epochs", metrics.get("epoch", 0))),
        seconds=metrics.get("final/seconds"),
        gpu_seconds=metrics.get("final/gpu_seconds"),
        fingerprint=tags.get("bootvit.data_fingerprint", ""),
        commit=tags.get("bootvit.git", ""),
        ended=run.info.end_time and run.info.end_time / 1000,
    )


def _by_network(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    names = {network: f"{prefix}/{network}/top1" for network in ("vit", "agent")}
    return {network: _value(metrics[name]) for network, name in names.items() if name in metrics}


def _curves(client: Any, run: Any) -> dict[str, Points]:
    """The epoch of a point is the metric `epoch` at its step: MLflow's points have steps only."""
    shown = [
        name
        for name in run.data.metrics
        if name.startswith(("test/", "held_out/", "train/")) and name.endswith(("/top1", "/loss", "/lr"))
    ]
    if not shown:
        return {}
    epochs = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "epoch")}
    steps_per_epoch = next((step / epoch for step, epoch in epochs.items() if epoch > 0), 0.0)
    found: dict[str, Points] = {}
    for name in shown:
        history = client.get_metric_history(run.info.run_id, name)
        points = sorted((point.step, _value(point.value)) for point in history)
        if name.startswith("train/"):
            found[name] = thinned([(step / steps_per_epoch, value) for step, value in points if steps_per_epoch])
        else:
            found[name] = tuple((epochs[step], value) for step, value in points if step in epochs)
    return found


def _value(stored: float) -> float:
    """MLflow's stores turn an infinity into the largest number there is."""
    return float("inf") if stored >= 1.7e308 else float("-inf") if stored <= -1.7e308 else float(stored)
