"""Reading the reference's YAML files, strictly: every key is read by somebody, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bootvit.config import parse_yaml
from bootvit.errors import UserError

_MISSING = object()


class Node:
    """A mapping that knows its place and which of its keys nobody has read yet."""

    def __init__(self, data: Any, place: str) -> None:
        if not isinstance(data, dict):
            raise UserError(f"{place}: expected keys and values, not {data!r}")
        self._unread = dict(data)
        self.place = place

    def where(self, key: str) -> str:
        """`file: section.key`, for messages."""
        return f"{self.place}{'' if self.place.endswith(' ') else '.'}{key}"

    def has(self, key: str) -> bool:
        """Whether the key is given and unread."""
        return key in self._unread

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value of a key, which counts as read; `UserError` where it is missing and has no default."""
        if key not in self._unread and default is _MISSING:
            raise UserError(f"{self.where(key)} is missing")
        return self._unread.pop(key, default)

    def peek(self, key: str) -> Any:
        """The value of a key, which does not count as read; None where it is missing."""
        return self._unread.get(key)

    def only(self, key: str, supported: Sequence[Any], default: Any = _MISSING) -> Any:
        """As `take`, for a key of which we support some values; its default need not be one of them."""
        value = self.take(key, default)
        if value not in supported:
            known = " or ".join(repr(one) for one in supported)
            raise UserError(f"{self.where(key)}={value!r} is not supported, only {known}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """As `take`, for a number; null counts as not given."""
        value = self.take(key, default)
        value = default if value is None and default is not _MISSING else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where(key)}={value!r}: expected a number")
        return value

    def whole(self, key: str, default: Any = _MISSING) -> int:
        """As `take`, for an integer."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{self.where(key)}={value!r}: expected an integer")
        return value

    def listing(self, key: str, kind: type, default: Any = _MISSING) -> list[Any]:
        """As `take`, for a list of strings or integers."""
        value = self.take(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(item, kind) for item in value):
            raise UserError(f"{self.where(key)}={value!r}: expected a list of {kind.__name__}")
        return list(value)

    def size(self, key: str, default: Any = _MISSING) -> list[int]:
        """A side or [rows, columns], as [rows, columns]."""
        value = self.take(key, default)
        pair = [value, value] if isinstance(value, int) else value
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(side, int) for side in pair):
            raise UserError(f"{self.where(key)}={value!r}: expected a number of pixels, or [rows, columns]")
        return list(pair)

    def section(self, key: str, default: Any = _MISSING) -> Node:
        """A mapping below this one."""
        return Node(self.take(key, default), self.where(key))

    def drop(self, *keys: str) -> None:
        """Read keys that change no result."""
        for key in keys:
            self._unread.pop(key, None)

    def done(self) -> None:
        """Refuse what nobody has read."""
        for key in self._unread:
            raise UserError(f"{self.where(key)} is not supported")


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file of the reference with the files that its `cfg_path` keys name in-line, under `sub_configs`.

    `cfg_path` is relative to the folder from which the reference was started: it is looked for upwards from the file.
    """
    settings = _read(path)
    networks = Node(settings, f"{path}: ").section("mutual", {}).take("cfg", {})
    given = networks.values() if isinstance(networks, dict) else ()
    named = [str(one["cfg_path"]) for one in given if isinstance(one, dict) and "cfg_path" in one]
    inline = settings.get("sub_configs", {})
    return settings | {"sub_configs": {name: inline.get(name) or _read(_upwards(path, name)) for name in named}}


def _upwards(path: Path, name: str) -> Path:
    for folder in path.resolve().parents:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{path}: cfg_path {name!r} is in none of the folders above it")


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"{path}: cannot be read: {err}") from err
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected keys and values, not {type(settings).__name__}")
    return settings
