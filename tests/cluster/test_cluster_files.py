"""The files that start a cluster are what Ray, Kubernetes and bash take, and all of them want a token."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "cluster"


def test_rays_launcher_takes_the_cluster_file() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = util.prepare_config(yaml.safe_load((FOLDER / "ray-cluster.yaml").read_text()))
    util.validate_config(config)
    node = config["available_node_types"]["local.cluster.node"]
    assert node["min_workers"] == node["max_workers"] == len(config["provider"]["worker_ips"])
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "export RAY_AUTH_MODE=token" in commands[-1]


def containers() -> list[dict[str, Any]]:
    claim, cluster = yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text())
    assert (claim["kind"], cluster["kind"], cluster["apiVersion"]) == (
        "PersistentVolumeClaim",
        "RayCluster",
        "ray.io/v1",
    )
    pods = [
        group["template"]["spec"] for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"])
    ]
    for pod in pods:
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    return [pod["containers"][0] for pod in pods]


def test_every_kubernetes_pod_has_the_token_and_the_shared_volume() -> None:
    assert len(containers()) == 2
    for container in containers():
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert "value" not in env["RAY_AUTH_TOKEN"]  # a reference, never the token itself
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "bootvit-ray-token"
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/shared"]


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sbatch")], check=True)


@pytest.mark.cluster
def test_the_slurm_script_brings_up_two_nodes_and_ends_as_its_command(tmp_path: Path) -> None:
    """Slurm's commands are played by scripts that run everything here; the nodes and the token are real."""
    commands = tmp_path / "bin"
    commands.mkdir()
    skip_options = 'while [[ $1 == --* ]]; do shift; done; echo "$*" >> "$HOME/calls"; exec "$@"'
    for name, body in (("srun", skip_options), ("scontrol", "printf 'n1\\nn2\\n'")):
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    job = str(secrets.randbelow(4000))
    env = {
        "HOME": str(tmp_path),
        "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
    }
    command = ["bash", str(FOLDER / "slurm.sbatch"), "train", "digits/joint", "seeed=1"]
    done = subprocess.run(command, env=env, cwd=FOLDER.parent, text=True, capture_output=True, timeout=400, check=False)
    shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'seed'?" in done.stderr  # after the script has seen both nodes alive
    calls = (tmp_path / "calls").read_text()
    assert "ray start --head" in calls
    assert "ray start --block --address=" in calls
    assert not list(tmp_path.glob(".bootvit-ray-token*"))
    assert f"ray-{job}/" not in subprocess.run(["ps", "-eo", "args"], text=True, capture_output=True, check=True).stdout
