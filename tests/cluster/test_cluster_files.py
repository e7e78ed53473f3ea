"""The files that start a cluster are what Ray, Kubernetes and bash take, and all of them want a token."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.command import check_command

FOLDER = Path(__file__).resolve().parents[2] / "cluster"


def launcher(name: str) -> dict[str, Any]:
    """A file of Ray's launcher, checked as `ray up` does before it asks a provider for anything."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    config: dict[str, Any] = util.prepare_config(yaml.safe_load((FOLDER / name).read_text()))
    util.validate_config(config)
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "export RAY_AUTH_MODE=token" in commands[-1]
    return config


def test_rays_launcher_takes_the_file_for_machines_of_ones_own() -> None:
    config = launcher("ray-cluster.yaml")
    node = config["available_node_types"]["local.cluster.node"]
    assert node["min_workers"] == node["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_rays_launcher_takes_the_files_for_clouds(cloud: str) -> None:
    """Spot workers from none upwards, under a head that trains nothing; an unknown key is refused."""
    config = launcher(f"ray-{cloud}.yaml")
    assert config["provider"]["type"] == cloud
    head, spot = (config["available_node_types"][kind] for kind in ("head", "spot"))
    assert config["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert (spot["min_workers"], spot["max_workers"]) == (0, config["max_workers"])
    node = spot["node_config"]
    assert (
        {"preemptible": True} in node["scheduling"]
        if cloud == "gcp"
        else (node["InstanceMarketOptions"] == {"MarketType": "spot"})
    )
    assert not {"InstanceMarketOptions", "scheduling"} & set(head["node_config"])
    assert config["metadata"]["shared"] in config["initialization_commands"]
    assert config["docker"]["image"] == config["metadata"]["image"]
    if cloud == "gcp":
        assert config["provider"]["project_id"] == config["metadata"]["project"]
    config["docker"]["imagee"] = "x"
    with pytest.raises(Exception, match="'imagee' was unexpected"):
        pytest.importorskip("ray.autoscaler._private.util").validate_config(config)


# ------------------------------------------------------------------------------------------- schemas, strict in names

TEXT, NUMBER, YES = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}


def record(required: str = "", /, **fields: Any) -> dict[str, Any]:
    """An object with these fields and no other ones."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def many(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


def mapping(value: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": value}


AMOUNTS = mapping({"type": "string", "pattern": r"^[0-9]+(Mi|Gi)?$"})
# Kubernetes' pods and KubeRay's ray.io/v1, as far as they are used here
FROM_SECRET = record("secretKeyRef", secretKeyRef=record("name key", name=TEXT, key=TEXT))
CONTAINER = record(
    "name image resources volumeMounts",
    name=TEXT,
    image=TEXT,
    ports=many(record("containerPort name", containerPort=NUMBER, name=TEXT)),
    env=many(record("name", name=TEXT, value=TEXT, valueFrom=FROM_SECRET)),
    resources=record("requests limits", requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=many(record("name mountPath", name=TEXT, mountPath=TEXT)),
)
CLAIMED = record("claimName", claimName=TEXT)
POD = record(
    "containers volumes",
    terminationGracePeriodSeconds=NUMBER,
    nodeSelector=mapping(TEXT),
    tolerations=many(record("key operator effect", key=TEXT, operator=TEXT, value=TEXT, effect=TEXT)),
    securityContext=record("fsGroup", fsGroup=NUMBER),
    containers=many(CONTAINER),
    volumes=many(record("name", name=TEXT, persistentVolumeClaim=CLAIMED)),
)
TEMPLATE = record("spec", spec=POD)
START = mapping(TEXT)
WORKERS = record(
    "groupName replicas minReplicas maxReplicas rayStartParams template",
    **{"groupName": TEXT, "replicas": NUMBER, "minReplicas": NUMBER, "maxReplicas": NUMBER},
    rayStartParams=START,
    template=TEMPLATE,
)
RAY_CLUSTER = record(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    enableInTreeAutoscaling=YES,
    autoscalerOptions=record(idleTimeoutSeconds=NUMBER),
    authOptions=record("mode", mode={"enum": ["disabled", "token"]}),
    headGroupSpec=record("rayStartParams template", rayStartParams=START, template=TEMPLATE),
    workerGroupSpecs=many(WORKERS),
)
RAY_JOB = record(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    backoffLimit=NUMBER,
    shutdownAfterJobFinishes=YES,
    ttlSecondsAfterFinished=NUMBER,
    rayClusterSpec=RAY_CLUSTER,
)
CLAIM = record("accessModes resources", accessModes=many(TEXT), resources=record("requests", requests=mapping(TEXT)))
KINDS = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB, "PersistentVolumeClaim": CLAIM}
VERSIONS = {"RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "PersistentVolumeClaim": "v1"}


def check(document: Any, schema: dict[str, Any]) -> None:
    pytest.importorskip("jsonschema").validate(document, schema)


def kubernetes(name: str) -> dict[str, Any]:
    """{kind: spec} of a file, each checked."""
    found = {}
    for document in yaml.safe_load_all((FOLDER / name).read_text()):
        kind = document["kind"]
        fields = {"apiVersion": {"const": VERSIONS[kind]}, "kind": TEXT, "metadata": record("name", name=TEXT)}
        check(document, record("apiVersion kind metadata spec", **fields, spec=KINDS[kind]))
        found[kind] = document["spec"] | {"_name": document["metadata"]["name"]}
    return found


@pytest.mark.parametrize("name", ["kuberay.yaml", "kuberay-job.yaml"])
def test_kubernetes_takes_the_file(name: str) -> None:
    found = kubernetes(name)
    cluster = found["RayCluster"] if name == "kuberay.yaml" else found["RayJob"]["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"]
    assert workers["minReplicas"] == 0 < workers["maxReplicas"]
    pods = [group["template"]["spec"] for group in (head, workers)]
    for pod in pods:
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == found["PersistentVolumeClaim"]["_name"]
        (container,) = pod["containers"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/shared"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    spot = pods[1]
    env = {entry["name"]: entry.get("value") for entry in spot["containers"][0]["env"]}
    assert 30 < int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < spot["terminationGracePeriodSeconds"]
    assert any("spot" in key for key in spot["nodeSelector"])


def test_every_kubernetes_pod_has_the_token() -> None:
    cluster = kubernetes("kuberay.yaml")["RayCluster"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        env = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert "value" not in env["RAY_AUTH_TOKEN"]  # a reference, never the token itself
        assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "bootvit-ray-token"
    assert kubernetes("kuberay-job.yaml")["RayJob"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def commands(name: str) -> list[list[str]]:
    """What follows `bootvit submit --` and the like in a file: commands of ours that somebody will type."""
    text = re.sub(r"\\\n#?\s*", "", (FOLDER / name).read_text())
    found = re.findall(
        r"(?:bootvit submit --|python -m bootvit) ((?:train|sweep) .*)", re.sub(r"\n    ray\.", " ray.", text)
    )
    return [shlex.split(line.split("#")[0]) for line in found]


@pytest.mark.parametrize(
    "name", ["ray-cluster.yaml", "ray-aws.yaml", "ray-gcp.yaml", "kuberay.yaml", "kuberay-job.yaml", "compose.yaml"]
)
def test_the_command_that_a_file_shows_is_one(name: str) -> None:
    (words,) = commands(name)
    command = check_command(words, {})
    assert command.workers is not None
    if "--resume" in words:  # a long run on machines that are taken away
        assert next(int(word.split("=")[1]) for word in words if word.startswith("ray.max_failures=")) > 0


# -------------------------------------------------------------------------------------------- the image and compose

SECRET_OR_NAME = {"type": "string", "pattern": r"^(\$\{[A-Z0-9_]+(:\?[^}]+)?\}|[A-Za-z0-9_./:-]+)$"}
HEALTH = record("test interval retries", test=many(TEXT), interval=TEXT, retries=NUMBER)
SERVICE = record(
    "image restart",
    image={"type": "string", "pattern": r"^[a-z0-9./-]+:[a-z0-9.-]+$"},
    build=record("context dockerfile", context=TEXT, dockerfile=TEXT),
    entrypoint=many(TEXT),
    command=many(TEXT),
    environment=mapping(SECRET_OR_NAME),
    ports=many({"type": "string", "pattern": r"^\d+:\d+$"}),
    volumes=many({"type": "string", "pattern": r"^[a-z]+:/"}),
    depends_on=mapping(record("condition", condition={"enum": ["service_healthy", "service_started"]})),
    healthcheck=HEALTH,
    restart={"const": "unless-stopped"},
)
COMPOSE = record("name services volumes", name=TEXT, services=mapping(SERVICE), volumes=mapping({"type": "null"}))


def test_compose_takes_the_file_and_no_secret_is_in_it() -> None:
    document = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    check(document, COMPOSE)
    services = document["services"]
    for service in services.values():
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(document["volumes"])
        for name, condition in service.get("depends_on", {}).items():
            assert condition["condition"] != "service_healthy" or "healthcheck" in services[name]
        for key, value in service["environment"].items():
            if re.search("PASSWORD|SECRET", key):
                assert value.startswith("${"), key
    mlflow = services["mlflow"]
    assert (FOLDER / mlflow["build"]["context"] / mlflow["build"]["dockerfile"]).is_file()
    given = {name: service["environment"] for name, service in services.items()}
    assert variable(given["mlflow"]["PGPASSWORD"]) == variable(given["database"]["POSTGRES_PASSWORD"])
    assert variable(given["mlflow"]["AWS_SECRET_ACCESS_KEY"]) == variable(given["store"]["AWS_SECRET_ACCESS_KEY"])
    assert given["mlflow"]["AWS_ACCESS_KEY_ID"] == given["store"]["AWS_ACCESS_KEY_ID"]
    assert f"--artifacts-destination=s3://{services['store']['environment']['S3_BUCKET']}" in mlflow["command"]


def variable(text: str) -> str:
    """The environment variable that a value is taken from."""
    return re.split(r"[:}]", text.removeprefix("${"))[0]


def test_mlflow_knows_the_options_of_compose() -> None:
    cli = pytest.importorskip("mlflow.cli")
    known = {option for parameter in cli.server.params for option in parameter.opts}
    command = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["mlflow"]["command"]
    assert command[:2] == ["mlflow", "server"]
    assert {word.split("=")[0] for word in command[2:]} <= known


def test_the_image_is_made_of_what_is_here() -> None:
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    steps = [tuple(line.split(maxsplit=1)) for line in lines]
    assert [step[0] for step in steps[:2]] == ["ARG", "FROM"]
    assert {name for name, _ in steps} == {"ARG", "FROM", "WORKDIR", "COPY", "RUN"}
    pinned = dict(line.split("==") for line in (FOLDER.parent / "constraints.txt").read_text().splitlines())
    assert steps[0][1].startswith(f"RAY=rayproject/ray:{pinned['ray']}-py3")
    copied = [word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]]
    assert all((FOLDER.parent / word).exists() for word in copied)
    assert {"bootvit", "tune", "cluster", "configs", "pyproject.toml"} <= set(copied)
    let_in = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in let_in if line.startswith("!")} == set(copied)
    (run,) = [rest for name, rest in steps if name == "RUN"]
    assert all("==" in word for word in shlex.split(run.split('"')[-1]))
    extras = re.search(r"\.\[(.*)\]", run)
    assert extras is not None
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


FILES = sorted(
    path.name for path in FOLDER.iterdir() if path.suffix in (".yaml", ".sbatch") or path.name == "Dockerfile"
)


@pytest.mark.parametrize("file", FILES)
def test_a_file_says_at_its_top_what_to_change(file: str) -> None:
    lines = (FOLDER / file).read_text().splitlines()
    top = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert any("To change: " in line or "to change: " in line for line in top)


# ------------------------------------------------------------------------------------------------------------- Slurm


def test_the_slurm_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sbatch")], check=True)


@pytest.mark.cluster
def test_the_slurm_script_brings_up_two_nodes_and_ends_as_its_command(tmp_path: Path) -> None:
    """Slurm's commands are played by scripts that run everything here; the nodes and the token are real."""
    played = tmp_path / "bin"
    played.mkdir()
    skip_options = 'while [[ $1 == --* ]]; do shift; done; echo "$*" >> "$HOME/calls"; exec "$@"'
    for name, body in (("srun", skip_options), ("scontrol", "printf 'n1\\nn2\\n'")):
        write_script(played / name, body)
    job = str(secrets.randbelow(4000))
    env = {
        "HOME": str(tmp_path),
        "PATH": os.pathsep.join([str(played), str(Path(sys.executable).parent), os.environ["PATH"]]),
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


STUB = """
import os, signal, sys, time
words = sys.argv[1:]
with open(os.environ["HOME"] + "/calls", "a") as calls:
    print(*words, file=calls)
if words[:2] == ["-m", "bootvit"]:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    print("training", flush=True)
    time.sleep(60)
"""  # in place of python: only the run takes time, and stops as it does


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_slurm_job_whose_time_is_over_stops_and_queues_again(
    sent: signal.Signals, requeued: bool, tmp_path: Path
) -> None:
    """Nothing here is Slurm's or Ray's; the script is the one that is shipped."""
    played = tmp_path / "bin"
    played.mkdir()
    write_script(played / "python", f"exec {sys.executable} -c '{STUB.replace(chr(39), chr(34))}' \"$@\"")
    write_script(
        played / "srun", 'echo "srun $*" >> "$HOME/calls"; [[ $* == *hostname* ]] && echo 10.0.0.1 || exec sleep 60'
    )
    write_script(played / "scontrol", 'echo "scontrol $*" >> "$HOME/calls"; printf "n1\\nn2\\n"')
    env = {
        **{"HOME": str(tmp_path), "PATH": f"{played}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "6"},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_RESTART_COUNT": "1"},
    }
    command = ["bash", str(FOLDER / "slurm.sbatch"), "train", "digits/joint"]
    process = subprocess.Popen(command, env=env, cwd=FOLDER.parent, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    time.sleep(0.2)  # the signal may not come between the driver's start and the trap
    process.send_signal(sent)
    assert process.wait(timeout=30) == 130
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "-m bootvit train digits/joint --resume" in calls, "it goes on, because Slurm has started it again"
    assert ("scontrol requeue 7" in calls) is requeued
    starts = [line for line in calls if "ray start" in line]
    assert len(starts) == 2
    assert all("--cpus-per-task=6 " in line and "--num-cpus=6 " in line for line in starts)
    assert not list(tmp_path.glob(".bootvit-ray-token*"))


def write_script(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
