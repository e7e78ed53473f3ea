"""What a newcomer types first: every help has an example that parses, and points on; what is shipped is listed."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from bootvit import __version__
from bootvit.__main__ import main
from bootvit.cli import app
from bootvit.config import SHIPPED, shipped_configs


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and group."""
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


ALL = list(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("words", ALL, ids=lambda words: " ".join(words) or "bootvit")
def test_every_help_has_an_example_and_points_on(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "-h"]) == 0
    text = capsys.readouterr().out
    example = text.partition("Example: ")[2].partition("Next: ")
    assert example[2].strip()
    given = shlex.split(example[0].partition(";")[0])
    assert tuple(given[: len(words) + 1]) == ("bootvit", *words)


@pytest.mark.parametrize("words", [[], ["data"], ["track"]])
def test_a_group_alone_shows_its_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    seen = capsys.readouterr()
    assert "Commands" in seen.out
    assert seen.err == ""


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bootvit {__version__}\n"


def test_a_config_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 2
    assert "name a config, or a key with --explain" in capsys.readouterr().err


def test_the_shell_completes_commands_and_shipped_configs() -> None:
    def completed(words: str) -> list[str]:
        env = os.environ | {
            "_BOOTVIT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        done = subprocess.run([sys.executable, "-m", "bootvit"], env=env, capture_output=True, text=True, check=False)
        return done.stdout.split()

    assert completed("bootvit tra") == ["train", "track"]
    assert completed("bootvit train digits/") == [f"digits/{method}" for method in ("agent", "joint", "shared", "vit")]


@pytest.mark.parametrize("one", shipped_configs(), ids=lambda one: one.name)
def test_every_shipped_file_begins_with_a_line_on_what_it_is(one: Any) -> None:
    text = (SHIPPED / f"{one.name}.yaml").read_text()
    assert text.startswith("# ")
    assert 15 < len(one.about) <= 100


def test_what_is_shipped_is_listed_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(SHIPPED.rglob("*.yaml")))
    assert [line.split()[:2] for line in lines if "digits-fractions" in line] == [["sweep", "sweeps/digits-fractions"]]
    assert main(["configs", "shared", "digits", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["digits/shared"]
