"""bootvit: train a vision Transformer from scratch on little data, together with the agent CNN that mirrors it."""

from importlib.metadata import PackageNotFoundError, version

from bootvit.models import zoo as _zoo  # noqa: F401  importing it registers our sizes with timm

try:
    __version__ = version("bootvit")
except PackageNotFoundError:  # run from a folder, not installed
    __version__ = "0+source"

__all__ = ["__version__"]
