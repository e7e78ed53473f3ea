"""Tables and plots from runs, read from their folders or from MLflow, and from sweeps.

`rows` and `from_mlflow` read, `tables` averages, `plots` draws, `page` writes Markdown and HTML; `sweep` does the same
for a sweep. matplotlib and scikit-learn are imported only where something is drawn or fitted.
"""

from bootvit.report.command import command
from bootvit.report.from_mlflow import collect_mlflow
from bootvit.report.rows import RunRow, collect_folders
from bootvit.report.sweep import print_sweep, sweep_json, write_sweep_report
from bootvit.report.tables import tables
from bootvit.report.write import print_table, report_json, write_report

__all__ = [
    "RunRow",
    "collect_folders",
    "collect_mlflow",
    "command",
    "print_sweep",
    "print_table",
    "report_json",
    "sweep_json",
    "tables",
    "write_report",
    "write_sweep_report",
]
