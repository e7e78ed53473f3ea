"""What every key means: each has a sentence, a type, a default and a reader, and docs/config.md has them all."""

from pathlib import Path

import pytest

from bootvit.__main__ import main
from bootvit.config import Config, all_keys, flatten
from bootvit.config.meanings import ROOT, Key, explain, markdown, run_parts, sweep_parts
from bootvit.errors import UserError
from tune.spec.domain import Domain
from tune.spec.schema import SweepFile

RUN_KEYS = [key for part in run_parts() for key in part.keys]
SWEEP_KEYS = [key for part in sweep_parts() for key in part.keys]


def test_no_key_is_missing() -> None:
    assert sorted(key.name for key in RUN_KEYS) == sorted(all_keys(Config))
    domain = [f"space.KEY.{name}" for name in Domain.model_fields]
    assert sorted(key.name for key in SWEEP_KEYS) == sorted([*all_keys(SweepFile), *domain])


@pytest.mark.parametrize("key", [*RUN_KEYS, *SWEEP_KEYS], ids=lambda key: key.name)
def test_every_key_has_one_sentence_a_type_and_readers_that_are_there(key: Key) -> None:
    assert key.meaning.endswith(".")
    assert len(key.meaning) > 12
    assert not key.meaning.removesuffix(".").count(". ")
    assert key.kind
    assert key.read_by
    for file in key.read_by.split(", "):
        assert (ROOT / file).is_file(), file


def test_defaults_are_those_of_a_config_without_keys() -> None:
    import json

    assert {key.name: json.loads(key.default) for key in RUN_KEYS} == json.loads(json.dumps(flatten(Config())))


def test_the_page_is_current() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "config.md"
    assert page.read_text() == markdown(), "run: bootvit config --explain --markdown > docs/config.md"


def test_one_key_a_section_and_a_key_of_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain", "model.vit.patch"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("model.vit.patch  (in a run's config)\n  Pixels of a patch's side")
    assert "[whole number, at least 1; whole number, at least 1], or null; default: null" in out
    assert "read by bootvit/models/zoo.py" in out
    assert explain("optim.agent").count("optim.agent.") == 5
    assert "budget.gpu_hours  (in a sweep file)" in explain("budget")
    assert "required" in explain("base")
    assert explain("name").count("name  (in a") == 2


@pytest.mark.parametrize(("key", "near"), [("optim.lrr", "'optim.lr'"), ("budget.hour", "'budget.hours'")])
def test_an_unknown_key_is_answered_with_the_nearest(key: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown key '{key}', did you mean {near}"):
        explain(key)
