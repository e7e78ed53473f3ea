"""The connection to Ray; and what can be wrong before it is asked: address, who listens there, a local one's folder.

Ray itself would try for minutes, or end with a traceback of its own processes.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from bootvit.asks import raise_on_sigterm
from bootvit.config import Config
from bootvit.errors import RunFailed, UserError

CONNECT_S = 5.0  # to the first answer of the cluster's head
RIGHT = "give host:port of the cluster's head, such as 10.0.0.1:6379, or unset it to start a local Ray"
# what Ray puts below its folder, at its longest: session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store
SOCKET = len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store")
SOCKET_LIMIT = 103 if sys.platform == "darwin" else 107  # bytes of a Unix socket's path
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # with empty settings
SETTINGS = 4  # the type of the frame with which HTTP/2, and so gRPC, answers


def check_address(env: Mapping[str, str] = os.environ) -> str | None:
    """RAY_ADDRESS, or None where a local Ray is to be started; `UserError` if no head of a Ray answers there."""
    address = env.get("RAY_ADDRESS")
    if not address or address == "local":
        return None
    if address == "auto":  # Ray looks for a cluster on this machine, which takes it no time
        return address
    name = f"RAY_ADDRESS={address}"
    if address.startswith("ray://"):
        raise UserError(f"{name}: Ray Client is not supported: {RIGHT}")
    if re.match(r"https?://", address):
        raise UserError(f"{name}: a dashboard takes jobs only (bootvit submit --address URL): {RIGHT}")
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})", address)
    if match is None or not 0 < int(match[2]) < 65536:
        raise UserError(f"{name}: not an address: {RIGHT}")
    _check_head(name, match[1].strip("[]"), int(match[2]), tls=env.get("RAY_USE_TLS", "0") not in ("", "0"))
    return address


def _check_head(name: str, host: str, port: int, *, tls: bool) -> None:
    """Whether something listens that speaks gRPC, as the head does; under TLS only whether something listens."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            if tls:
                return
            connection.sendall(PREFACE)
            answer = connection.recv(9, socket.MSG_WAITALL)
    except TimeoutError:
        raise UserError(f"{name}: no answer within {CONNECT_S:g} s: {RIGHT}") from None
    except (OSError, UnicodeError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise UserError(f"{name}: nothing answers there ({reason}): {RIGHT}") from None
    if len(answer) < 9 or answer[3] != SETTINGS:
        raise UserError(f"{name}: what listens there is no Ray: {RIGHT}")


@contextmanager
def one_line_for(address: str) -> Iterator[None]:
    """What Ray raises on the way to a cluster, as one line; what its C++ parts print meanwhile is held back."""
    from ray.exceptions import AuthenticationError, RaySystemError, RpcError

    with tempfile.TemporaryFile() as held:
        try:
            with _stderr_to(held):
                yield
        except (ConnectionError, AuthenticationError, RaySystemError, RpcError, RuntimeError, ValueError) as err:
            held.seek(0)
            printed = held.read().decode(errors="replace")
            raise UserError(f"RAY_ADDRESS={address}: {_reason(err, printed)}") from None


def _reason(err: Exception, printed: str) -> str:
    if type(err).__name__ == "AuthenticationError":  # such as a token's file that is not there
        return str(err).split(". ", maxsplit=1)[0]
    if "InvalidAuthToken" in printed or "Unauthenticated" in printed:
        return (
            "the cluster refuses the token, or wants one: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to a file with the cluster's own"
        )
    return f"{' '.join(str(err).split())[:300]}: {RIGHT}"


@contextmanager
def _stderr_to(file: IO[bytes]) -> Iterator[None]:
    """Let file descriptor 2 lead into a file."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def session_folder(env: Mapping[str, str] = os.environ) -> str | None:
    """Where a local Ray is to put its sessions; None for Ray's own choice, below RAY_TMPDIR or TMPDIR.

    Where its sockets would not fit there (a Unix socket's path has at most 107 bytes) it is `/tmp/ray`.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in env else "TMPDIR"
    if name not in env:
        return None
    given = Path(env[name])
    if env[name] and len(os.fsencode(given.absolute() / "ray")) + SOCKET <= SOCKET_LIMIT:
        _check_writable(name, given)
        return None
    short = Path("/tmp")
    if not os.access(short, os.W_OK | os.X_OK):
        raise UserError(
            f"{name}={given}: too long for Ray's sockets, and {short} cannot be written: set RAY_TMPDIR to a folder "
            f"whose path has at most {SOCKET_LIMIT - SOCKET - len('/ray')} bytes"
        )
    return str(short / "ray")


def _check_writable(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise UserError(
            f"{name}={folder}: a local Ray cannot write there ({err.strerror}): set it to a folder that can be written"
        ) from None


def connect_ray(cpus: float) -> None:
    """Connect to RAY_ADDRESS's cluster, or start a Ray here that has at least this many CPUs.

    `UserError` within half a minute if no cluster is there, or a local one could not write its files.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # report() takes about this long
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := check_address():
        with one_line_for(address):
            ray.init(**quiet)
    else:
        cpus = max(os.cpu_count() or 1, math.ceil(cpus))
        _start_here({"num_cpus": cpus, "_temp_dir": session_folder(), **quiet})
    raise_on_sigterm()  # Ray has put its own handler there


def _start_here(how: dict[str, Any]) -> None:
    """Start a local Ray. Its own patience with a busy machine is half a minute, so it gets a second one."""
    import ray

    for last in (False, True):
        try:
            ray.init(address="local", include_dashboard=False, **how)
            return
        except Exception as err:  # Ray raises it without a kind of its own
            if "timed out during startup" not in str(err):
                raise
            ray.shutdown()
            if last:
                raise RunFailed("Ray did not start within a minute: this machine is too busy; try again") from None


def start_ray(config: Config) -> None:
    """A Ray on which the run's workers fit; `UserError` if they do not, or if it is not installed."""
    if find_spec("ray") is None:
        raise UserError("Ray is not installed: pip install 'bootvit[ray]', or add --local")
    from cluster.capacity import check_cluster, train_workers

    connect_ray(config.ray.most * config.ray.cpus_per_worker)
    check_cluster(train_workers(config), "the cluster")
