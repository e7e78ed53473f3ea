"""Our ViTs by name in timm, without importing it: that imports torch, for seconds which `--help` need not wait."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTERS = "bootvit.models.registered"


def register_with_timm() -> None:
    """Register now if timm is imported already, else as soon as somebody imports it."""
    if "timm" in sys.modules:
        import_module(REGISTERS)
    else:
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(MetaPathFinder):
    """Finds timm as the other finders do; when it has been executed, our models are registered."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for any other module."""
        if fullname != "timm":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module(REGISTERS)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
