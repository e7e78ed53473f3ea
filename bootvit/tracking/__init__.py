"""What a run measured: first a journal on disk, then MLflow.

`journal` has no dependencies and is all that the training loop knows. `MlflowRun` follows one run directory
from the driver and ships what a checkpoint already covers, so that a redo after a crash never yields a second
point; `SweepRun` is the parent of a sweep's trials. MLflow is optional and imported only when one is made.
"""

from bootvit.tracking.journal import Journal, Record, read_journal
from bootvit.tracking.run import MlflowRun, follow
from bootvit.tracking.store import mlflow_available, tracking_uri
from bootvit.tracking.sweep import SweepRun
from bootvit.tracking.tags import run_tags, source_version

__all__ = [
    "Journal",
    "MlflowRun",
    "Record",
    "SweepRun",
    "follow",
    "mlflow_available",
    "read_journal",
    "run_tags",
    "source_version",
    "tracking_uri",
]
