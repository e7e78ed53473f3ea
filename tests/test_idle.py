"""Keys that do nothing in a run are named in one line, and only those."""

import json
from pathlib import Path

import pytest
from helpers import TINY, write

from bootvit.__main__ import main
from bootvit.config import SHIPPED, all_keys, dump_config
from bootvit.config import Config as Schema
from bootvit.idle import RULES, idle_keys
from bootvit.load import load_config, make_config

RUNS = sorted(p for p in SHIPPED.rglob("*.yaml") if not {"presets", "sweeps"} & set(p.parts))
FROM_SCRATCH = ["model.vit.weights=null", "model.agent.weights=null"]  # there is no hub in a test
WAYS = {
    "digits": ("none", True),
    "cifar10": ("crop", True),
    "cifar100": ("crop", True),
    "imagenet": ("area", False),
    "imagefolder": ("area", False),
}


def idle(config: str, *overrides: str, augment: str = "crop", in_memory: bool = True, local: bool = False) -> list[str]:
    found = idle_keys(load_config(config, overrides), augment=augment, in_memory=in_memory, local=local)
    assert all(" (" in line and line.endswith(")") for line in found)
    return [line.partition(" (")[0] for line in found]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(SHIPPED)))
def test_a_shipped_config_sets_nothing_in_vain(path: Path) -> None:
    config = load_config(str(path), FROM_SCRATCH)
    augment, in_memory = WAYS[config.data.source]
    assert idle_keys(config, augment=augment, in_memory=in_memory, local=False) == []


CASES = [  # config, overrides, the keys of which the first is idle, and an override that makes it count
    ("digits/vit", "model.agent.stem_width=32", ["method=joint", "model.agent.stem=resnet"]),
    ("digits/vit", "objective.agent.ce=2", ["method=joint"]),
    ("digits/vit", "objective.vit.hint=3", ["method=joint"]),
    ("digits/vit", "objective.temperature=3", ["method=joint"]),
    ("digits/agent", "model.vit.dropout=0.2", ["method=joint"]),
    ("digits/agent", "objective.vit.ce=2", ["method=joint"]),
    ("cifar10/resnet50", "model.vit.depth=3", ["model.agent.name=agent_small", "method=joint"]),
    ("cifar10/resnet50", "model.agent.dropout=0.2", ["model.agent.name=agent_small"]),
    ("digits/joint", "model.agent.value_bias=false", ["method=shared"]),
    ("digits/shared", "model.agent.mlp_width=7", ["method=joint"]),
    ("digits/joint", "model.agent.taps=centred", ["model.agent.name=agent_base"]),
    ("digits/joint", "model.agent.stem_width=32", ["model.agent.stem=resnet", "objective.vit.hint=0"]),
    ("digits/joint", "data.root=/x", ["data.source=imagefolder"]),
    ("digits/joint", "data.fraction_rule=reference", ["data.fraction=0.5"]),
    ("digits/joint", "objective.hint_norm=false", None),
    ("digits/joint", "objective.hint_decay=none", None),
    ("digits/joint", "objective.agent.decayed=[ce]", None),
    ("digits/joint", "optim.momentum=0.9", ["optim.name=sgd"]),
    ("digits/joint", "optim.momentum=0.9", ["optim.agent.name=sgd"]),
    ("digits/shared", "optim.agent.lr=0.1", ["method=joint"]),
    ("digits/joint", "schedule.agent.period=3", None),
    ("digits/shared", "schedule.agent.period=3", ["method=joint"]),
    ("digits/joint", "optim.agent.momentum=0.9", ["optim.agent.name=sgd"]),
    ("digits/joint", "optim.clip_scope=vit", ["method=shared"]),
    ("digits/joint", "optim.sam_clip=false", ["optim.sam_rho=0.1"]),
    ("digits/joint", "schedule.period=3", None),
]


@pytest.mark.parametrize(("config", "given", "cure"), CASES, ids=lambda value: str(value))
def test_a_key_is_named_where_it_is_idle_and_only_there(config: str, given: str, cure: list[str] | None) -> None:
    key = given.partition("=")[0]
    if cure is None:
        assert idle(config, given) == []
    else:
        assert idle(config, given) == [key]
        assert key not in idle(config, given, *cure)


@pytest.mark.parametrize(
    ("given", "without"),
    [
        ("objective.temperature=3", ["objective.vit.kd=0", "objective.agent.kd=0"]),
        ("objective.hint_pool=raster", ["objective.vit.hint=0"]),
        ("objective.hint_decay=none", ["objective.vit.hint=0"]),
        ("objective.vit.decayed=[ce]", ["objective.hint_decay=none"]),
        ("optim.clip_when=first_step", ["optim.clip_norm=null"]),
        ("schedule.warmup_mode=constant", ["schedule.warmup_epochs=0"]),
        ("schedule.period=3", ["schedule.kind=constant"]),
        ("tracking.uri=sqlite:///x.db", ["tracking.enabled=false"]),
    ],
)
def test_a_key_is_idle_without_what_it_refers_to(given: str, without: list[str]) -> None:
    key = given.partition("=")[0]
    assert idle("digits/joint", given) == []
    assert key in idle("digits/joint", given, *without)


def test_clipping_of_one_network_is_clipping() -> None:
    given = ["optim.clip_norm=null", "optim.clip_when=first_step"]
    assert "optim.clip_when" in idle("digits/joint", *given)
    assert idle("digits/joint", *given, "optim.agent.clip_norm=1.0") == []


def test_what_the_data_and_the_command_line_decide() -> None:
    given = ["data.crop_padding=2", "data.flip=false", "data.workers=8", "data.resize=pil", "ray.max_failures=2"]
    assert idle("digits/joint", *given) == ["data.workers"]
    assert idle("digits/joint", *given, augment="area", in_memory=False) == ["data.crop_padding", "data.resize"]
    assert idle("digits/joint", *given, augment="none") == ["data.crop_padding", "data.flip", "data.workers"]
    assert idle("digits/joint", *given, local=True) == ["data.workers", "ray.max_failures"]
    assert idle("digits/joint", "data.dct_scaling=true") == ["data.dct_scaling"]
    assert idle("digits/joint", "data.dct_scaling=true", augment="area", in_memory=False) == []


def test_the_reference_as_a_whole_is_one_choice(tmp_path: Path) -> None:
    text = f"extends: [{SHIPPED}/digits/vit.yaml, {SHIPPED}/presets/reference.yaml]"
    path = str(write(tmp_path / "r.yaml", text))
    assert idle(path) == []
    assert "model.agent.value_bias" in idle(path, "schedule.per=step")


def test_rules_name_keys_of_the_schema() -> None:
    keys = all_keys(Schema)
    for prefixes, _, why in RULES:
        assert why
        for prefix in prefixes.split():
            assert any(key.startswith(prefix) if prefix.endswith(".") else key == prefix for key in keys), prefix


def test_training_says_it_once_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    command = ["train", "tiny.yaml", "--local", "schedule.epochs=1"]
    assert main([*command, "data.crop_padding=2", "optim.momentum=0.9"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == [
        "bootvit: warning: these keys do nothing in this run: data.crop_padding (augment is not crop), "
        "optim.momentum (adamw has none)"
    ]
    assert json.loads((tmp_path / "runs" / "tiny" / "result.json").read_text())["status"] == "finished"
    assert main([*command, "--overwrite"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*command, "data.crop_padding=2"]) == 2  # the name is taken: an error is one line
    assert len(capsys.readouterr().err.splitlines()) == 1
