"""bootvit: train a vision Transformer from scratch on little data, together with the agent CNN that mirrors it."""

from __future__ import annotations

import sys
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
    from bootvit.api import Run, load_config, load_run, sweep, train

try:
    __version__ = version("bootvit")
except PackageNotFoundError:  # run from a folder, not installed
    __version__ = "0+source"

PUBLIC = ("Run", "load_config", "load_run", "sweep", "train")

__all__ = ["Run", "__version__", "load_config", "load_run", "sweep", "train"]


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are asked for: `import bootvit` alone stays quick."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bootvit import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
