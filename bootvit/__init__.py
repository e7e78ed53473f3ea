"""bootvit: train a vision Transformer from scratch on little data, together with the agent CNN that mirrors it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    from bootvit.models import zoo as _zoo  # noqa: F401  importing it registers our sizes with timm
except KeyboardInterrupt:  # importing torch takes seconds: Ctrl-C meanwhile ends the command line as it does later
    if sys.argv[0] != "-m" and not sys.argv[0].endswith("/bootvit"):
        raise
    print("bootvit: interrupted", file=sys.stderr)
    raise SystemExit(130) from None

if TYPE_CHECKING:
    from ray.tune import ResultGrid

try:
    __version__ = version("bootvit")
except PackageNotFoundError:  # run from a folder, not installed
    __version__ = "0+source"

__all__ = ["__version__", "sweep"]


def sweep(name: str, overrides: Sequence[str] = (), **how: Any) -> ResultGrid:
    """Run a sweep as `bootvit sweep` does, and return Ray Tune's ResultGrid; see `tune.run.driver.sweep`."""
    from tune.run.driver import sweep as run

    return run(name, overrides, **how)
