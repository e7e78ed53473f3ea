"""What users bring along: modules that a config `imports`, and things in them, named MODULE:NAME.

A module registers models with timm when it is imported; data sets and callbacks are named by keys of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from bootvit.errors import UserError


def import_all(imports: Sequence[str]) -> None:
    """Import the modules that `imports` lists, each a file or a name; `UserError` for one that fails or is not there.

    A file is looked for where it was when the config was read, and then, on a node that does not see it, by its name.
    """
    for given in imports:
        name = module_name(given)
        if name in sys.modules:
            continue
        try:
            if given.endswith(".py") and Path(given).is_file():
                _from_file(name, Path(given))
            else:
                import_module(name)
        except Exception as err:  # whatever the user's code raises
            if isinstance(err, ModuleNotFoundError) and err.name == name:
                raise UserError(f"imports: {given}: no such module: give a file's path, or install it") from None
            raise UserError(f"imports: {given}: {type(err).__name__}: {' '.join(str(err).split())[:300]}") from err


def module_name(given: str) -> str:
    """The name under which it is imported: `flowers` of `/home/me/flowers.py`."""
    return Path(given).stem if given.endswith(".py") else given


def _from_file(name: str, path: Path) -> None:
    """Import it under its own name, so that its classes can be pickled, and found again by a worker."""
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def named(key: str, given: str) -> Callable[..., Any]:
    """What MODULE:NAME stands for, once the modules are imported; `UserError` for what is not there or not callable."""
    module, colon, name = given.partition(":")
    if not colon:
        raise UserError(f"{key}={given}: expected MODULE:NAME, of a module that `imports` lists")
    if module not in sys.modules:
        raise UserError(f"{key}={given}: `imports` does not list {module!r}")
    found = getattr(sys.modules[module], name, None)
    if not callable(found):
        what = "has no such name" if found is None else "it cannot be called"
        raise UserError(f"{key}={given}: {what}")
    return found  # type: ignore[no-any-return]


def beside(given: str, folder: Path) -> str:
    """A module that lies in a folder as its absolute path; any other name as it is."""
    path = folder / (given if given.endswith(".py") else f"{given}.py")
    return str(path.resolve()) if path.is_file() else given
