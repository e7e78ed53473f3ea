"""bootvit: train a vision Transformer from scratch on little data, together with the agent CNN that mirrors it."""

import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from bootvit.models import zoo as _zoo  # noqa: F401  importing it registers our sizes with timm
except KeyboardInterrupt:  # importing torch takes seconds: Ctrl-C meanwhile ends the command line as it does later
    if sys.argv[0] != "-m" and not sys.argv[0].endswith("/bootvit"):
        raise
    print("bootvit: interrupted", file=sys.stderr)
    raise SystemExit(130) from None

try:
    __version__ = version("bootvit")
except PackageNotFoundError:  # run from a folder, not installed
    __version__ = "0+source"

__all__ = ["__version__"]
