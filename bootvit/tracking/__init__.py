"""What a run measured: first a journal on disk, then MLflow.

`journal` has no dependencies and is all that the training loop knows. `MlflowRun` follows one run directory
from the driver and ships what a checkpoint already covers, so that a redo after a crash never yields a second
point, in the thread of a `Follower`; `SweepRun` is the parent of a sweep's trials. MLflow is optional and imported
only when it is asked for the first time.
"""

from bootvit.tracking.follow import Follower
from bootvit.tracking.journal import Journal, Record, read_journal
from bootvit.tracking.run import MlflowRun
from bootvit.tracking.store import check_tracking, mlflow_available, tracking_uri
from bootvit.tracking.sweep import SweepRun
from bootvit.tracking.tags import run_tags, source_version

__all__ = [
    "Follower",
    "Journal",
    "MlflowRun",
    "Record",
    "SweepRun",
    "check_tracking",
    "mlflow_available",
    "read_journal",
    "run_tags",
    "source_version",
    "tracking_uri",
]
