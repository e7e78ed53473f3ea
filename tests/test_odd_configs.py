"""Values as people type them, and odd files: taken as they look, or refused in one line that names the key."""

import os
from pathlib import Path
from typing import Any

import pytest
from helpers import write

from benchmarks.fuzz_configs import run
from bootvit.config import Config, flatten, parse_yaml
from bootvit.errors import UserError
from bootvit.load import load_config
from cluster.command import check_command
from tune.spec.load import load_sweep


def got(given: str) -> Any:
    return flatten(load_config("digits/joint", [given]))[given.partition("=")[0]]


def refused(*overrides: str, name: str = "digits/joint") -> str:
    with pytest.raises(UserError) as caught:
        load_config(name, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "set #2",
        "[a]",
        '"q"',
        "'q'",
        " x ",
        "a: b",
        "{a",
        "*a",
        "&a",
        "%a",
        "2024-11-25",
        "007",
        "1e3",
        "on",
        "ü",
        "a\nb",
    ],
)
def test_a_text_is_taken_as_typed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert got(f"data.root={name}") == str(tmp_path / name)
    assert got(f"tracking.experiment={name}") == name


@pytest.mark.parametrize("name", ["2024-11-25", "1e3", "007", "on", "null", "0x1F", "1.5", "12"])
def test_a_name_is_taken_as_typed(name: str) -> None:
    assert got(f"name={name}") == name


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("data.root=null", None),
        ("data.root=~", str(Path.home())),
        ("data.root=~/x", str(Path.home() / "x")),
        ("model.vit.weights=null", None),
        ("model.agent.norm=null", None),
        ("optim.clip_norm=null", None),
        ("optim.clip_norm=~", None),
        ("data.batch_size=010", 10),
        ("data.batch_size=0x10", 16),
        ("data.flip=off", False),
        ("optim.lr=1e-4", 1e-4),
        ("data.mean=[0.1, 0.2, 0.3]", [0.1, 0.2, 0.3]),
    ],
)
def test_what_a_value_means(given: str, value: Any) -> None:
    assert got(given) == value


def test_in_a_section_a_hash_begins_no_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(
        "digits/joint", ["data={source: imagefolder, root: set #2}", "tracking={experiment: '#1 # 2'}"]
    )
    assert config.data.root == str(tmp_path / "set #2")
    assert config.tracking.experiment == "#1 # 2"
    assert 'batch_size="4 # x"' in refused("data.batch_size=4 # x")


def test_the_last_one_wins() -> None:
    config = load_config("digits/joint", ["seed=1", "data={fraction: 0.1}", "seed=2", "data.fraction=0.2"])
    assert (config.seed, config.data.fraction) == (2, 0.2)
    assert "override 'seed=-2'" in refused("seed=1", "seed=-2")


def test_a_sweeps_own_texts_and_those_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "s.yaml", "name: s\nbase: digits/joint\nspace: {objective.vit.kd: {grid: [1, 2]}}\n")
    sweep = load_sweep(
        str(path), ["name=2024-11-25", "set.data.root=set #1", "tracking.experiment=7 #2", "seeds=[1, 2]"]
    )
    assert (sweep.file.name, sweep.seeds) == ("2024-11-25", (1, 2))
    assert (sweep.base.data.root, sweep.base.tracking.experiment) == (str(tmp_path / "set #1"), "7 #2")
    with pytest.raises(UserError, match=r"override 'data=1': data=1"):
        load_sweep(str(path), ["data=1"])


def test_a_job_is_checked_with_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.yaml", "name: c")
    words = ["train", "c.yaml", "name=2024-11-25", "ray.storage_path=/runs #2", "tracking.enabled=false"]
    command = check_command(words, {})
    assert command.name == "2024-11-25"
    assert command.words == tuple(words)


