"""`bootvit doctor`: whether this machine can train, and what a config names can be reached; what to type where not.

Each check has a bounded time, runs whatever the others find, and takes nothing away: what it writes it removes.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from packaging.requirements import Requirement
from packaging.version import Version

from bootvit.addresses import public, public_address
from bootvit.config import Config
from bootvit.errors import RunFailed, UserError
from bootvit.load import load_config
from bootvit.output import print_json

NEEDED = ("torch", "torchvision", "timm", "pyarrow", "numpy", "pillow", "pydantic", "entmax", "scikit-learn")
OPTIONAL = {"ray": "ray", "mlflow": "mlflow", "matplotlib": "report", "onnx": "export"}  # and the extra that has it
PYTHONS = ((3, 11), (3, 13))
SHM_BYTES = 512 << 20  # loaders' batches and Ray's objects pass through it
DISK_BYTES = 2 << 30
SKEW_S = 5.0
SIDE = 256  # of the matrices that are multiplied
ANSWER_S = 5.0


class Sick(Exception):
    """Something is wrong: `str(err)` says what, `todo` what to type."""

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(what)
        self.todo = todo


class Finding(NamedTuple):
    """What a check found."""

    check: str
    ok: bool
    said: str
    todo: str  # empty where nothing is wrong
    seconds: float


class Check(NamedTuple):
    """One check: what it says where all is well, raising `Sick`, `UserError` or `RunFailed` where not."""

    name: str
    run: Callable[[], str]
    seconds: float  # that it may take
    todo: str  # what to do about an error of another kind, or about silence


def examine(config: Config) -> Iterator[Finding]:
    """Everything, one finding after another; `config` says which storage, tracking and devices."""
    for check in checks(config):
        yield finding(check)


def checks(config: Config) -> list[Check]:
    """In the order of what depends on what."""
    again = "pip install --upgrade 'bootvit[all]'"
    storage = "give another ray.storage_path=FOLDER"
    return [
        Check("python", check_python, 5, "install Python 3.11 to 3.13"),
        Check("packages", check_packages, 30, again),
        Check("torch", check_torch, 120, "pip install --force-reinstall torch torchvision"),
        *(Check(f"device {name}", functools.partial(check_device, name), 120, DRIVER) for name in device_names()),
        Check("collective", functools.partial(check_collective, config), 180, COLLECTIVE),
        Check("/dev/shm", check_shm, 5, SHM),
        Check("storage", functools.partial(check_storage_works, config), 90, storage),
        Check("tracking", functools.partial(check_tracking_works, config), 30, TRACKING),
        Check("ray", check_ray, 90, "export RAY_ADDRESS=HEAD:6379, or unset it to start a local Ray"),
        Check("clock", functools.partial(check_clock, config), 30, CLOCK),
    ]


DRIVER = "nvidia-smi; update the driver, or use ray.use_gpu=false"
COLLECTIVE = "export GLOO_SOCKET_IFNAME=lo (one machine), or the interface between the nodes"
SHM = "docker run --shm-size=2g, or an emptyDir of medium Memory at /dev/shm in Kubernetes; or data.workers=0"
TRACKING = "start it, or give another tracking.uri=, or tracking.enabled=false and, later, bootvit track sync RUN"
CLOCK = "set the clock: timedatectl set-ntp true"


def finding(check: Check) -> Finding:
    """Run a check in a thread that is left behind if it takes too long."""
    began = time.monotonic()
    found: list[str | BaseException] = []

    def work() -> None:
        try:
            found.append(check.run())
        except BaseException as err:
            found.append(err)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(check.seconds)
    took = time.monotonic() - began
    if not found:
        return Finding(check.name, False, f"no answer within {check.seconds:g} s", check.todo, took)
    first = found[0]
    if isinstance(first, str):
        return Finding(check.name, True, first, "", took)
    said = public(" ".join(str(first).split())[:400]) or type(first).__name__
    if not isinstance(first, Sick | UserError | RunFailed):
        said = f"{type(first).__name__}: {said}"
    return Finding(check.name, False, said, first.todo if isinstance(first, Sick) else check.todo, took)


# ---------------------------------------------------------------------------------------------- this machine


def check_python() -> str:
    """Its version."""
    here = ".".join(map(str, sys.version_info[:3]))
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        raise Sick(f"Python {here} is not supported", "install Python 3.11 to 3.13")
    return here


def installed(name: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_packages() -> str:
    """What is needed is there, torchvision is for this torch, and no version is one that is known not to work."""
    missing = [name for name in NEEDED if installed(name) is None]
    if missing:
        raise Sick(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    torch, vision = version("torch").partition("+")[0], version("torchvision").partition("+")[0]
    if not fits(torch, vision):
        raise Sick(
            f"torchvision {vision} is not for torch {torch}", f"pip install torch=={torch} --upgrade torchvision"
        )
    if installed("mlflow") == "3.18.0":
        raise Sick("mlflow 3.18.0 does not work with bootvit", "pip install 'mlflow!=3.18.0'")
    lacking = [f"{name} (pip install 'bootvit[{extra}]')" for name, extra in OPTIONAL.items() if not installed(name)]
    known = {name: installed(name) for name in ("torch", "torchvision", "timm", *OPTIONAL)}
    there = ", ".join(f"{name} {own}" for name, own in known.items() if own)
    return there + (f"; without {', '.join(lacking)}" if lacking else "")


def fits(torch: str, vision: str) -> bool:
    """Whether a torchvision is for a torch: 0.(N + 15) is for 2.N, and its own requirement must hold too."""
    wanted = [Requirement(text) for text in requires("torchvision") or []]
    if not all(one.specifier.contains(torch, prereleases=True) for one in wanted if one.name == "torch"):
        return False
    own, other = Version(torch), Version(vision)
    return own.major != 2 or other.major != 0 or other.minor == own.minor + 15


def check_torch() -> str:
    """Whether torch and torchvision load, and see what the machine has."""
    import torch
    import torchvision

    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # fails where the two do not fit
    if not torch.cuda.is_available() and has_nvidia():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise Sick(f"this machine has an NVIDIA GPU, but torch {torch.__version__}, {built}, does not see it", DRIVER)
    return f"{torch.get_num_threads()} threads, {os.cpu_count()} cores"


def has_nvidia() -> bool:
    """Whether the system has a device of NVIDIA's driver."""
    return Path("/dev/nvidia0").exists()


