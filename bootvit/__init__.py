"""bootvit: train a vision Transformer from scratch on little data, together with the agent CNN that mirrors it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bootvit.timm_names import register_with_timm

if TYPE_CHECKING:
    from ray.tune import ResultGrid

register_with_timm()

__all__ = ["__version__", "sweep"]


def sweep(name: str, overrides: Sequence[str] = (), **how: Any) -> ResultGrid:
    """Run a sweep as `bootvit sweep` does, and return Ray Tune's ResultGrid; see `tune.run.driver.sweep`."""
    from tune.run.driver import sweep as run

    return run(name, overrides, **how)


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bootvit")
    except PackageNotFoundError:  # run from a folder, not installed
        return "0+source"
