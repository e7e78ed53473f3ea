"""RAY_ADDRESS and the folder of a local Ray: what cannot work is one line, and is found before Ray is asked."""

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import TINY, write

from bootvit import ray_connection
from bootvit.__main__ import main
from bootvit.config import dump_config
from bootvit.errors import UserError
from bootvit.load import make_config
from bootvit.ray_connection import SOCKET, SOCKET_LIMIT, check_address, one_line_for, session_folder

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # how a gRPC server begins


@contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """The address of a port that answers a connection so; None says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(100)
                if answer is None:
                    connection.recv(100)
                else:
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def unused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("form", ["localhost", "abc", "127.0.0.1:notaport", "127.0.0.1:0", "h:99999", ":6379", "a b:1"])
def test_an_address_of_a_wrong_form(form: str) -> None:
    with pytest.raises(UserError, match=rf"RAY_ADDRESS={form}: not an address: give host:port of the cluster's head"):
        check_address({"RAY_ADDRESS": form})


def test_addresses_of_other_things_than_a_head() -> None:
    with pytest.raises(UserError, match="a dashboard takes jobs only"):
        check_address({"RAY_ADDRESS": "http://127.0.0.1:8265"})
    with pytest.raises(UserError, match="Ray Client is not supported"):
        check_address({"RAY_ADDRESS": "ray://127.0.0.1:10001"})


def test_who_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_connection, "CONNECT_S", 0.3)
    with server(SETTINGS) as head:
        assert check_address({"RAY_ADDRESS": head}) == head
    for answer in (b"HTTP/1.0 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n", b""):
        with server(answer) as other, pytest.raises(UserError, match="what listens there is no Ray"):
            check_address({"RAY_ADDRESS": other})
    with server(None) as silent, pytest.raises(UserError, match=r"no answer within 0\.3 s"):
        check_address({"RAY_ADDRESS": silent})
    assert [check_address({}), check_address({"RAY_ADDRESS": ""}), check_address({"RAY_ADDRESS": "local"})] == [
        None
    ] * 3


def test_nothing_there_is_one_line_and_the_name_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    address = unused()
    monkeypatch.setenv("RAY_ADDRESS", address)
    write(tmp_path / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    assert main(["train", "tiny.yaml"]) == 2
    assert capsys.readouterr().err == (
        f"bootvit: error: RAY_ADDRESS={address}: nothing answers there (Connection refused): give host:port of the "
        "cluster's head, such as 10.0.0.1:6379, or unset it to start a local Ray\n"
    )
    assert not (tmp_path / "runs").exists()


def fail(printed: bytes, err: Exception) -> None:
    """What Ray does on the way to a cluster: its C++ parts print, and then it raises."""
    with one_line_for("h:1"):
        os.write(2, printed)
        raise err


def test_what_ray_prints_about_a_token_becomes_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    printed = b"gcs_client.cc:210: Unauthenticated: RPC error: InvalidAuthToken: token is missing or incorrect\n"
    with pytest.raises(UserError, match=r"^RAY_ADDRESS=h:1: the cluster refuses the token, .* RAY_AUTH_TOKEN_PATH"):
        fail(printed, ConnectionError("Failed to connect to Ray cluster at h:1"))
    with pytest.raises(UserError, match=r"^RAY_ADDRESS=h:1: Version mismatch: give host:port"):
        fail(b"[W] a line\n", RuntimeError("Version\nmismatch"))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_the_folder_of_a_local_ray(name: str, tmp_path: Path) -> None:
    assert session_folder({}) is None
    assert session_folder({name: "/tmp"}) is None
    assert session_folder({name: str(tmp_path / ("x" * 100))}) == "/tmp/ray"  # its sockets' paths would be too long
    with (
        tempfile.NamedTemporaryFile(dir="/tmp") as file,
        pytest.raises(UserError, match=rf"^{name}={file.name}/no: a local Ray cannot write there \(Not a directory"),
    ):
        session_folder({name: f"{file.name}/no"})


def test_the_longest_socket_of_a_local_ray_fits() -> None:
    longest = f"/{'x' * (SOCKET_LIMIT - SOCKET - len('/ray') - 1)}"
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(FileNotFoundError):  # not: AF_UNIX path too long
        sock.bind(f"{longest}/ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store")
