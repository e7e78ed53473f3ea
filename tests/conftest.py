"""What every test shares: one thread, a cache of its own, and the shared data sets where they are present."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from store_proxy import CREDENTIALS, Proxy, serve

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let its workers starve beside other tests
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real CIFAR-10 and ImageNet images: BOOTVIT_SHARED_DATA, or ../shared/data beside the clone."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("BOOTVIT_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set BOOTVIT_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database to copy, made once: MLflow's migrations take seconds."""
    from bootvit.tracking.store import connect

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decoded images go to a folder of this test run."""
    os.environ["BOOTVIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Proxy]:
    """An S3 server of this machine behind a proxy; nothing is set for clients."""
    with serve() as proxy:
        yield proxy


@pytest.fixture
def s3(s3_server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The same with the cloud's usual variables set, and the proxy as new."""
    s3_server.clear()
    for key, value in CREDENTIALS.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    return s3_server