def device_names() -> list[str]:
    """cpu, and every GPU."""
    try:
        import torch
    except Exception:  # `check_packages` and `check_torch` say what is wrong
        return []
    return ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]


def check_device(name: str) -> str:
    """A product of matrices there against the same in float64 on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, SIDE, SIDE, generator=generator)
    wanted = left.double() @ right.double()
    began = time.monotonic()
    found = (left.to(name) @ right.to(name)).cpu().double()
    took = time.monotonic() - began
    worst = float((found - wanted).abs().max())
    if not worst < 0.1:  # TF32 is off by hundredths
        raise Sick(f"a product of matrices is off by {worst:g}", "restart the machine, or leave this device out")
    about = "" if name == "cpu" else f"{torch.cuda.get_device_name(name)}, "
    return f"{about}a product of {SIDE}x{SIDE} matrices right to {worst:.1g} in {1000 * took:.1f} ms"


def check_collective(config: Config) -> str:
    """Processes that add their ranks together: two on the CPU, or one on every GPU."""
    import torch
    from torch.multiprocessing.spawn import spawn

    gpus = torch.cuda.device_count() if config.ray.use_gpu is not False else 0
    size, backend = (gpus, "nccl") if gpus else (2, "gloo")
    with tempfile.TemporaryDirectory() as folder:
        context = spawn(add_ranks, (size, backend, folder), nprocs=size, join=False)  # type: ignore[no-untyped-call]
        try:
            until = time.monotonic() + 150
            while not context.join(timeout=1):
                if time.monotonic() > until:
                    raise Sick(f"{size} processes over {backend} did not meet within 150 s", COLLECTIVE)
        finally:
            for process in context.processes:
                process.kill()
    return f"{size} processes over {backend} added up"


def add_ranks(rank: int, size: int, backend: str, folder: str) -> None:
    """One of the processes."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device(f"cuda:{rank}" if backend == "nccl" else "cpu")
    where = f"file://{folder}/meeting"
    dist.init_process_group(backend, where, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    total = torch.full((1000,), float(rank + 1), device=device)
    dist.all_reduce(total)
    assert bool((total == size * (size + 1) / 2).all()), f"the sum of the ranks is {float(total[0])}"
    dist.destroy_process_group()


def check_shm(place: Path = Path("/dev/shm")) -> str:
    """Its size."""
    if not place.is_dir():
        return "this system has none"
    usage = shutil.disk_usage(place)
    if usage.total < SHM_BYTES:
        raise Sick(f"{usage.total >> 20} MiB in all, and loaders and Ray need {SHM_BYTES >> 20}", SHM)
    if usage.free < SHM_BYTES // 4:
        raise Sick(f"{usage.free >> 20} MiB free of {usage.total >> 20}", f"remove what dead processes left in {place}")
    return f"{usage.free >> 20} MiB free of {usage.total >> 20}"


# ------------------------------------------------------------------------------------------------- places


def check_storage_works(config: Config) -> str:
    """Write, read and remove a file where runs are kept."""
    from bootvit.runs import check_storage, place_of
    from bootvit.storage import Store

    check_storage(config)
    place, name, data = place_of(config), f".doctor-{uuid.uuid4().hex}", os.urandom(64)
    given = f"ray.storage_path={public_address(config.ray.storage_path)}"
    if isinstance(place, Store):
        place.write(name, data)
        read = place.read(name)
        place.delete(name)
        if read != data:
            raise Sick(f"{given}: what was written reads otherwise", "give another ray.storage_path=")
        return f"{place.at}: written and read"
    there = next(folder for folder in (place.parent, *place.parents) if folder.is_dir())
    path = there / name
    try:
        path.write_bytes(data)
        if path.read_bytes() != data:
            raise Sick(f"{given}: what was written reads otherwise", "give another ray.storage_path=FOLDER")
    finally:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(there).free
    if free < DISK_BYTES:
        raise Sick(
            f"{there}: {free >> 20} MiB free",
            "bootvit list; bootvit rm RUN; or another ray.storage_path=FOLDER",
        )
    return f"{there}: written and read, {free >> 30} GiB free"


def check_tracking_works(config: Config) -> str:
    """Whether MLflow can be reached and written to."""
    from bootvit.tracking.store import check_writable, mlflow_available, sqlite_path, tracking_uri

    if not config.tracking.enabled:
        return "off (tracking.enabled=false)"
    if not mlflow_available():
        raise Sick("MLflow is not installed: runs are only in their folders", "pip install 'bootvit[mlflow]'")
    uri = tracking_uri(config.tracking.uri)
    shown = public_address(uri)
    if path := sqlite_path(uri):
        there = path.exists()
        check_writable(uri)
        return f"{shown}: can be written" + ("" if there else " (not there yet)")
    if not uri.startswith(("http://", "https://")):
        return f"{shown}: not asked"
    status, _ = ask(f"{uri.rstrip('/')}/health")
    if status in (401, 403):
        raise Sick(f"{shown}: answers {status}", "export MLFLOW_TRACKING_USERNAME=… MLFLOW_TRACKING_PASSWORD=…")
    if status != 200:
        raise Sick(f"{shown}: answers {status} to /health: no MLflow server", TRACKING)
    return f"{shown}: answers"


def ask(url: str) -> tuple[int, str | None]:
    """(status, Date header) of a server's answer; `Sick` where there is none within seconds."""
    try:
        with urlopen(Request(url), timeout=ANSWER_S) as answer:
            return answer.status, answer.headers.get("Date")
    except HTTPError as err:
        return err.code, err.headers.get("Date")
    except (OSError, ValueError) as err:
        raise Sick(f"{public_address(url)}: no answer: {getattr(err, 'reason', None) or err}", TRACKING) from None


def check_ray() -> str:
    """Whether Ray is there; the cluster of RAY_ADDRESS answers and takes the token, or a local Ray finds its folder."""
    from bootvit.ray_connection import check_address, connect_ray, session_folder

    if installed("ray") is None:
        raise Sick("Ray is not installed: only --local works", "pip install 'bootvit[ray]'")
    address = check_address()
    if address is None:
        folder = session_folder() or "its usual place"
        return f"{version('ray')}, no RAY_ADDRESS: a local Ray is started when it is needed, in {folder}"
    import ray

    connect_ray(1)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        return f"{address}: {len(nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"
    finally:
        ray.shutdown()


def check_clock(config: Config) -> str:
    """This clock against those of the storage and of the tracking server: runs' times are compared across machines."""
    others: dict[str, float] = {}
    place = config.ray.storage_path
    if "://" not in place:
        there = next(folder for folder in (Path(place), *Path(place).parents) if folder.is_dir())
        with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
            file.write(b"x")
            file.flush()
            others[str(there)] = os.stat(file.name).st_mtime - time.time()
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if config.tracking.enabled and uri.startswith(("http://", "https://")):
        date = ask(f"{uri.rstrip('/')}/health")[1]
        if date:
            others[public_address(uri)] = parsedate_to_datetime(date).timestamp() - time.time()
    year = time.gmtime().tm_year
    if year < 2026:
        raise Sick(f"this machine says that it is {year}", CLOCK)
    for name, skew in others.items():
        if math.fabs(skew) > SKEW_S:
            raise Sick(f"{name} is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine", CLOCK)
    return f"within {SKEW_S:g} s of {', '.join(others) or 'nothing to compare with'}"


def command(name: str | None, overrides: list[str], *, as_json: bool) -> int:
    """Print every finding as it comes; status 1 if one is bad."""
    if name is not None and "=" in name:  # overrides alone
        overrides, name = [name, *overrides], None
    config = load_config(name or "digits/joint", overrides)
    found = []
    for one in examine(config):
        found.append(one)
        if not as_json:
            print(f"{'ok' if one.ok else '!!':2}  {one.check:12}  {one.said}", flush=True)
            if one.todo:
                print(f"    {'':12}  try: {one.todo}", flush=True)
    if as_json:
        print_json([one._asdict() for one in found])
    return int(not all(one.ok for one in found))
