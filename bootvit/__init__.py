"""bootvit: train a vision Transformer from scratch on little data, together with the agent CNN that mirrors it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bootvit.timm_names import register_with_timm

if TYPE_CHECKING:
    from bootvit.api import Run, load_config, load_run, sweep, train

    __version__: str

register_with_timm()

PUBLIC = ("Run", "load_config", "load_run", "sweep", "train")

__all__ = ["Run", "__version__", "load_config", "load_run", "sweep", "train"]


def __getattr__(name: str) -> Any:
    """The public functions and the version, looked up when they are asked for: `import bootvit` alone stays quick."""
    if name == "__version__":
        return _version()
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bootvit import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bootvit")
    except PackageNotFoundError:  # run from a folder, not installed
        return "0+source"
