"""Finding and reaching a cluster: the right address, and one line within seconds where nobody answers."""

from __future__ import annotations

import socket

import pytest

from bootvit.errors import UserError
from cluster import client
from cluster.client import connect, dashboard


def test_where_the_cluster_is() -> None:
    env = {"RAY_API_SERVER_ADDRESS": "http://b:1/", "RAY_ADDRESS": "http://c:1"}
    assert dashboard("https://a:1", env) == "https://a:1"
    assert dashboard(None, env) == "http://b:1"
    assert dashboard(None, {"RAY_ADDRESS": "http://c:1"}) == "http://c:1"
    assert dashboard(None, {}) == "http://127.0.0.1:8265"
    with pytest.raises(UserError, match="RAY_ADDRESS=head:6379: expected the URL"):
        dashboard(None, {"RAY_ADDRESS": "head:6379"})


def test_a_machine_that_takes_connections_but_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{url}: no Ray cluster answers there .*timed out"):
            connect(url)


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:99999", "http://no such host"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UserError, match="no Ray cluster answers there"):
        connect(url)
