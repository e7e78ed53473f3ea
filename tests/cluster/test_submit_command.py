"""What may be submitted: the command, its config, and places that outlive the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from bootvit.errors import UserError
from cluster.capacity import (
    DRIVER_MEMORY,
    HEAD,
    Workers,
    check_capacity,
    driver_place,
    known_nodes,
    nodes_of,
    reported_nodes,
    room,
)
from cluster.command import check_command, outlives_job

GOOD = ["ray.storage_path=/shared/runs", "tracking.uri=http://mlflow:5000"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with a tiny config and a sweep of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("name: tiny\ndata: {image_size: 32, held_out: 0.1}\n")
    (tmp_path / "sweep.yaml").write_text("name: both\nbase: tiny.yaml\nspace: {optim.lr: {grid: [1e-3, 2e-3]}}\n")
    return tmp_path


def refused(*words: str, env: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check_command(words, env or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_command_is_taken_apart(folder: Path) -> None:
    command = check_command(["train", "--resume", "tiny.yaml", "seed=3", *GOOD], {})
    assert command.words[command.config_at] == "tiny.yaml"
    assert command.files == {folder / "tiny.yaml"}
    assert command.name == "tiny"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "expected bootvit submit -- train"),
        (["trian", "tiny.yaml"], "did you mean 'train'?"),
        (["eval", "runs/x"], "expected bootvit submit -- train"),
        (["train", "--resume"], "no config is named"),
        (["train", "nothing.yaml"], "nothing.yaml: no such config file"),
        (["train", "tiny.yaml", "seeed=1", *GOOD], "unknown key 'seeed', did you mean 'seed'?"),
        (["train", "tiny.yaml", "seed=x", *GOOD], "seed="),
        (["train", "tiny.yaml", "resume", *GOOD], "expected KEY=VALUE"),
        (["sweep", "tiny.yaml", *GOOD], "unknown key 'data'"),
        (["sweep", "sweep.yaml", "base=tiny.yaml", *GOOD], "name it in the sweep file"),
        (["sweep", "sweep.yaml", "space.optim.lr.grid=[-1]", *GOOD], "optim.lr"),
        (["sweep", "sweep.yaml", "optim.lrr=1", *GOOD], "did you mean 'optim.lr'?"),
    ],
)
def test_mistakes_are_found_before_submission(folder: Path, words: list[str], expected: str) -> None:
    assert expected in refused(*words)


@pytest.mark.parametrize("verb", [("train", "tiny.yaml"), ("sweep", "sweep.yaml")])
@pytest.mark.parametrize("storage", ["ray.storage_path=runs", "ray.storage_path=~/runs", "seed=1"])
def test_runs_must_outlive_the_job(folder: Path, verb: tuple[str, str], storage: str) -> None:
    assert "add ray.storage_path=/" in refused(*verb, storage, "tracking.enabled=false")


@pytest.mark.parametrize("verb", [("train", "tiny.yaml"), ("sweep", "sweep.yaml")])
def test_places_may_be_addresses(folder: Path, verb: tuple[str, str]) -> None:
    words = [*verb, "ray.storage_path=s3://bucket/runs", "data.source=parquet", "tracking.enabled=false"]
    for root in ("s3://bucket/data", "hf://datasets/me/small"):
        command = check_command([*words, f"data.root={root}"], {})
        assert set(words[2:]) | {f"data.root={root}"} <= set(command.words)
    assert "an address holds no user" in refused(*verb, "ray.storage_path=s3://me:secret@bucket/runs")
    assert "it names no bucket" in refused(*verb, "ray.storage_path=s3:///runs", "tracking.enabled=false")


@pytest.mark.parametrize("key", ["data.root", "model.vit.weights"])
def test_inputs_must_be_where_the_job_finds_them(folder: Path, key: str) -> None:
    assert f"{key}=here is relative" in refused("train", "tiny.yaml", f"{key}=here", *GOOD)


def test_tracking_must_outlive_the_job(folder: Path) -> None:
    words = ("train", "tiny.yaml", GOOD[0])
    assert "tracking.uri is not set" in refused(*words)
    assert "would vanish" in refused(*words, "tracking.uri=sqlite:///mlflow.db")
    assert "MLFLOW_TRACKING_URI=mlruns would vanish" in refused(*words, env={"MLFLOW_TRACKING_URI": "mlruns"})
    check_command(words, {"MLFLOW_TRACKING_URI": "http://mlflow:5000"})
    check_command([*words, "tracking.enabled=false"], {})


def test_a_sweep_s_own_settings_count_as_they_will_in_the_job(folder: Path) -> None:
    """`set` is a layer between the base and the command's words: it may give a place, or spoil one."""
    head = "name: both\nbase: tiny.yaml\nspace: {optim.lr: {grid: [1e-3, 2e-3]}}\n"
    good = "set: {ray.storage_path: /shared/runs, tracking: {uri: 'http://mlflow:5000'}}\n"
    (folder / "sweep.yaml").write_text(head + good)
    assert check_command(["sweep", "sweep.yaml"], {}).name == "both"
    assert "ray.storage_path=runs would vanish" in refused("sweep", "sweep.yaml", "ray.storage_path=runs")
    (folder / "sweep.yaml").write_text(head + "set: {data.root: here}\n")
    assert "data.root=here is relative" in refused("sweep", "sweep.yaml", *GOOD)
    check_command(["sweep", "sweep.yaml", "data.root=/there", *GOOD], {})


