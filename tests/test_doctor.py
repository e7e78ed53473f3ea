"""`bootvit doctor`: each thing that may be wrong is found, within its time, with what to type."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny

from bootvit import doctor
from bootvit.__main__ import main
from bootvit.config import Config
from bootvit.doctor import Check, Sick, finding


def failing(run: Callable[[], str]) -> Sick:
    with pytest.raises(Sick) as caught:
        run()
    assert caught.value.todo
    return caught.value


def test_a_check_that_hangs_is_left_and_one_that_raises_is_a_finding() -> None:
    hangs = finding(Check("slow", lambda: time.sleep(60) or "", 0.1, "type this"))
    assert (hangs.ok, hangs.said, hangs.todo) == (False, "no answer within 0.1 s", "type this")
    raises = finding(Check("bad", lambda: str(1 / 0), 5, "type that"))
    assert (raises.ok, raises.said, raises.todo) == (False, "ZeroDivisionError: division by zero", "type that")
    assert finding(Check("good", lambda: "fine", 5, "x"))[:4] == ("good", True, "fine", "")


def test_packages_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_packages().startswith(f"torch {version('torch')}")
    known = {"torch": "2.13.0", "torchvision": "0.29.1"}
    monkeypatch.setattr(doctor, "version", lambda name: known.get(name, "1"))
    assert "torchvision 0.29.1 is not for torch 2.13.0" in str(failing(doctor.check_packages))
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "timm" else "1")
    assert failing(doctor.check_packages).todo == "pip install timm"


@pytest.mark.parametrize(
    ("torch", "vision", "fit"), [("2.14.1", "0.29.1", True), ("2.15.0", "0.29.1", False), ("2.14.1", "0.28.0", False)]
)
def test_which_torchvision_is_for_which_torch(
    monkeypatch: pytest.MonkeyPatch, torch: str, vision: str, fit: bool
) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy", "torch>=2.14.0"])
    assert doctor.fits(torch, vision) is fit
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch==9.9.9"])
    assert not doctor.fits(torch, vision)


def test_the_cpu_multiplies_and_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "right to" in doctor.check_device("cpu")
    monkeypatch.setattr("torch.Tensor.__matmul__", lambda self, other: self * (self.dtype != torch.float32))
    assert "is off by" in str(failing(lambda: doctor.check_device("cpu")))


@pytest.mark.slow
def test_two_processes_add_up() -> None:
    assert doctor.check_collective(tiny(ray__use_gpu=False)) == "2 processes over gloo added up"


def test_little_shared_memory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for total, free, said in ((64, 64, "64 MiB in all"), (2048, 10, "10 MiB free of 2048")):
        usage = SimpleNamespace(total=total << 20, free=free << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda place, usage=usage: usage)
        assert said in str(failing(lambda: doctor.check_shm(tmp_path)))
    assert doctor.check_shm(tmp_path / "none") == "this system has none"


def test_storage_is_written_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(ray__storage_path=str(tmp_path / "runs"))
    assert "written and read" in doctor.check_storage_works(config)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(total=1 << 40, free=1 << 20))
    assert "1 MiB free" in str(failing(lambda: doctor.check_storage_works(config)))
    (tmp_path / "file").write_text("")
    taken = tiny(ray__storage_path=str(tmp_path / "file"))
    bad = finding(Check("storage", lambda: doctor.check_storage_works(taken), 5, "t"))
    assert (bad.ok, "is not a folder" in bad.said) == (False, True)


class Server(BaseHTTPRequestHandler):
    """A tracking server whose clock and status can be set."""

    status, ahead = 200, 0.0

    def do_GET(self) -> None:
        self.send_response_only(self.status)
        self.send_header("Date", formatdate(time.time() + self.ahead))
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, type[Server]]]:
    handler = type("Handler", (Server,), {})
    with HTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", handler
        http.shutdown()


def tracked(uri: str, folder: Path) -> Config:
    return tiny(tracking__enabled=True, tracking__uri=uri, ray__storage_path=str(folder))


def test_tracking_that_is_down_refuses_or_is_something_else(tmp_path: Path, server: tuple[str, type[Server]]) -> None:
    uri, handler = server
    assert doctor.check_tracking_works(tracked(uri, tmp_path)) == f"{uri}: answers"
    for status, said in ((401, "answers 401"), (404, "no MLflow server")):
        handler.status = status
        assert said in str(failing(lambda: doctor.check_tracking_works(tracked(uri, tmp_path))))
    assert "no answer" in str(failing(lambda: doctor.check_tracking_works(tracked("http://127.0.0.1:9", tmp_path))))
    assert "not there yet" in doctor.check_tracking_works(tracked(f"sqlite:///{tmp_path}/mlflow.db", tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert doctor.check_tracking_works(tiny()).startswith("off")


def test_a_clock_that_is_wrong_is_found(tmp_path: Path, server: tuple[str, type[Server]]) -> None:
    uri, handler = server
    assert f"{tmp_path}, {uri}" in doctor.check_clock(tracked(uri, tmp_path))
    handler.ahead = 120.0
    wrong = failing(lambda: doctor.check_clock(tracked(uri, tmp_path)))
    assert "s ahead of this machine" in str(wrong)
    assert list(tmp_path.iterdir()) == []


def test_ray_is_found_or_its_address_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "no RAY_ADDRESS: a local Ray is started" in doctor.check_ray()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    wrong = finding(Check("ray", doctor.check_ray, 30, "export"))
    assert (wrong.ok, "nothing answers there" in wrong.said) == (False, True)


def test_the_command_prints_each_finding_and_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = [Check("good", lambda: "fine", 5, ""), Check("bad", lambda: str(1 / 0), 5, "type that")]
    asked: list[Config] = []
    monkeypatch.setattr(doctor, "checks", lambda config: asked.append(config) or found)
    assert main(["doctor", "ray.storage_path=here"]) == 1
    assert asked[0].ray.storage_path == str(tmp_path / "here")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["ok", "good", "fine"],
        ["!!", "bad", "ZeroDivisionError:", "division", "by", "zero"],
        ["try:", "type", "that"],
    ]
    found.pop()
    assert main(["doctor", "digits/vit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["said"] == "fine"
    assert os.listdir(tmp_path) == []
