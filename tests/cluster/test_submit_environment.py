"""`bootvit submit --pip`: everything that bootvit needs, as it is installed here."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from bootvit.errors import UserError
from cluster import environment
from cluster.environment import pins


class Installed:
    """A distribution."""

    def __init__(self, version: str, *requires: str, origin: str | None = None) -> None:
        self.version, self.requires, self._origin = version, list(requires), origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._origin


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Installed]:
    """A place with bootvit, what it needs, and Ray."""
    there = {
        "bootvit": Installed("0+source", "Torch>=2", "num_py[fast]; python_version>'3'", "pytest; extra=='dev'"),
        "torch": Installed("2.14.1+cpu", "sympy", "old; python_version<'3'", "shared"),
        "num-py": Installed("2.4", "quick; extra=='fast'", "torch"),
        **{name: Installed("1") for name in ("sympy", "quick", "old", "pytest", "shared")},
        "ray": Installed("2.60.0", "shared"),
    }

    def find(name: str) -> Installed:
        if name not in there:
            raise environment.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(environment, "distribution", find)
    return there


def test_what_is_needed_is_pinned_directly_or_not(installed: dict[str, Installed]) -> None:
    """By its public version; not what belongs to Ray, to other Pythons, or to extras that nobody asks for."""
    assert pins() == ["num-py==2.4", "quick==1", "sympy==1", "torch==2.14.1"]


def test_what_other_nodes_cannot_get_is_refused(installed: dict[str, Installed]) -> None:
    installed["sympy"] = Installed("1.2", origin='{"url": "file:///home/me/sympy", "dir_info": {"editable": true}}')
    with pytest.raises(UserError, match=r"^--pip: sympy 1\.2 was installed here from a folder or an address"):
        pins()


def test_this_environment() -> None:
    found = pins()
    assert f"torch=={version('torch').split('+')[0]}" in found
    assert f"timm=={version('timm')}" in found
    assert f"mlflow=={version('mlflow')}" in found
    assert not [pin for pin in found if pin.startswith(("bootvit", "ray==", "pytest"))]
    assert len(found) == len({pin.split("==")[0] for pin in found})
