"""The schema: files, `extends`, overrides, and the one line that a mistake gets."""

import re
from pathlib import Path

import pytest
import yaml
from helpers import write

from bootvit.config import SHIPPED, all_keys, dump_config, flatten, layers, parse_override
from bootvit.config import Config as Schema
from bootvit.errors import UserError
from bootvit.load import load_config


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
        (
            "extends: digits/jiont",
            [],
            "nor a shipped config of that name exists; the nearest shipped one is 'digits/joint'",
        ),
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


def test_a_file_extends_a_shipped_config_by_its_name_unless_a_file_beside_it_has_that_name(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "extends: digits/shared\nseed: 3")
    config = load_config(str(mine))
    assert (config.seed, config.method, config.data.source) == (3, "shared", "digits")
    assert [(layer.path.name, layer.shipped) for layer in layers(mine)] == [
        ("digits.yaml", True),
        ("shared.yaml", True),
        ("mine.yaml", False),
    ]
    write(tmp_path / "digits" / "shared", "method: vit")
    assert load_config(str(mine)).method == "vit"


def test_an_unknown_name_suggests_the_nearest_shipped_config() -> None:
    with pytest.raises(UserError, match="'digits/joint'"):
        load_config("digits/jiont")


def test_every_key_has_a_flat_name() -> None:
    assert set(flatten(load_config("digits/joint"))) == set(all_keys(Schema))


# ---------------------------------------------------------------------------------------- values as they are typed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name=2024-11-25", "2024-11-25"),
        ("name=1e3", "1e3"),
        ("name=007", "007"),
        ("name=on", "on"),
        ("name=12:30", "12:30"),
        ("data.root=set #2", "set #2"),
        ("data.root=#2", "#2"),
        ("data.root=a: b", "a: b"),
        ("data.root=[x]", "[x]"),
        ('data.root="quoted"', '"quoted"'),
        ("data.root= blank ", " blank "),
        ("data.root=null", None),
        ("model.vit.weights=null", None),
        ("method=vit", "vit"),
        ("optim.agent.name=null", None),
        ("optim.lr=1e-3", 1e-3),
        ("seed=007", 7),
        ("seed=12:30", "12:30"),
        ("optim.lr=0.1 # fast", "0.1 # fast"),
        ("data.image_size=[8, 16]", [8, 16]),
        ("optim.agent.clip_norm=none", "none"),
        ("data={source: digits}", {"source": "digits"}),
        ("tracking.uri=http://h:1/#x", "http://h:1/#x"),
    ],
)
def test_a_texts_value_is_taken_as_typed_and_others_are_yaml(text: str, value: object) -> None:
    assert parse_override(text) == (text.partition("=")[0], value)


def test_the_folder_that_was_typed_is_the_one_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("digits/joint", ["data.root=set #2"]).data.root == str(tmp_path / "set #2")
    assert load_config("digits/joint", ["data.root=~/x"]).data.root == str(Path.home() / "x")
    assert load_config("digits/joint", ["name=2024-11-25"]).name == "2024-11-25"


def test_a_date_in_a_file_is_the_text_that_stands_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", "name: 2024-11-25\ndata: {root: 2024-11-25 12:00:00}")
    config = load_config(str(path))
    assert config.name == "2024-11-25"
    assert config.data.root is not None
    assert Path(config.data.root).name == "2024-11-25 12:00:00"


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: 123", "name=123"),
        ("name: yes", "name=true"),
        ("seed: 12:30", 'seed="12:30"'),
        ("seed: 2024-11-25", 'seed="2024-11-25"'),
        ("seed: 1e400", "seed=Infinity"),
        (f"seed: {'9' * 400}", "seed=9999"),
        (f"seed: {'9' * 5000}", "not valid YAML"),
        ("optim: {lr: .inf}", "optim.lr=Infinity"),
        ("data: {root: !!set {a, b}}", "data.root: YAML's type 'set' is no value of a config"),
        ("name: !!binary aGk=", "name: YAML's type 'bytes' is no value of a config"),
        ("seed: !!python/object:os.system x", "not valid YAML"),
        ("1: x", "1: a key is a text"),
        ("null: x", "None: a key is a text"),
        ("data: {true: x}", "data.True: a key is a text"),
        ("? [a, b]\n: x", "not valid YAML"),
        (LAUGHS, "more than 100000 values"),
        ("a: &a [*a]", "not valid YAML"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("extends: 3", "extends=3: expected a file's name"),
        ("extends: [1]", "extends=[1]: expected a file's name"),
        (f"extends: {'a' * 5000}", "neither the file"),
        ("seed: 1\n---\nseed: 2", "not valid YAML"),
        (f"name: {'a' * 5000}", "..."),
        ("a: \x00", "not valid YAML"),
        ("data: {root: 's3://bucket/x'}", "data.root=s3://bucket/x: data.source=digits needs a folder"),
        ("ray: {storage_path: 'gs:/x'}", "ray.storage_path=gs:/x: not an address of an object store"),
        ('data: {root: "a\\0b"}', "hold no NUL"),
    ],
    ids=range(27),
)
def test_what_yaml_allows_and_a_config_does_not_is_one_short_line(text: str, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", text)
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    assert "x.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ray.storage_path=http://bucket/x", "not an address of an object store"),
        ("data.root=s3://bucket/x", "data.source=digits needs a folder"),
    ],
)
def test_an_address_on_the_command_line_names_its_override(given: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"override '{given}': {given}: .*{words}"):
        load_config("digits/joint", [given])


def test_an_empty_text_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"data\.root is empty; null is none"):
        parse_override("data.root=")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_config(str(path)).seed == 3


@pytest.mark.parametrize("data", [b"name: \xff\xfe", b"seed: 1\xe9"])
def test_a_file_that_is_not_utf_8_is_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.yaml: cannot be read"):
        load_config(str(path))


@pytest.mark.parametrize(
    "file", sorted((SHIPPED.parent / "bootvit" / "config").glob("*.py")), ids=lambda file: file.stem
)
def test_the_schema_and_its_files_know_nothing_of_models_or_data(file: Path) -> None:
    found = re.findall(r"^\s*(?:from|import) (bootvit[\w.]*|torch|timm)", file.read_text(), re.MULTILINE)
    assert {
        name
        for name in found
        if not name.startswith(("bootvit.config", "bootvit.errors", "bootvit.addresses", "bootvit.extensions"))
    } == set()