def test_a_password_stays_out_of_the_jobs_record(folder: Path) -> None:
    line = refused("train", "tiny.yaml", GOOD[0], env={"MLFLOW_TRACKING_URI": "http://me:hunter2@mlflow:5000"})
    assert "password" in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://mlflow:5000", True),
        ("postgresql://db/mlflow", True),
        ("sqlite:////shared/mlflow.db", True),
        ("/shared/mlruns", True),
        ("databricks", True),
        ("sqlite:///mlflow.db", False),
        ("sqlite://", False),
        ("mlruns", False),
    ],
)
def test_which_tracking_places_outlive_a_job(uri: str, expected: bool) -> None:
    assert outlives_job(uri) is expected


def test_the_files_of_a_sweep_are_followed(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "base.yaml").write_text("extends: ../tiny.yaml\n")
    (folder / "deep" / "common.yaml").write_text("base: base.yaml\n")
    (folder / "deep" / "sweep.yaml").write_text("extends: [common.yaml]\nname: s\nspace: {optim.lr: {grid: [1e-3]}}\n")
    command = check_command(["sweep", "deep/sweep.yaml", *GOOD], {})
    names = {path.relative_to(folder).as_posix() for path in command.files}
    assert names == {"deep/sweep.yaml", "deep/common.yaml", "deep/base.yaml", "tiny.yaml"}


@pytest.mark.parametrize("key", ["extends", "base"])
def test_files_that_only_this_machine_has_are_refused(folder: Path, key: str) -> None:
    files = {"extends": "sweep.yaml", "base": "tiny.yaml"}
    files[key] = f"{folder}/{files[key]}"
    (folder / "far.yaml").write_text("".join(f"{name}: {place}\n" for name, place in files.items()))
    assert "relative to the file" in refused("sweep", "far.yaml", *GOOD)


def test_what_a_command_asks_of_the_cluster(folder: Path) -> None:
    four = ("ray.num_workers=4", "ray.cpus_per_worker=2.5", "ray.use_gpu=true", *GOOD)
    train = check_command(["train", "tiny.yaml", *four], {}).workers
    sweep = check_command(["sweep", "sweep.yaml", "resources.gpu=0.5", "resources.cpu=3", *GOOD], {}).workers
    assert train is not None
    assert sweep is not None
    assert (train.count, train.cpus, train.gpus) == (4, 2.5, 1)
    assert (sweep.count, sweep.cpus, sweep.gpus) == (1, 3, 0.5)
    assert check_command(["train", "tiny.yaml", "--dry-run", *four], {}).workers is None
    assert check_command(["train", "tiny.yaml", "--local", *four], {}).trains


@pytest.mark.parametrize(
    ("count", "cpus", "gpus", "room"),
    [(4, 2, 0, 4), (5, 2, 0, 4), (1, 7, 0, 0), (2, 1, 1, 1), (4, 0.5, 0.25, 4), (1, 0, 1, 1)],
)
def test_workers_must_fit_whole_on_nodes(count: int, cpus: float, gpus: float, room: int) -> None:
    nodes = [{"CPU": 6.0, "GPU": 1.0}, {"CPU": 2.0}]  # by hand: three and one workers of 2 CPUs
    workers = Workers(count, cpus, gpus, "that much")
    if room >= count:
        check_capacity(workers, nodes, "http://head")
    else:
        with pytest.raises(UserError, match=f"has room for {room} .*6 CPUs, 1 GPUs; 2 CPUs, 0 GPUs"):
            check_capacity(workers, nodes, "http://head")


