"""Every node is asked whether it sees what a run needs: the question, the answer, and what is made of it."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import TINY, tiny, write
from store_proxy import Proxy, client

from bootvit.config import dump_config
from bootvit.errors import UserError
from bootvit.load import make_config
from bootvit.storage import Store
from cluster.local import LocalCluster, has_namespaces
from cluster.probe import Place, answerer, compare, marked, places_of, reads

ROOT = Path(__file__).resolve().parents[2]
BLIND = """
import pickle, sys
sys.modules["bootvit"] = sys.modules["cluster"] = None
print(pickle.load(sys.stdin.buffer)([])["code"])
"""


def seen(place: Place) -> str | None:
    """What is wrong with a place, as this process answers."""
    with marked([place]) as asked:
        return str(wrong) if (wrong := answerer()(asked)["wrong"][0]) else None


def test_a_folder_that_is_written_to_is_marked_while_it_is_asked_for(tmp_path: Path) -> None:
    new = Place("ray.storage_path=x", tmp_path / "not" / "yet", "", written=True)
    with marked([new, new]) as asked:
        assert [path.name for path in tmp_path.iterdir()] == [asked[0][1]]
        assert asked[0] == asked[1]
        assert answerer()(asked)["wrong"] == [None, None]
        mark = Path(asked[0][0])
        mark.write_text("of another run")
        assert answerer()(asked)["wrong"] == ["it is another folder"] * 2
        mark.unlink()
        assert answerer()(asked)["wrong"] == ["No such file or directory"] * 2
    assert seen(new) is None
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_marked_while_it_is_asked_for(s3: Proxy) -> None:
    client(s3).create_bucket(Bucket="probed")
    place = Store("s3://probed/not/yet")
    (asked_for,) = places_of(tiny(ray__storage_path=place.address))
    assert (asked_for.path, asked_for.written) == (place, True)
    with marked([asked_for]) as asked:
        assert [item.name for item in place.list()] == [asked[0][1]]
        assert answerer()(asked)["wrong"] == [None]
        s3.spoil = lambda method, path: "403" if method == "GET" else None
        assert "the store refuses" in answerer()(asked)["wrong"][0]
        s3.clear()
        place.delete(asked[0][1])
        assert answerer()(asked)["wrong"] == ["it is another folder"]
    assert place.list() == []
    line = (
        rf"^ray\.storage_path={place}: node 10\.0\.0\.2 does not see {place} \(gone\): set there what the store's own"
    )
    mine = {"wrong": [None], "code": "y", "packages": {}}
    with pytest.raises(UserError, match=line):
        compare("10.0.0.2", [asked_for], mine, mine | {"wrong": ["gone"]})


def test_what_is_read_must_be_there(tmp_path: Path) -> None:
    assert seen(reads("data.root=x", tmp_path)) is None
    assert seen(reads("data.root=x", tmp_path / "x")) == "No such file or directory"


def test_the_question_can_be_answered_where_bootvit_is_not_installed() -> None:
    import ray

    sent = ray.cloudpickle.dumps(answerer())
    done = subprocess.run([sys.executable, "-c", BLIND], input=sent, capture_output=True, check=False)
    assert (done.stdout, done.returncode) == (b"None\n", 0), done.stderr.decode()
    assert pickle.loads(sent)([])["code"] is not None


def test_where_a_run_is_written_and_what_it_reads(tmp_path: Path) -> None:
    storage, data = str(tmp_path / "runs"), str(tmp_path)
    config = tiny(ray__storage_path=storage, tracking__enabled=True, tracking__uri=f"sqlite:///{tmp_path}/a/b.db")
    assert [(place.path, place.written) for place in places_of(config)] == [
        (Path(storage), True),
        (tmp_path / "a", True),
    ]
    config = tiny(ray__storage_path=storage, data__source="cifar10", data__root=data, model__vit__weights=data)
    assert [place.given for place in places_of(config)][1:] == [f"data.root={data}", f"model.vit.weights={data}"]
    server = tiny(tracking__enabled=True, tracking__uri="http://mlflow:5000", model__vit__weights="timm")
    assert [place.given.split("=")[0] for place in places_of(server)] == ["ray.storage_path"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"wrong": ["gone"]}, r"^ray\.storage_path=/a: node 10\.0\.0\.2 does not see /a \(gone\): give it$"),
        ({"code": None}, r"^node 10\.0\.0\.2: bootvit is not installed: install the same .* bootvit submit --pip$"),
        ({"code": "x"}, r"^node 10\.0\.0\.2: another version of bootvit's sources: "),
        ({"packages": {"torch": None}}, r"^node 10\.0\.0\.2: torch None, here 1: "),
    ],
)
def test_a_node_that_differs_is_one_line(change: dict[str, object], line: str) -> None:
    place = Place("ray.storage_path=/a", Path("/a"), "give it", written=True)
    mine = {"wrong": [None], "code": "y", "packages": {"torch": "1"}}
    compare("10.0.0.2", [place], mine, mine)
    with pytest.raises(UserError, match=line):
        compare("10.0.0.2", [place], mine, mine | change)


# ------------------------------------------------------------------------------------------------- with a real Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head without CPUs: what it sees is not asked for, only the driver is there."""
    if not has_namespaces():
        pytest.skip("takes root and iproute2")
    with LocalCluster(1, head_cpus=0, env={"PYTHONPATH": str(ROOT)}) as made:
        yield made


