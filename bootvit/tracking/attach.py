"""Files that come after a run has ended, such as reports: artifacts of its MLflow run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bootvit.addresses import public_address, without_secrets
from bootvit.tracking.link import RunLink
from bootvit.tracking.store import connect, mlflow_available, time_to_upload, tracking_uri


def attach(run_dir: Path, files: Sequence[Path], under: str) -> None:
    """Attach files to a run or to a sweep's parent, whether or not it still runs; a warning if MLflow fails."""
    path = run_dir / "mlflow.json"
    if not path.exists() or not mlflow_available():
        return
    link = RunLink.load(path)
    uri = link.uri
    try:
        uri = tracking_uri(link.uri or None)  # with what a password has been left out of it
        client = connect(uri)
        for file in files if link.run_id else ():
            with time_to_upload(file.stat().st_size):
                client.log_artifact(link.run_id, str(file), under)
    except Exception as err:  # they are on disk: MLflow's absence does not spoil them
        reason = without_secrets(" ".join(str(err).split()), uri)[:200]
        print(f"bootvit: warning: {under} is not in MLflow at {public_address(uri)}: {reason}", file=sys.stderr)
