"""What identifies a run: its source version, its data, its place; and its parameters as MLflow takes them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bootvit.addresses import public_address
from bootvit.config import Config, flatten

PARAM_LIMIT = 6000  # MLflow's; longer values are cut here, without its warning
TAG_LIMIT = 8000
DIGEST_LIMIT = 36  # of an MLflow data set


def run_tags(
    config: Config, *, data_fingerprint: str | None = None, subset_digest: str | None = None
) -> dict[str, str]:
    """The tags of a run; what is not known yet (None) is left out, for `MlflowRun.set_tags` to add."""
    version = source_version()
    tags: dict[str, str | None] = {
        "mlflow.runName": config.name,
        "mlflow.source.name": "bootvit",
        "mlflow.source.type": "JOB" if ray_job_id() else "LOCAL",
        "mlflow.source.git.commit": git_commit(),
        "bootvit.kind": "run",
        "bootvit.git": version,
        "bootvit.method": config.method,
        "bootvit.fraction": str(config.data.fraction),
        "bootvit.seed": str(config.seed),
        "bootvit.data": data_name(config.data.source, config.data.root),
        "bootvit.data_fingerprint": data_fingerprint,
        "bootvit.subset_digest": subset_digest,
        "bootvit.host": socket.gethostname(),
        "bootvit.ray_job_id": ray_job_id(),
    }
    return {key: value[:TAG_LIMIT] for key, value in tags.items() if value}


def data_name(source: str, root: str | None) -> str:
    """What a data set is called in tables: its source, or its folder where the source is a format."""
    generic = source in ("imagefolder", "parquet")
    if not generic or not root:
        return source
    place = public_address(root).partition("?")[0] if "://" in root else root
    return Path(place).name or source


def flat_params(config: BaseModel) -> dict[str, str]:
    """The flattened config as MLflow parameters: text as it is, everything else as JSON."""
    return {key: param_text(value) for key, value in flatten(config).items()}


def param_text(value: Any) -> str:
    """One parameter's value, cut to what MLflow keeps."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= PARAM_LIMIT else f"{text[: PARAM_LIMIT - 4]} ..."


def source_version() -> str:
    """The git commit of the source tree (`-dirty` when it differs), or the installed package's version."""
    commit = git_commit()
    if commit is None:
        return package_version()
    return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit


def package_version() -> str:
    """The version of the installed package, or `unknown` in a bare copy of the sources."""
    try:
        return metadata.version("bootvit")
    except metadata.PackageNotFoundError:
        return "unknown"


def git_commit() -> str | None:
    """The commit of the tree that this package lies in; None when that is no git checkout of its own."""
    return _git("rev-parse", "HEAD")


@functools.cache  # what this process runs is what was there when it first asked
def _git(*arguments: str) -> str | None:
    tree = Path(__file__).resolve().parents[2]
    # An installed package may lie inside somebody else's repository, whose commit says nothing about it.
    if not (tree / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def ray_job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The submission id of the Ray job that this process belongs to."""
    text = environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    if not text:
        return None
    job_config = json.loads(text)
    job_id = (job_config.get("metadata") or {}).get("job_submission_id")
    return str(job_id) if job_id else None
