"""Every case of the parity kit in BOOTVIT_PARITY_DIR (default: the small subset beside this file), in float64."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from parity_kit import Case, ParityError, names_of, read_case
from parity_networks import run_mutual, run_single
from parity_pieces import run_failure, run_fraction, run_misc, run_units
from parity_shipped import run_init_stats, run_sizes
from parity_trajectory import run_trajectory

FOLDER = Path(os.environ.get("BOOTVIT_PARITY_DIR") or Path(__file__).parent / "cases")
KINDS: dict[str, Callable[[Case], None]] = {
    "single": run_single,
    "mutual": run_mutual,
    "trajectory": run_trajectory,
    "units": run_units,
    "fraction": run_fraction,
    "misc": run_misc,
    "failure": run_failure,
    "model_sizes": run_sizes,
    "init_stats": run_init_stats,
}


def run_case(case: Case) -> None:
    """Compare everything that a case has recorded."""
    kind = case.facts.get("case", case.name)  # two files about the shipped sizes are not cases
    if kind not in KINDS:
        raise ParityError(f"{case.name}: a case of the unknown kind {kind!r}")
    KINDS[kind](case)
    case.done()


def test_the_folder_has_cases() -> None:
    assert names_of(FOLDER), f"no cases in {FOLDER}"


@pytest.mark.parametrize("name", names_of(FOLDER))
def test_case(name: str, record_property: Callable[[str, object], None]) -> None:
    case = read_case(FOLDER, name)
    run_case(case)
    record_property("parity", f"{name}: {case.worst:.1e}" + (f" ({case.where})" if case.where else ""))
