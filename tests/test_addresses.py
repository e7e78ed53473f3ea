"""A secret in an address reaches no file, no store, no message: planted everywhere, and searched for everywhere."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, write

from bootvit.__main__ import main
from bootvit.addresses import has_secret, public, public_address, without_secrets
from bootvit.config import Config, dump_config, flatten, override, whole
from bootvit.errors import UserError
from bootvit.load import load_config, make_config
from bootvit.ray_connection import check_address
from bootvit.tracking import MlflowRun, store, tracking_uri
from bootvit.tracking.attach import attach
from bootvit.tracking.link import RunLink, charts
from cluster.submit import passed

SECRET = "hunter2"


@pytest.mark.parametrize("password", ["secret", "sec/ret", "sec@ret", "sec#ret", "sec ret", "sec:ret", "sec?ret"])
def test_a_password_of_any_form_is_not_shown(password: str) -> None:
    address = f"http://me:{password}@host:5000/x"
    assert public_address(address) == "http://***@host:5000/x"
    assert public(f"at {address} failed") == "at http://***@host:5000/x failed"
    assert (
        public(f"override 'tracking.uri={address}': wrong") == "override 'tracking.uri=http://***@host:5000/x': wrong"
    )


SHOWN = {
    "http://host:5000": "http://host:5000",
    "http://token@host": "http://***@host",
    "https://host/x?token=a&user=b": "https://host/x?token=***&user=***",
    "postgresql://u:p@h/db?sslmode=require&sslpassword=x": "postgresql://***@h/db?sslmode=require&sslpassword=***",
    "s3://key:secret@bucket/runs?region=eu&scheme=http": "s3://***@bucket/runs?region=eu&scheme=http",
    "s3://b/p?endpoint_override=http://127.0.0.1:9": "s3://b/p?endpoint_override=http://127.0.0.1:9",
    "https://host/?abc": "https://host/?***",
    "gs://anonymous@b/p?scheme=http": "gs://anonymous@b/p?scheme=http",
    "gs://anonymous:pw@b/p": "gs://***@b/p",
    "gs://anonymous@me:pw@b/p": "gs://***@b/p",
    "hf://datasets/me/set@v1/data": "hf://datasets/me/set@v1/data",
    "sqlite:////home/me@work/mlflow.db": "sqlite:////home/me@work/mlflow.db",
    "/data/me:x@y/set?1": "/data/me:x@y/set?1",
    "./runs": "./runs",
    "timm": "timm",
}


@pytest.mark.parametrize("address", SHOWN)
def test_what_is_shown_of_an_address(address: str) -> None:
    assert public_address(address) == SHOWN[address]
    assert public_address(SHOWN[address]) == SHOWN[address]
    assert has_secret(address) == (SHOWN[address] != address)
    assert public(f"at {address}: no") == f"at {SHOWN[address]}: no"


@pytest.mark.parametrize(
    "text",
    [
        "MLflow at http://host:5000 failed: no such user: me@work",
        "x.yaml: data.root=/data/a@b: expected KEY=VALUE, such as data.fraction=0.1",
        "10.0.0.1:6379 does not answer at 12:30, ask admin@host",
        "is it http://host:5000?",
    ],
)
def test_a_message_without_secrets_stays_as_it_is(text: str) -> None:
    assert public(text) == text


def test_parts_of_an_address_that_an_error_repeats_are_masked() -> None:
    address = "postgresql://me:hun%74er2@h/db?sslpassword=s3cret&sslmode=require"
    text = without_secrets("no hun%74er2 or hunter2 with s3cret (require) at postgresql://me:hun%74er2@h", address)
    assert text == "no *** or *** with *** (require) at postgresql://***@h"


def test_a_half_address_is_not_shown() -> None:
    """A message that is cut behind the password no longer looks like an address with one."""
    with pytest.raises(UserError) as caught:
        load_config("digits/joint", [f"optim.lr=http://me:{'x' * 70}{SECRET * 20}@host"])
    assert "xxx" not in str(caught.value)
    assert SECRET not in str(UserError(f"http://me:{SECRET * 400}@host"))


# ------------------------------------------------------------------------------------------------- configs

PLACES = {
    "tracking": {"uri": f"http://me:{SECRET}@host:5000"},
    "model": {"vit": {"weights": f"https://{SECRET}@host/vit.pt"}, "agent": {"weights": f"https://h/?t={SECRET}"}},
    "data": {"root": f"s3://me:{SECRET}@bucket"},
    "ray": {"storage_path": f"s3://me:{SECRET}@bucket"},
}


def test_what_is_written_of_a_config_holds_no_secret_and_what_is_used_does() -> None:
    config = Config.model_validate(PLACES)
    for text in (dump_config(config), str(flatten(config)), config.model_dump_json(), str(config.model_dump())):
        assert SECRET not in text
        assert "http://***@host:5000" in text
    assert override(config, {"seed": 3}).tracking.uri == whole(config)["tracking"]["uri"] == PLACES["tracking"]["uri"]
    assert SECRET not in repr(config.tracking)


def test_an_address_read_from_a_runs_files_needs_its_secret_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"tracking\.uri='http://\*\*\*@host': its password is in no file: give"):
        tracking_uri("http://***@host")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@host")
    assert tracking_uri("http://***@host") == f"http://me:{SECRET}@host"
    with pytest.raises(UserError, match="in no file"):
        tracking_uri("http://***@other")


def test_a_report_is_not_attached_without_the_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write(tmp_path / "mlflow.json", RunLink(run_key="k", run_id="r", uri="http://***@host").model_dump_json())
    attach(tmp_path, [], "report")
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("bootvit: warning: report is not in MLflow at http://***@host: tracking.uri=")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://***@host:5000/", "http://host:5000/#/experiments/7/runs?compareRunsMode=CHART"),
        (
            "sqlite:////a/mlflow.db",
            "http://127.0.0.1:5000/#/experiments/7/runs?compareRunsMode=CHART "
            "after mlflow ui --backend-store-uri sqlite:////a/mlflow.db",
        ),
        ("databricks", None),
    ],
)
def test_where_charts_are(tmp_path: Path, uri: str, shown: str | None) -> None:
    assert charts(tmp_path) is None
    link = RunLink(run_key="k", run_id="r", uri=uri, experiment_id="7")
    write(tmp_path / "mlflow.json", link.model_dump_json())
    assert charts(tmp_path) == shown


def test_a_job_gets_no_setting_with_a_secret() -> None:
    env = {"MLFLOW_TRACKING_URI": f"http://me:{SECRET}@h", "MLFLOW_S3_ENDPOINT_URL": "http://h:9", "HOME": "/x"}
    assert passed(env) == {"MLFLOW_S3_ENDPOINT_URL": "http://h:9"}


@pytest.mark.parametrize("address", [f"me:{SECRET}@head:6379", f"ray://me:{SECRET}@head", f"http://{SECRET}@head"])
def test_ray_address(address: str) -> None:
    with pytest.raises(UserError, match=r"RAY_ADDRESS=.*\*\*\*@head") as caught:
        check_address({"RAY_ADDRESS": address})
    assert SECRET not in str(caught.value)


# ------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write(tmp_path / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    return tmp_path


def found_in(folder: Path) -> list[str]:
    """The files, databases included, that hold the secret."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_store: Path) -> Callable[[], Any]:
    """A store at an address with a secret; returns a client of it."""
    connect = store.connect
    shutil.copy(empty_store, tmp_path / "mlflow.db")

    def connected(uri: str = "") -> Any:
        return connect(f"sqlite:///{tmp_path}/mlflow.db")

    monkeypatch.setattr("bootvit.tracking.tracked.connect", connected)
    return connected


