"""What a run on several nodes survives: each fault in turn, and at the end a table of what it cost.

Two workers train on two nodes beside a head without CPUs; another node joins where one is lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cluster_processes import processes

from bootvit import checkpoint
from bootvit.errors import UserError
from bootvit.tracking import read_journal
from cluster.local import LocalCluster, Node, has_namespaces

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, STEPS = 100, 4  # an epoch
TRAIN = [
    *("train", "digits/vit", f"schedule.epochs={EPOCHS}", "schedule.eval_every=20", "data.fraction=0.1"),
    *("data.batch_size=32", "model.vit.width=18", "model.vit.depth=2", "model.vit.mlp_width=24"),
    *("model.vit.dropout=0.1", "tracking.enabled=false", "tracking.log_every=2"),
    *("checkpoint.every_steps=3", "ray.num_workers=2", "ray.max_failures=3", "ray.collective_timeout=60"),
]
QUICK = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


class Row(NamedTuple):
    """One line of the table."""

    fault: str
    repeated: int  # steps that were told in the journal and taken again
    seconds: float  # beyond those of the undisturbed run
    starts: int  # of the worker group
    difference: float  # the largest between its final weights and the undisturbed run's


class Cluster(NamedTuple):
    """What a fault acts on."""

    local: LocalCluster
    nodes: list[Node]
    driver: subprocess.Popen[str]


def start(cluster: LocalCluster, storage: Path, name: str, *more: str) -> subprocess.Popen[str]:
    words = [*TRAIN, f"name={name}", f"ray.storage_path={storage}", *more]
    env = {**os.environ, **QUICK, "RAY_ADDRESS": cluster.address}
    return subprocess.Popen(
        [sys.executable, "-m", "bootvit", *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def told(run: Path) -> int:
    """The last step in the journal."""
    try:
        return max((record.step for record in read_journal(run / "metrics.jsonl")[0]), default=0)
    except UserError:  # looked at while it was replaced
        return 0


def newest(run: Path) -> int:
    return max((saved.step for saved in checkpoint.described(run / "checkpoints")), default=0)


def weights(run: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    assert (saved.final, saved.step) == (True, EPOCHS * STEPS)
    return dict(checkpoint.load(saved)["learner"]["networks"])


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[str], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.05)


# ----------------------------------------------------------------------------------------------------- faults


def kill_worker(cluster: Cluster) -> None:
    os.kill(workers(cluster)[-1], signal.SIGKILL)


def halt_worker(cluster: Cluster) -> None:
    """It is there and answers nothing: the other one waits in a collective."""
    os.kill(workers(cluster)[-1], signal.SIGSTOP)


def workers(cluster: Cluster) -> list[int]:
    """The processes that train."""
    pids = processes("ray::RayTrainWorker", cluster.local)
    assert len(pids) == 2, pids
    return pids


def kill_node(cluster: Cluster) -> None:
    cluster.local.kill_node(cluster.nodes[-1])
    cluster.local.add_node()


def lose_node(cluster: Cluster) -> None:
    cluster.local.kill_node(cluster.nodes[-1])


def drain_node(cluster: Cluster) -> None:
    cluster.local.drain_node(cluster.nodes[-1], 5)
    time.sleep(5)
    kill_node(cluster)


def cut_network(cluster: Cluster) -> None:
    cluster.local.cut(cluster.nodes[-1])
    time.sleep(20)
    cluster.local.mend(cluster.nodes[-1])


def kill_driver(cluster: Cluster) -> None:
    cluster.driver.kill()


def kill_head(cluster: Cluster) -> None:
    cluster.local.kill_head()
    time.sleep(2)
    cluster.local.restart_head()


ELASTIC = "node killed, one worker goes on"
FAULTS: dict[str, Callable[[Cluster], None]] = {
    "worker killed": kill_worker,
    "worker halted in a collective": halt_worker,
    "node killed, another joins": kill_node,
    ELASTIC: lose_node,
    "node drained, then gone": drain_node,
    "network of a node cut for 20 s": cut_network,
    "driver killed, --resume": kill_driver,
    "head killed and restarted, --resume": kill_head,
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    if not has_namespaces():
        pytest.skip("takes root and iproute2")
    with LocalCluster(3, head_cpus=0, env=QUICK) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(storage: Path) -> tuple[dict[str, torch.Tensor], float]:
    """(weights, seconds) of the same run that nothing happens to."""
    if not has_namespaces():
        pytest.skip("takes root and iproute2")
    with LocalCluster(3, head_cpus=0, env=QUICK) as cluster:
        began = time.monotonic()
        driver = start(cluster, storage, "undisturbed")
        out, err = driver.communicate(timeout=400)
        assert driver.returncode == 0, out + err
        return weights(storage / "undisturbed"), time.monotonic() - began


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_run_survives(
    fault: str,
    cluster: LocalCluster,
    storage: Path,
    undisturbed: tuple[dict[str, torch.Tensor], float],
    record_property: Callable[[str, object], None],
) -> None:
    name = fault.replace(",", "").replace(" ", "-")
    run = storage / name
    began = time.monotonic()
    driver = start(cluster, storage, name, *(["ray.num_workers=[1,2]"] if fault == ELASTIC else []))
    wait_for(lambda: told(run) >= 40, driver)
    FAULTS[fault](Cluster(cluster, [node for node in cluster.nodes if node is not cluster.head], driver))
    before, kept = told(run), newest(run)
    assert before < EPOCHS * STEPS, "it came after the end"
    if "--resume" in fault:
        driver.communicate(timeout=200)
        kept = newest(run)
        driver = start(cluster, storage, name, "--resume")
    out, err = driver.communicate(timeout=500)
    assert driver.returncode == 0, out + err
    seconds = time.monotonic() - began - undisturbed[1]
    found = weights(run)
    difference = max(float((found[key] - value).abs().max()) for key, value in undisturbed[0].items())
    starts = len(list((run / "logs").glob("attempt-*")))
    places = [(record.step, record.name) for record in read_journal(run / "metrics.jsonl")[0]]
    assert len(places) == len(set(places)), "a step is twice in the journal"
    record_property("fault", Row(fault, max(0, before - kept), seconds, starts, difference))
    if fault != ELASTIC:  # other workers draw other dropout masks
        assert difference == 0.0