def test_a_cluster_that_may_grow_is_not_counted() -> None:
    report = {"usageByNode": {"ab": {"CPU": [1.0, 2.0]}}}
    by_hand = {"loadMetricsReport": report, "autoscalerReport": {"nodeTypeMapping": {"ab": "node_ab"}}}
    growing = {"loadMetricsReport": report, "autoscalerReport": {"nodeTypeMapping": {"ab": "ray.worker"}}}
    assert known_nodes({"data": {"clusterStatus": by_hand}}) == [{"CPU": 2.0}]
    assert known_nodes({"data": {"clusterStatus": growing}}) is None
    assert known_nodes({"data": {"clusterStatus": None}}) is None
    starting = {"autoscalerReport": {"nodeTypeMapping": {}}, "loadMetricsReport": {"usageByNode": {}}}
    assert known_nodes({"data": {"clusterStatus": starting}}) is None, "a head that has only just come up"


@pytest.mark.parametrize(
    ("gpus", "expected"), [(0.6, 4), (0.5, 8), (0.25, 16), (0.3, 12), (0.1, 40), (1, 4), (2, 2), (4, 1), (5, 0)]
)
def test_a_part_of_a_gpu_is_on_one_gpu(gpus: float, expected: int) -> None:
    assert room(Workers(1, 0.1, gpus, "it"), [{"CPU": 64, "GPU": 4}]) == expected
    assert room(Workers(1, 0.1, gpus, "it"), [{"CPU": 64, "GPU": 2}, {"CPU": 64, "GPU": 2}]) == (
        0 if gpus > 2 else expected
    )


def test_an_autoscaler_s_types_are_nodes_that_may_come() -> None:
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    groups = [
        NodeGroupConfig(name="small", max_count=2, resources={"CPU": 4}),
        NodeGroupConfig(name="gpu", max_count=1, resources={"CPU": 8, "GPU": 4}),
    ]
    nodes = nodes_of(ClusterConfig(node_group_configs=groups))
    assert nodes == [{"CPU": 4}, {"CPU": 4}, {"CPU": 8, "GPU": 4}]
    check_capacity(Workers(4, 2, 1, "four"), nodes, "it")
    with pytest.raises(UserError, match="has room for 4 of 5 workers"):
        check_capacity(Workers(5, 1, 1, "five"), nodes, "it")


def test_a_driver_is_placed_where_it_has_room() -> None:
    """On the head, CPUs or none, if it has the memory; one that trains where its CPUs and GPU are."""
    big, small = {"memory": 2.0 * DRIVER_MEMORY}, {"memory": DRIVER_MEMORY / 2}
    four = Workers(4, 2, 1, "four")
    at_head = {"entrypoint_memory": DRIVER_MEMORY, "entrypoint_resources": {HEAD: 0.001}}
    assert driver_place(four, [big | {HEAD: 1}, big | {"CPU": 8}], trains=False) == at_head
    assert driver_place(None, [big | {HEAD: 1}], trains=False) == at_head
    assert driver_place(four, [small | {HEAD: 1}, big], trains=False) == {"entrypoint_memory": DRIVER_MEMORY}
    assert driver_place(four, [small | {HEAD: 1}], trains=False) == {}, "as Ray does it: on the head"
    assert driver_place(four, [big], trains=True) == {"entrypoint_num_cpus": 2, "entrypoint_num_gpus": 1}
    any_gpu = Workers(1, 2, 0, "one", gpu_if_there=True)
    assert driver_place(any_gpu, [big], trains=True)["entrypoint_num_gpus"] == 0
    assert driver_place(any_gpu, [big, big | {"GPU": 4}], trains=True)["entrypoint_num_gpus"] == 1
    report = {"usageByNode": {"ab": {"CPU": [1.0, 2.0], "memory": [0.0, 5.0]}}}
    growing = {"loadMetricsReport": report, "autoscalerReport": {"nodeTypeMapping": {"ab": "ray.worker"}}}
    assert reported_nodes({"data": {"clusterStatus": growing}}) == [{"CPU": 2.0, "memory": 5.0}]