TRAIN = ["train", "tiny.yaml", "--local", "schedule.epochs=1", "tracking.enabled=true"]
ADDRESS = f"http://me:{SECRET}@127.0.0.1:5000"


@pytest.mark.parametrize("variable", [False, True], ids=["key", "variable"])
def test_a_tracked_run_and_its_resumption(
    variable: bool,
    here: Path,
    reachable: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if variable:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    words = [*TRAIN, *([] if variable else [f"tracking.uri={ADDRESS}"])]
    assert main(words) == 0
    assert main([*words, "--resume"]) == 0
    out, err = capfd.readouterr()
    assert (SECRET in out + err, found_in(here)) == (False, [])
    link = json.loads((here / "runs/tiny/mlflow.json").read_text())
    assert (link["uri"], link["complete"]) == ("http://***@127.0.0.1:5000", True)
    client = reachable()
    run = client.get_run(link["run_id"])
    assert run.data.params["tracking.uri"] == ("null" if variable else "http://***@127.0.0.1:5000")
    if not variable:  # its own config.yaml lacks the password, and says so before anything is taken
        assert main(["train", "runs/tiny/config.yaml", "--local", "--resume"]) == 2
        assert "its password is in no file" in capfd.readouterr().err
        assert main(["train", "runs/tiny/config.yaml", "--local", "--resume", f"tracking.uri={ADDRESS}"]) == 0


def test_a_store_that_is_down_and_a_run_that_fails(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"http://me:{SECRET}@127.0.0.1:{sock.getsockname()[1]}"
    assert main([*TRAIN, f"tracking.uri={address}"]) == 0
    assert main([*TRAIN, "name=bad", "optim.lr=1e30", f"tracking.uri={address}"]) == 1
    assert main(["report", "--sweep", "runs/tiny"]) == 2
    out, err = capfd.readouterr()
    assert "MLflow at http://***@127.0.0.1" in err
    assert (SECRET in out + err, found_in(here)) == (False, [])


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["config", "tiny.yaml", f"tracking.uri={ADDRESS}"], 0),
        (["config", "tiny.yaml", f"model.vit.weights=https://me:{SECRET}@host/x.pt"], 0),
        (["train", "tiny.yaml", "--local", f"model.vit.weights=https://me:{SECRET}@host/x.pt"], 2),
        (["train", "tiny.yaml", "--local", f"data.root=s3://me:{SECRET}@bucket/x"], 2),
        (["train", "tiny.yaml", "--local", f"ray.storage_path=s3://me:{SECRET}@bucket/x"], 2),
        (["train", "tiny.yaml", "--local", f"traking.uri={ADDRESS}"], 2),
        (["train", "tiny.yaml", "--local", f"tracking.uri=http://me:sec {SECRET}@host", "tracking.enabled=true"], 2),
        (["train", "tiny.yaml", "--local", f"tracking.uri=http://me:1/{SECRET}@host", "tracking.enabled=true"], 2),
        (["train", "tiny.yaml", "--local", f"--tracking.uri={ADDRESS}"], 2),
        (["train", f"http://me:{SECRET}@host/tiny.yaml", "--local"], 2),
        (["report", "--experiment", f"http://me:{SECRET}@host"], 2),
        (["submit", "--address", f"http://me:{SECRET}@127.0.0.1:9", "--", "train", "digits/joint"], 2),
        (["submit", "--", "train", "digits/joint", "ray.storage_path=/x", f"tracking.uri=http://{SECRET}@host"], 2),
    ],
    ids=lambda value: " ".join(value).replace(SECRET, "") if isinstance(value, list) else str(value),
)
def test_what_commands_print(words: list[str], status: int, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == status
    out, err = capfd.readouterr()
    assert (SECRET in out + err, found_in(here)) == (False, [])
    assert out + err


def test_an_error_of_mlflow_that_repeats_the_secret(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(uri: str) -> None:
        raise ConnectionError(f"Max retries exceeded with url {'x' * 200} /api?{SECRET}; {uri}; user me:{SECRET}")

    monkeypatch.setattr("bootvit.tracking.tracked.connect", refused)
    config = Config.model_validate({"tracking": {"uri": ADDRESS}})
    assert not MlflowRun(config, here / "run", tags={}).connect()
    err = capsys.readouterr().err
    assert "Max retries exceeded" in err
    assert "hunt" not in err
