"""Several nodes on one machine: they are what they claim to be, what happens to them, and what they leave behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bootvit.errors import RunFailed
from cluster.local import LocalCluster, free_ports, has_namespaces, in_namespaces, main, processes_of, run

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4", "PYTHONPATH": str(ROOT)}
WHERE = """
import os, ray
ray.init(log_to_driver=False, logging_level="ERROR")
group = ray.util.placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
def where():
    return ray.util.get_node_ip_address(), os.path.exists("/proc/DRIVER/stat"), os.path.exists("FILE")
task = ray.remote(where)
at = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
print(sorted(ray.get([task.options(scheduling_strategy=at(group, i)).remote() for i in range(2)], timeout=100)))
"""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--nodes", "0"], "argument --nodes: '0': expected a whole number of at least 1"),
        (["--nodes", "two"], "argument --nodes: 'two': expected a whole number of at least 1"),
        (["--cpus-per-node", "-1"], "argument --cpus-per-node: '-1': expected a whole number of at least 0"),
        (["--cpus-per-node", "1.5"], "argument --cpus-per-node: '1.5': expected a whole number of at least 0"),
        (["--cpus", "1", "x"], "unrecognized arguments: x"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"bootvit: error: cluster.local: {line}\n"


def test_a_node_that_does_not_come_up_is_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [sys.executable, "-c", "raise SystemExit('first\\nthe reason')"]
    monkeypatch.setattr(LocalCluster, "_ray", lambda self, what, name, cpus: words)
    before = left_behind()
    assert main([]) == 1
    assert capsys.readouterr().err == "bootvit: failed: head did not come up: first / the reason\n"
    assert left_behind() == before


def left_behind() -> set[str]:
    """Network interfaces, namespaces and folders that may be a cluster's."""
    namespaces = Path("/run/netns")
    names = [*Path("/sys/class/net").iterdir(), *(namespaces.iterdir() if namespaces.is_dir() else [])]
    return {str(path) for path in [*names, *Path(tempfile.gettempdir()).glob("bv*")]}


def test_ports_are_outside_of_those_of_rays_workers() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    assert all(20000 <= port < 32000 for port in ports)


def test_a_systems_command_that_fails_is_told_with_its_reason() -> None:
    with pytest.raises(RunFailed, match=r"^ls /no-such-folder: .*No such file"):
        run("ls", "/no-such-folder")


def test_a_hidden_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "it's $HOME; here"
    words = in_namespaces("net", ["ray", "a b"], [folder])
    script = words[words.index("-c") + 1].replace("mount", "echo")
    done = subprocess.run(["sh", "-c", script, "sh", "echo", "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == f"-t tmpfs none {folder}\na b\n"


def test_processes_that_run_in_a_folder_are_found(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"], cwd=tmp_path)
    try:
        assert process.pid in processes_of(tmp_path)
    finally:
        process.kill()
        process.wait()
    assert processes_of(tmp_path) == []


# ------------------------------------------------------------------------------------------------- with a real Ray


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    if not has_namespaces():
        pytest.skip("takes root and iproute2")
    with LocalCluster(1, env=QUICK) as made:
        yield made


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def driver(address: str, file: Path) -> subprocess.CompletedProcess[str]:
    script = f"DRIVER = {os.getpid()}\n{WHERE}".replace("DRIVER/", f"{os.getpid()}/").replace("FILE", str(file))
    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script], env=env, text=True, capture_output=True, timeout=200, check=False
    )


@pytest.mark.cluster
def test_a_node_is_a_machine_of_its_own_that_may_be_cut_off_drained_and_killed(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    other = cluster.add_node(hide=[tmp_path])
    done = driver(cluster.address, tmp_path / "file")
    ip = cluster.ip
    assert done.stdout == f"{[(ip, True, True), (ip.removesuffix('1') + '2', False, False)]}\n", done.stderr

    cluster.cut(other)
    until(lambda: cluster.alive() == {"head"})
    assert other.process.poll() is None, "it goes on, but nobody hears of it"
    cluster.kill_node(other)

    third = cluster.add_node()
    cluster.cut(third)
    cluster.mend(third)
    cluster.drain_node(third, 60)
    cluster.kill_node(third)
    assert not processes_of(third.folder)
    until(lambda: cluster.alive() == {"head"})


@pytest.mark.cluster
def test_a_head_that_is_started_again_finds_its_nodes(cluster: LocalCluster, tmp_path: Path) -> None:
    other = cluster.add_node()
    node_id = cluster.node_id(other)
    cluster.kill_head()
    assert cluster.alive() == set()
    cluster.restart_head()
    until(lambda: cluster.alive() == {cluster.head.name, other.name})
    assert cluster.node_id(other) == node_id, "the same raylet"
    assert driver(cluster.address, tmp_path).returncode == 0


@pytest.mark.cluster
def test_where_there_are_no_namespaces_the_nodes_share_an_address(tmp_path: Path) -> None:
    before = left_behind()
    with LocalCluster(2, isolated=False, env=QUICK) as made:
        assert len(made.alive()) == 2
        done = driver(made.address, tmp_path)
        assert done.stdout == f"{[(made.ip, True, True)] * 2}\n", done.stderr
        with pytest.raises(RuntimeError, match="no network of its own"):
            made.cut(made.nodes[1])
        with pytest.raises(RuntimeError, match="to hide a folder"):
            made.add_node(hide=[tmp_path])
        made.kill_node(made.nodes[1])
        until(lambda: made.alive() == {"head"})
    assert left_behind() <= before


@pytest.mark.cluster
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_what_to_type_and_leaves_nothing(sent: signal.Signals) -> None:
    command = [sys.executable, "-m", "cluster.local", "--nodes", "2", "--cpus-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    head, token, train, job = (process.stdout.readline() for _ in range(4))
    folders = [path for path in Path(tempfile.gettempdir()).glob("bv*") if process.pid in parents(path)]
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert head.startswith("2 nodes of 2 CPUs, ")
    assert token == f"export RAY_AUTH_MODE={os.environ.get('RAY_AUTH_MODE', 'token')}\n"
    assert re.match(r"RAY_ADDRESS=[0-9.]+:\d+ bootvit train digits/joint ray\.num_workers=4\n", train)
    assert re.match(r"bootvit submit --address http://[0-9.]+:\d+ -- train digits/joint ", job)
    assert len(folders) == 1
    assert not folders[0].exists()
    assert not processes_of(folders[0])
    if has_namespaces():
        subnet = train.split("=")[1].rsplit(".", 1)[0]
        assert f"{subnet}." not in subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
        bridges = {name.split(".")[0] for name in os.listdir("/run/netns") if name.startswith("bv")}
        assert bridges <= set(os.listdir("/sys/class/net")), "a namespace without its cluster"


def parents(folder: Path) -> set[int]:
    """The parents of the processes that name a folder."""
    found = set()
    for pid in processes_of(folder):
        try:
            found.add(int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]))
        except OSError:
            continue  # it has just ended
    return found
