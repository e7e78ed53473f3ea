"""A cluster of several real nodes on one machine, to try and to test what a cluster does: `python -m cluster.local`.

The head runs in the machine's own network, so that drivers and jobs reach it as they would anywhere. Where root and
iproute2 are there, every other node is nearly a machine of its own: a network, process and mount namespace, joined to
the head by a bridge, so that its network can be cut, and folders hidden from it. Elsewhere all nodes share one address.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from bootvit.errors import RunFailed, UserError

START_S = 120.0  # for a node to be alive; seconds, on a busy machine
END_S = 10.0  # for a node that was told to end, before it is killed
OBJECT_STORE = 200 * 2**20  # bytes a node; bootvit puts little there
EMPTY: Mapping[str, str] = {}
PORTS = range(20000, 32000)  # below are those that Ray gives to its workers, above the system's own


@dataclass(frozen=True, eq=False)
class Node:
    """One node: `ray start --block` and all that it starts."""

    name: str
    process: subprocess.Popen[bytes]
    folder: Path  # Ray's files, its logs among them
    link: str | None = None  # the bridge's end of its cable; None: not in a namespace of its own


class LocalCluster:
    """Several nodes; a context manager that leaves no process, namespace, link or folder behind.

    `env` is added to every node's environment, and so to that of the workers. Raises `RunFailed` for a node that does
    not come up.
    """

    def __init__(
        self,
        nodes: int = 1,
        cpus: int = 1,
        *,
        head_cpus: int | None = None,
        dashboard: bool = False,
        env: Mapping[str, str] | None = None,
        isolated: bool | None = None,
    ) -> None:
        self._id = secrets.token_hex(3)
        use_token()
        self._env = {**os.environ, **(env or {})}
        self._env.pop("RAY_ADDRESS", None)
        self._cpus, self._dashboard = cpus, dashboard
        self._head_cpus = cpus if head_cpus is None else head_cpus
        self.isolated = has_namespaces() if isolated is None else isolated
        self._folder = Path(tempfile.mkdtemp(prefix="bv"))  # short: the paths of sockets begin with it
        self._folder.chmod(0o755)
        self._count = 0
        self._port, self._dashboard_port, self._agent_port = free_ports(3)
        self._bridge = f"bv{self._id}" if self.isolated else None  # also the name of every node's end of its cable
        self.nodes: list[Node] = []
        try:
            self._subnet = self._lay_bridge(self._bridge) if self._bridge else None
            self.head = self._start_head()
            for node in [self.add_node(wait=False) for _ in range(nodes - 1)]:
                self._wait_for(node)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------- addresses

    @property
    def ip(self) -> str:
        """The head's."""
        return f"{self._subnet}.1" if self._subnet else own_ip()

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return f"{self.ip}:{self._port}"

    @property
    def dashboard(self) -> str:
        """For `bootvit submit --address`."""
        return f"http://{self.ip}:{self._dashboard_port}"

    def node_id(self, node: Node) -> str:
        """Ray's id of a node, in hexadecimal; `KeyError` for one that is not alive."""
        return self._alive()[node.name]

    def alive(self) -> set[str]:
        """The names of the nodes that Ray takes for alive; none where there is no head."""
        return set(self._alive())

    # ----------------------------------------------------------------------------------- what may happen to it

    def add_node(self, cpus: int | None = None, *, hide: Sequence[Path] = (), wait: bool = True) -> Node:
        """Another node. In place of the folders `hide` it sees empty ones of its own (with namespaces only)."""
        self._count += 1
        name = f"node-{self._count}"
        words = self._ray(f"--address={self.address}", name, self._cpus if cpus is None else cpus)
        if self._bridge is None:
            if hide:
                raise RuntimeError("to hide a folder from a node takes namespaces: root and iproute2")
            node = self._start(name, words)
        else:
            link, address = f"{self._bridge}.{self._count}", f"{self._subnet}.{self._count}"
            self._lay_cable(self._bridge, link, address)
            words = in_namespaces(link, [*words, f"--node-ip-address={address}"], hide)
            node = self._start(name, words, link)
        if wait:
            self._wait_for(node)
        return node

    def kill_node(self, node: Node) -> None:
        """It is gone at once, with all of its processes, as if its power had failed."""
        self.nodes.remove(node)
        node.process.kill()
        self._clear(node)

    def drain_node(self, node: Node, seconds: float) -> None:
        """A spot notice: Ray is told that the node will be gone after so many seconds; nothing else happens to it."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        taken, why = GcsClient(address=self.address).drain_node(self.node_id(node), reason, "spot", deadline)
        if not taken:
            raise RuntimeError(f"{node.name} could not be drained: {why}")

    def cut(self, node: Node) -> None:
        """Its processes go on, but nothing gets from it or to it."""
        self._set_link(node, "down")

    def mend(self, node: Node) -> None:
        """Its network is as before."""
        self._set_link(node, "up")

    def kill_head(self) -> None:
        """The head is gone at once; the other nodes look for it for a minute, and then end."""
        self.kill_node(self.head)

    def restart_head(self) -> None:
        """A head at the same address, which finds in its store what the killed one knew; the other nodes go on."""
        self.head = self._start_head()

    def close(self) -> None:
        """End everything; a second call does nothing."""
        for node in self.nodes:
            node.process.kill()
        for node in list(self.nodes):
            self.kill_node(node)
        if self._bridge:
            for left in Path("/run/netns").glob(f"{self._bridge}.*"):  # of a node that could not be begun
                unplug(left.name)
            if has_link(self._bridge):
                run("ip", "link", "delete", self._bridge)
        shutil.rmtree(self._folder, ignore_errors=True)

    # ----------------------------------------------------------------------------------------- how it is done

    def _start_head(self) -> Node:
        self._count += 1
        name = "head" if self._count == 1 else f"head-{self._count}"  # another one, for Ray
        words = [
            *self._ray("--head", name, self._head_cpus),
            f"--port={self._port}",
            f"--include-dashboard={self._dashboard}",
            f"--dashboard-port={self._dashboard_port}",
            f"--dashboard-host={self.ip}",
            f"--dashboard-agent-listen-port={self._agent_port}",
            f"--node-ip-address={self.ip}",
        ]
        store = self._folder / "store"
        store.mkdir(exist_ok=True)
        head = self._start(name, words, env={"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(store)})
        self._wait_for(head)
        return head

    def _ray(self, what: str, name: str, cpus: int) -> list[str]:
        return [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", what, "--block", "--disable-usage-stats"),
            *(f"--node-name={name}", f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE}"),
            f"--temp-dir={self._folder / name}",
        ]

    def _start(self, name: str, words: Sequence[str], link: str | None = None, env: Mapping[str, str] = EMPTY) -> Node:
        env = {**self._env, **({"GLOO_SOCKET_IFNAME": self._bridge} if self._bridge else {}), **env}
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.nodes.append(Node(name, process, self._folder / name, link))
        return self.nodes[-1]

    def _wait_for(self, node: Node) -> None:
        until = time.monotonic() + START_S
        while node.name not in self._alive():
            if node.process.poll() is not None or time.monotonic() > until:
                log = (self._folder / f"{node.name}.log").read_text(errors="replace").strip().splitlines()
                raise RunFailed(f"{node.name} did not come up: {' / '.join(log[-3:]) or 'it said nothing'}")
            time.sleep(0.2)

    def _alive(self) -> dict[str, str]:
        """{name: Ray's id} of the nodes that are alive."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.gcs_pb2 import GcsNodeInfo
        from ray.exceptions import RpcError

        if not answers(self.ip, self._port):
            return {}
        try:
            found = GcsClient(address=self.address).get_all_node_info(timeout=5)
        except (RpcError, RuntimeError):  # it has only just come up, or has gone
            return {}
        alive = GcsNodeInfo.GcsNodeState.Value("ALIVE")
        return {info.node_name: node_id.hex() for node_id, info in found.items() if info.state == alive}

    def _lay_bridge(self, bridge: str) -> str:
        subnet = free_subnet()
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "address", "add", f"{subnet}.1/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        return subnet

    def _lay_cable(self, bridge: str, link: str, address: str) -> None:
        run("ip", "netns", "add", link)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", bridge, "netns", link)
        run("ip", "link", "set", link, "master", bridge, "up")
        for words in (f"link set lo up; address add {address}/24 dev {bridge}; link set {bridge} up").split("; "):
            run("ip", "-n", link, *words.split())

    def _set_link(self, node: Node, state: str) -> None:
        if node.link is None:
            raise RuntimeError(f"{node.name} has no network of its own, which takes root and iproute2")
        run("ip", "link", "set", node.link, state)

    def _clear(self, node: Node) -> None:
        """What is left of a node whose first process has been killed."""
        node.process.wait()
        for pid in processes_of(node.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + END_S
        while processes_of(node.folder) and time.monotonic() < until:
            time.sleep(0.05)
        if node.link is not None:
            unplug(node.link)
        shutil.rmtree(node.folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ this machine


def use_token() -> None:
    """As Ray does for a local Ray: where RAY_AUTH_MODE is not set, nodes want the token in `~/.ray`, which it makes."""
    from ray._private.authentication import authentication_token_setup as setup

    with quiet(setup.__name__):
        setup.enable_token_auth_by_default()
        setup.ensure_token_if_auth_enabled()


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """A logger says nothing meanwhile."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def has_namespaces() -> bool:
    """Whether nodes may be given namespaces of their own here: root, not in a container that forbids it, iproute2."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "bv", "type", "bridge"],
        capture_output=True,
        check=False,
    )
    return tried.returncode == 0


def in_namespaces(network: str, words: Sequence[str], hide: Sequence[Path]) -> list[str]:
    """A command in a network namespace and in process and mount namespaces of its own, which end with it."""
    mounts = "".join(f"mount -t tmpfs none {shlex.quote(str(folder))} && " for folder in hide)
    return [
        *("ip", "netns", "exec", network, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *("sh", "-c", f'{mounts}exec "$@"', "sh", *words),
    ]


def run(*words: str) -> None:
    """A command of the system's; `RunFailed` with what it said if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunFailed(f"{shlex.join(words)}: {done.stderr.strip() or f'status {done.returncode}'}")


def unplug(link: str) -> None:
    """Remove a cable with both of its ends, then the namespace of the same name: it would take its end along later."""
    if has_link(link):
        run("ip", "link", "delete", link)
    run("ip", "netns", "delete", link)


def has_link(name: str) -> bool:
    """Whether the machine has such a network interface."""
    return (Path("/sys/class/net") / name).exists()


def own_ip() -> str:
    """The address by which Ray calls this machine."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


def free_subnet() -> str:
    """The first three numbers of a private network that this machine has no route to."""
    routes = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True).stdout
    while True:
        subnet = f"10.{secrets.choice(range(64, 128))}.{secrets.choice(range(256))}"
        if f"{subnet}." not in routes:
            return subnet


def free_ports(count: int) -> list[int]:
    """Free ports outside of those that Ray gives to its workers."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = secrets.choice(PORTS)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("", port)))
                ports.append(port)
    return ports


def answers(ip: str, port: int) -> bool:
    """Whether something listens there; Ray's own client would wait for long."""
    try:
        with socket.create_connection((ip, port), timeout=1):
            return True
    except OSError:
        return False


def processes_of(folder: Path) -> list[int]:
    """The processes that name the folder on their command line, or that run in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            named = os.fsencode(folder) in (entry / "cmdline").read_bytes()
            inside = (entry / "cwd").readlink().is_relative_to(folder)
        except OSError:
            continue  # it has ended meanwhile, or is not ours
        if (named or inside) and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


# ---------------------------------------------------------------------------------------------- on the command line


class Parser(argparse.ArgumentParser):
    """A mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"cluster.local: {message}")


def number(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least so many."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
        return int(text)

    return read


def main(argv: Sequence[str] | None = None) -> int:
    """Start a cluster, say how it is used, and keep it until Ctrl-C or SIGTERM."""
    parser = Parser(prog="python -m cluster.local", description="Several Ray nodes on this machine, until Ctrl-C.")
    parser.add_argument("--nodes", type=number(1), default=3, metavar="N", help="with the head; default: 3")
    parser.add_argument("--cpus-per-node", type=number(0), default=1, metavar="N", help="default: 1")
    for sent in (signal.SIGINT, signal.SIGTERM):  # a shell lets its background jobs ignore the first
        signal.signal(sent, signal.default_int_handler)
    try:
        options = parser.parse_args(argv)
        if find_spec("ray") is None:
            raise UserError("Ray is not installed: pip install 'bootvit[ray]'")
        with LocalCluster(options.nodes, options.cpus_per_node, dashboard=True) as cluster:
            print(usage(cluster, options.nodes, options.cpus_per_node), flush=True)
            watch(cluster)
    except UserError as err:
        print(f"bootvit: error: {err}", file=sys.stderr)
        return 2
    except RunFailed as err:
        print(f"bootvit: failed: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def usage(cluster: LocalCluster, nodes: int, cpus: int) -> str:
    """What to type next."""
    kind = "each with a network of its own" if cluster.isolated else "all at one address"
    return (
        f"{nodes} nodes of {cpus} CPUs, {kind}; Ctrl-C ends them. In another terminal:\n"
        f"export RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}\n"
        f"RAY_ADDRESS={cluster.address} bootvit train digits/joint ray.num_workers={nodes * cpus}\n"
        f"bootvit submit --address {cluster.dashboard} -- "
        "train digits/joint ray.storage_path=/FOLDER tracking.uri=sqlite:////FOLDER/mlflow.db"
    )


def watch(cluster: LocalCluster) -> NoReturn:
    """Wait for the end of a node, which nobody asked for: `RunFailed`."""
    while True:
        for node in cluster.nodes:
            if node.process.poll() is not None:
                raise RunFailed(f"{node.name} has ended by itself (status {node.process.returncode})")
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
