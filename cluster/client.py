"""The connection to a cluster's dashboard: made within seconds, or one line why not.

The token is Ray's business: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN. Ray's
client reads it, and nothing here stores it, shows it or sends it elsewhere than in that client's header.
"""

from __future__ import annotations

import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from bootvit.errors import UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_S = 5.0  # to the first answer of the dashboard


def dashboard(address: str | None, env: Mapping[str, str] = os.environ) -> str:
    """The dashboard's URL: the option, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else this machine's."""
    sources = ("--address", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    values = (address, env.get("RAY_API_SERVER_ADDRESS"), env.get("RAY_ADDRESS"))
    for source, value in zip(sources, values, strict=True):
        if value:
            if urlsplit(value).scheme not in ("http", "https"):
                raise UserError(f"{source}={value}: expected the URL of the cluster's dashboard, http://HEAD:8265")
            return value.rstrip("/")
    return DEFAULT_ADDRESS


def connect(url: str) -> Any:
    """A `JobSubmissionClient` of a cluster that answers and takes our token; `UserError` otherwise."""
    _probe(url)  # Ray's own client waits for minutes where nothing answers
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    _silence("ray.dashboard.modules", "ray._private.runtime_env")
    try:
        with _address_in_environment(url):
            return JobSubmissionClient(url)
    except AuthenticationError as err:
        raise UserError(_token_error(str(err), url)) from None
    except (RuntimeError, ValueError, KeyError, OSError) as err:
        # The message for a malformed header would quote the token, so only the kind of the error is told.
        raise UserError(
            f"{url}: no jobs are taken there ({type(err).__name__}): "
            "is it a Ray dashboard, and is the token one line of plain text?"
        ) from None


def _probe(url: str) -> None:
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=CONNECT_S):
            return
    except urllib.error.HTTPError:
        return  # an answer, such as 401 before the token is shown
    except (OSError, ValueError, http.client.HTTPException) as err:
        reason = getattr(err, "reason", err)
        raise UserError(
            f"{url}: no Ray cluster answers there ({reason}): start one, or give its dashboard with --address"
        ) from None


def _token_error(message: str, url: str) -> str:
    if message.startswith("Authentication required"):
        return f"{url}: the cluster wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
    if message.startswith("Authentication failed"):
        return f"{url}: the cluster refuses this token: set RAY_AUTH_TOKEN_PATH to a file with its own token"
    return f"RAY_AUTH_MODE=token: {message.split('. ', maxsplit=1)[0]}"


def _silence(*prefixes: str) -> None:
    """Quiet the loggers that Ray sets to INFO one by one, so that their parent's level does not count."""
    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith(prefixes):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _address_in_environment(url: str) -> Iterator[None]:
    """Ray lets this variable win over the address it is given; here the address has been chosen already."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = url
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