def bootvit(cluster: LocalCluster, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
    command = [sys.executable, "-m", "bootvit", *words]
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=400, check=False)


@pytest.mark.cluster
def test_what_one_node_does_not_see_is_refused_before_the_name_is_taken(cluster: LocalCluster, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    write(theirs / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    write(
        theirs / "few.yaml",
        "name: few\nbase: tiny.yaml\nspace: {optim.lr: {grid: [1e-3, 2e-3]}}\nset: {data.held_out: 0.1}\n",
    )
    fine = cluster.add_node()
    node = cluster.add_node(hide=[ours])
    ip = cluster.ip.removesuffix("1") + node.name.split("-")[1]
    line = f"node {ip} does not see {{}} (No such file or directory): "
    storage = f"ray.storage_path={ours}/runs"
    database = f"tracking.uri=sqlite:///{ours}/mlflow.db"
    for words, start in (
        (["train", "tiny.yaml", storage], f"{storage}: {line.format(f'{ours}/runs')}give a folder that every node"),
        (["sweep", "few.yaml", storage], f"{storage}: {line.format(f'{ours}/runs')}give a folder that every node"),
        (["train", "tiny.yaml", "tracking.enabled=true", database], f"{database}: {line.format(ours)}give a folder"),
    ):
        done = bootvit(cluster, theirs, *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith(f"bootvit: error: {start}")
    assert list(ours.iterdir()) == []
    assert not (theirs / "runs").exists()
    assert not list(theirs.glob(".bootvit*"))

    words = ("ray.num_workers=2", "tracking.enabled=true", f"ray.storage_path={theirs}/runs")
    done = bootvit(cluster, theirs, "train", "tiny.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((theirs / "runs" / "tiny" / "result.json").read_text())["status"] == "finished"
    done = bootvit(cluster, theirs, "logs", "tiny")
    assert set(re.findall(r"rank \d of 2 on .* address ([0-9.]+);", done.stdout)) == {
        cluster.ip.removesuffix("1") + one.name.split("-")[1] for one in (fine, node)
    }
    assert done.stdout.count("\nepoch 3, step ") == 2
    assert len(re.findall(r"\S+ ended\n", done.stdout)) == 2
    done = bootvit(cluster, theirs, "eval", "tiny", "ray.num_workers=2", "--json")
    assert json.loads(done.stdout)["vit"]["total"] > 0
    for one in (fine, node):
        cluster.kill_node(one)