def test_a_submitted_sweeps_own_settings_are_places_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = "ray.storage_path: /runs, tracking.enabled: false"
    text = "name: s\nbase: digits/joint\nset: {%s}\nspace: {objective.vit.kd: {grid: [1, 2]}}\n"
    write(tmp_path / "s.yaml", text % places)
    check_command(["sweep", "s.yaml"], {})
    write(tmp_path / "s.yaml", text % f"{places}, data.root: images")
    with pytest.raises(UserError, match=r"data.root=images is relative"):
        check_command(["sweep", "s.yaml"], {})
    check_command(["sweep", "s.yaml", "data.root=/images"], {})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data.root=", "data.root is empty; null is none"),
        ("data.root= ", "data.root is empty; null is none"),
        ("tracking.experiment=", "tracking.experiment is empty"),
        ("optim.clip_norm=", "optim.clip_norm is empty; null is none"),
        ("seed=", "seed is empty"),
        ("data.root=caf\udce9", "data.root=\"caf\\udce9\": a text must be Unicode"),
        ("data.mean=[.nan, 0, 0]", "data.mean.0=NaN: a number must be finite"),
        ("optim.lr=1e999", "optim.lr=Infinity: a number must be finite"),
        (f"schedule.epochs=1{'0' * 400}", "a whole number is at most"),
        ("data.image_size=abc", 'data.image_size="abc": Input'),
        ("optim.agent.clip_norm=x", 'optim.agent.clip_norm="x": Input'),
        ("ray.storage_path=s3:", "ray.storage_path=s3:: not an address of an object store"),
        ("ray.storage_path=S3://b/x", "ray.storage_path=S3://b/x: write s3://"),
        ("data.root=gs:/b", "not an address of an object store, which begins with one of s3://"),
        ("data.root=file://x", "not an address of an object store, which begins with one of s3://"),
    ],
)  # fmt: skip
def test_a_value_that_no_key_can_have(given: str, expected: str) -> None:
    message = refused(given)
    assert expected in message
    assert message.startswith("override ")


def test_a_folder_with_a_colon_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert got("data.root=run:1") == str(tmp_path / "run:1")
    assert got("ray.storage_path=./s3:") == str(tmp_path / "s3:")


def test_results_behind_a_link_that_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").symlink_to(tmp_path / "not mounted")
    for storage in ("disk", "disk/runs", str(tmp_path / "disk")):
        assert "disk is a link that leads nowhere" in refused(f"ray.storage_path={storage}")
    (tmp_path / "not mounted").mkdir()
    assert got("ray.storage_path=disk/runs") == str(tmp_path / "not mounted" / "runs")


FILES = [
    ("name: 123", "name=123: expected a text: write it in quotes"),
    ("name: yes", "name=true: expected a text: write it in quotes"),
    ("data: {root: 12}", "data.root=12: expected a text: write it in quotes"),
    ("name: 12:30:00", 'name="12:30:00": String should match'),
    ("schedule: {epochs: 1:30}", 'schedule.epochs="1:30": Input should be a valid integer'),
    ("name: !!binary aGk=", "name: YAML's type 'bytes'"),
    ("name: !!set {a}", "name: YAML's type 'set'"),
    ("seed: !!bool x", "not valid YAML"),
    ("seed: !!int x", "not valid YAML"),
    ("data: {<<: {seed: 1}}", "unknown key 'data.<<'"),
    ("1: x", "a key is a text"),
    ("on: x", "a key is a text"),
    ("data: {mean: [0, .inf, 0]}", "data.mean.1=Infinity: a number must be finite"),
    ("data: {root: ''}", 'data.root="": is empty'),
    ('data: {root: "a\\0b"}', "hold no NUL"),
    ("seed: 1\n---\nseed: 2", "not valid YAML"),
    ("\tseed: 1", "not valid YAML"),
    ("a: &a [*a]", "not valid YAML"),
    ("[" * 3000, "not valid YAML"),
    ("extends: [1]", "extends=[1]: expected a file's name"),
]


@pytest.mark.parametrize(("text", "expected"), FILES, ids=[text[:30] for text, _ in FILES])
def test_an_odd_file(text: str, expected: str, tmp_path: Path) -> None:
    message = refused(name=str(write(tmp_path / "x.yaml", text)))
    assert "x.yaml: " in message
    assert expected in message


def test_files_as_editors_write_them(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbfname: 2024-11-25\r\ndata: {root: 2024-11-25, flip: no}\r\n")
    config = load_config(str(tmp_path / "x.yaml"))
    assert (config.name, config.data.flip) == ("2024-11-25", False)
    assert Path(config.data.root or "").name == "2024-11-25"
    (tmp_path / "x.yaml").write_text("")
    assert load_config(str(tmp_path / "x.yaml")).name == Config().name
    (tmp_path / "x.yaml").write_bytes("name: a".encode("utf-16"))
    assert "x.yaml: cannot be read" in refused(name=str(tmp_path / "x.yaml"))


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in (str(tmp_path), str(tmp_path / "pipe.yaml"), "/dev/zero"):
        assert f"{name}: not a regular file" in refused(name=name)
    assert "no such config file" in refused(name="a" * 5000)


def test_aliases_are_counted_written_out() -> None:
    laughs = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
    with pytest.raises(UserError, match="more than 100000 values"):
        parse_yaml(laughs, "x")
    assert parse_yaml("a: &a [1]\nb: *a", "x") == {"a": [1], "b": [1]}


def test_a_hundred_odd_inputs_end_in_our_own_errors() -> None:
    found = run(100, seed=7)
    assert not [what for what in found if what.startswith("WRONG")]
    assert set(found) >= {"loaded", "UserError"}
    assert run(20, seed=7) == run(20, seed=7)
