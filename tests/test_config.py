"""The schema: files, `extends`, overrides, and the one line that a mistake gets."""

from pathlib import Path

import pytest
import yaml
from helpers import write

from bootvit.config import SHIPPED, all_keys, dump_config, flatten, load_config
from bootvit.config import Config as Schema
from bootvit.errors import UserError


def test_files_extend_one_another_and_later_ones_win(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "seed: 1\ndata: {source: fake, batch_size: 8}")
    write(tmp_path / "b.yaml", "data: {batch_size: 16}")
    top = write(tmp_path / "sub" / "c.yaml", "extends: [../a.yaml, ../b.yaml]\nmethod: vit")
    config = load_config(str(top), ["optim.lr=1e-2"])
    assert (config.seed, config.data.source, config.data.batch_size) == (1, "fake", 16)
    assert (config.method, config.optim.lr) == ("vit", 0.01)


def test_a_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    config = load_config(str(write(tmp_path / "a.yaml", "optim: {lr: 5e-4}")))
    assert config.optim.lr == 5e-4


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.yaml")), ids=lambda p: str(p.relative_to(SHIPPED)))
def test_printed_config_is_the_same_run(path: Path, tmp_path: Path) -> None:
    if path.parent.name == "sweeps":
        path = (path.parent / yaml.safe_load(path.read_text())["base"]).resolve()
    config = load_config(str(path), ["data.fraction=0.25"])
    assert load_config(str(write(tmp_path / "again.yaml", dump_config(config)))) == config


def test_places_are_resolved_where_the_command_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("digits/joint", ["data.root=images"])
    assert config.data.root == str(tmp_path / "images")
    assert config.ray.storage_path == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("data: {fractoin: 0.1}", [], "unknown key 'data.fractoin', did you mean 'data.fraction'"),
        ("fraction: 0.1", [], "unknown key 'fraction', did you mean 'data.fraction'"),
        ("data: {fraction: 0}", [], "data.fraction=0"),
        ("data: {fraction: 1.5}", [], "data.fraction=1.5"),
        ("seed: one", [], 'seed="one"'),
        ("compile: 1", [], "compile=1"),
        ("method: both", [], 'method="both"'),
        ("name: ../x", [], 'name="../x"'),
        ("data: [1]", [], "data=[1]"),
        ("- 1", [], "a config is a mapping"),
        ("seed: 1\nseed: 2", [], "'seed' is given twice"),
        ("a: [", [], "not valid YAML"),
        ("extends: nowhere.yaml", [], "extends 'nowhere.yaml'"),
        ("extends: x.yaml", [], "extends itself"),
        ("", ["optim.lr"], "expected KEY=VALUE"),
        ("", ["optim.lr=-1"], "override 'optim.lr=-1'"),
        ("", ["optim.lr=.nan"], "optim.lr"),
        ("", ["data.batch_size=2", "ray.num_workers=3"], "smaller than ray.num_workers=3"),
        ("", ["model.vit.patch=5"], "does not divide data.image_size=224x224"),
        ("", ["model.vit.heads=5"], "does not divide the width of 288"),
        ("", ["model.vit.heads=4", "method=shared"], "taps=row_major cannot place 4 heads"),
        ("", ["model.vit.name=resnet50"], "not a plain timm VisionTransformer"),
        ("", ["model.vit.name=vit_tinny_patch16_224"], "is not a model of timm"),
        ("", ["model.agent.name=resnet999"], "expected agent_small, agent_base or a CNN of timm"),
        ("", ["model.agent.name=resnet50"], "has no blocks that mirror"),
        ("", ["model.agent.downsample=[9]"], "there is no block 9"),
    ],
)
def test_a_mistake_is_one_line(text: str, overrides: list[str], expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", text)
    with pytest.raises(UserError) as caught:
        load_config(str(path), overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "x.yaml" in str(caught.value) or "override" in str(caught.value)


def test_an_unknown_name_suggests_the_nearest_shipped_config() -> None:
    with pytest.raises(UserError, match="'digits/joint'"):
        load_config("digits/jiont")


def test_every_key_has_a_flat_name() -> None:
    assert set(flatten(load_config("digits/joint"))) == set(all_keys(Schema))
