"""Tune's callbacks that a sweep file names."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from bootvit.errors import UserError
from tune.spec.schema import Sweep


def make_callbacks(sweep: Sweep, given: Sequence[Any]) -> list[Any]:
    """An object of each class that the file names, and those that are given; `UserError` for what is no callback."""
    from ray.tune import Callback
    from ray.tune.logger import JsonLoggerCallback

    named = [make(f"{sweep.path}: callbacks: {name}", name) for name in sweep.file.callbacks]
    for callback in [*named, *given]:
        if not isinstance(callback, Callback):
            raise UserError(f"{sweep.path}: callbacks: {type(callback).__name__} is no ray.tune.Callback")
        if isinstance(callback, JsonLoggerCallback):
            raise UserError(
                f"{sweep.path}: callbacks: JsonLoggerCallback would write over the runs' own result.json: "
                "read that, or sweep.json"
            )
    return [*named, *given]


def make(where: str, name: str) -> Any:
    """An object of `module:Class`."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except ModuleNotFoundError as err:
        raise UserError(f"{where}: {err}") from err
    except AttributeError as err:
        raise UserError(f"{where}: {module} has no {attribute}") from err
    except Exception as err:
        lines = str(err).strip().splitlines()
        raise UserError(f"{where}: {type(err).__name__}: {lines[0] if lines else ''}") from err
