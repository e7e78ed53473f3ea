"""Parquet files in an object store: the same data set as in a folder, only the bytes needed, one line for trouble."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest
from data_making import data_config, write_folder, write_small_parquet
from store_proxy import Proxy, client

from bootvit.__main__ import main
from bootvit.data import DataSplits, open_splits, stores
from bootvit.data.cache import decoded, mapped
from bootvit.data.pack import pack
from bootvit.errors import RunFailed, UserError
from bootvit.load import load_config


@pytest.fixture(scope="module")
def served(s3_server: Proxy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Proxy, Path]:
    """(proxy, folder): the folder's data sets `hf` and `packed` lie in the bucket `data` too."""
    folder = tmp_path_factory.mktemp("sets")
    write_small_parquet(folder / "hf")
    write_folder(folder / "loose", "train", {"a": 500, "b": 500}, size=(100, 120))
    write_folder(folder / "loose", "test", {"a": 5, "b": 5})
    loose = data_config(source="imagefolder", root=folder / "loose")
    pack(loose, folder / "packed", group_bytes=60_000, file_bytes=1_500_000)
    s3 = client(s3_server)
    s3.create_bucket(Bucket="data")
    s3.create_bucket(Bucket="scratch")
    s3.put_object(Bucket="data", Key="empty/readme.txt", Body=b"x")
    for path in folder.rglob("*.parquet"):
        s3.put_object(Bucket="data", Key=str(path.relative_to(folder)), Body=path.read_bytes())
    return s3_server, folder


@pytest.fixture
def store(served: tuple[Proxy, Path], s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Proxy, Path]:
    """The same, with a cache of its own."""
    monkeypatch.setenv("BOOTVIT_CACHE", str(tmp_path / "cache"))
    return served


def opened(root: object, **values: object) -> DataSplits:
    return open_splits(data_config(source="parquet", root=root, **values))


def pixels(splits: DataSplits) -> dict[str, bytes]:
    """The encoded bytes of each training image."""
    images = mapped(splits.train)
    return {
        key: data for key, (_, data) in zip(splits.train.keys, images.scan(np.arange(len(splits.train))), strict=True)
    }


@pytest.mark.parametrize(("name", "query"), [("hf", True), ("packed", False)])
def test_a_store_holds_the_same_data_set_as_a_folder(
    store: tuple[Proxy, Path], name: str, query: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, folder = store
    if query:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
    there = opened(f"s3://data/{name}" + (f"/?endpoint_override={proxy.url}" if query else ""), fraction=0.5)
    here = opened(folder / name, fraction=0.5)
    for attribute in ("classes", "mean", "std", "fingerprint"):
        assert getattr(there, attribute) == getattr(here, attribute)
    assert there.train.digest == here.train.digest
    assert there.train.table.native == here.train.table.native
    assert there.test is not None
    assert here.test is not None
    assert there.test.digest == here.test.digest
    assert [n.replace("s3://data", str(folder)) for n in there.notes] == list(here.notes)
    assert pixels(there) == pixels(here)
    assert there.train.table.where(0).startswith(f"s3://data/{name}/train-0000")


def test_a_fraction_of_a_packed_set_reads_its_bytes_only(store: tuple[Proxy, Path]) -> None:
    proxy, folder = store
    whole = sum(path.stat().st_size for path in (folder / "packed").glob("train-*"))
    splits = opened("s3://data/packed", fraction=0.05)
    opening = proxy.sent
    mapped(splits.train)
    images = proxy.sent - opening
    assert 0.04 < images / whole < 0.08
    assert opening / whole < 0.25  # footers, labels, keys and 64 images: of a set this small that is much
    proxy.clear()
    again = opened("s3://data/packed", fraction=0.05)
    mapped(again.train)
    assert proxy.sent == 0  # all of it is in the node's cache
    mapped(opened("s3://data/packed").train)
    assert proxy.sent > 0.95 * whole


def test_a_file_that_was_replaced_is_read_again(store: tuple[Proxy, Path]) -> None:
    proxy, folder = store
    s3 = client(proxy)

    def put(part: str) -> None:
        data = (folder / "hf" / part).read_bytes()
        s3.put_object(Bucket="scratch", Key="changing/train-0.parquet", Body=data)

    put("train-00000-of-00002.parquet")
    first = opened("s3://scratch/changing", held_out=0.2)
    before = pixels(first)
    put("train-00001-of-00002.parquet")
    second = opened("s3://scratch/changing", held_out=0.2)
    assert first.train.digest != second.train.digest
    assert not set(before) & set(pixels(second))


def test_row_groups_are_fetched_ahead(store: tuple[Proxy, Path]) -> None:
    proxy, _ = store
    splits = opened("s3://data/packed")
    proxy.clear()
    proxy.latency = 0.05
    begin = time.monotonic()
    mapped(splits.train)
    took, requests = time.monotonic() - begin, len(proxy.requests)
    assert requests > 40
    assert proxy.most >= 4
    assert took < requests * proxy.latency / 2


# ------------------------------------------------------------------------------------------------------ trouble


@pytest.mark.parametrize("how", ["503", "cut"])
def test_requests_that_fail_now_and_then_are_sent_again(store: tuple[Proxy, Path], how: str) -> None:
    proxy, folder = store
    proxy.spoil = lambda method, path: how if method == "GET" and len(proxy.requests) % 4 == 0 else None
    assert pixels(opened("s3://data/hf")) == pixels(opened(folder / "hf"))


def refused(root: str, **values: object) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, **values)
    return str(caught.value)


def test_a_store_that_fails_is_one_line_with_status_1(
    store: tuple[Proxy, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy, _ = store
    proxy.spoil = lambda method, path: "503" if path.startswith("/data/hf/") else None
    once = pa.fs.AwsStandardS3RetryStrategy(max_attempts=1)  # the client's own would go on for 6 s
    client = pa.fs.S3FileSystem(endpoint_override=proxy.url, retry_strategy=once)
    monkeypatch.setattr(stores, "open_system", lambda address: (client, "data/hf"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits/joint", "--local", "data.source=parquet", "data.root=s3://data/hf"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bootvit: failed: data.root=s3://data/hf: the store does not answer as it should: ")
    assert "503" in line


def test_a_store_that_hangs_is_one_line(store: tuple[Proxy, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, _ = store
    proxy.spoil = lambda method, path: "hang"
    monkeypatch.setattr(stores, "ANSWER_S", 0.5)
    with pytest.raises(RunFailed, match=r"^data\.root=s3://data/hf: the store gave no answer in 0\.5 s$"):
        opened("s3://data/hf")
    proxy.spoil = lambda method, path: "404"  # ends the request that goes on


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError("AWS Error NETWORK_CONNECTION: curlCode: 7, Could not connect to server"), RunFailed, "not answer"),
        (OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)"), RunFailed, "not answer"),
        (OSError("HDFS connection failed"), RunFailed, "not answer"),
        (OSError("AWS Error ACCESS_DENIED during GetObject operation"), UserError, "the store refuses"),
        (pa.ArrowException("Unknown error: Azure AuthenticationException: Failed to get token"), UserError, "refuses"),
        (OSError("Bucket 'nowhere' not found"), UserError, "there is nothing at s3://b/x/a.parquet"),
        (FileNotFoundError(2, "Path does not exist"), UserError, "there is nothing at s3://b/x/a.parquet"),
        (OSError("Couldn't deserialize thrift"), OSError, "thrift"),
    ],
)
def test_what_clients_of_stores_raise(error: Exception, kind: type[Exception], words: str) -> None:
    place = stores.StorePath(pa.fs.LocalFileSystem(), "", "s3://b/x/a.parquet", "s3://b/x?region=eu")

    def request() -> None:
        raise error

    with pytest.raises(kind, match=words) as caught:
        place.asked(request)
    assert str(caught.value).startswith("data.root=s3://b/x?region=eu: ") or kind is OSError


def test_a_key_that_is_refused_is_one_line(store: tuple[Proxy, Path]) -> None:
    proxy, _ = store
    proxy.spoil = lambda method, path: "403"
    assert refused("s3://data/hf").startswith("data.root=s3://data/hf: the store refuses: ")
    assert len(proxy.requests) < 4


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("s3://nowhere/x", "there is nothing at s3://nowhere/x: no such bucket"),
        ("s3://data/nothing", "there is nothing at s3://data/nothing: no such bucket, folder or file"),
        ("s3://data/empty", "no train*.parquet there (Parquet files found: none)"),
        ("s3://data", "but in 'hf', 'packed'"),
        ("s3://data/hf?colour=red", "its parameters (after the '?') may be region, scheme"),
        ("s3://data/hf?retry_limit_seconds=3", "Unexpected query parameter in S3 URI: 'retry_limit_seconds'"),
    ],
)
def test_what_is_not_there_is_one_line(store: tuple[Proxy, Path], root: str, words: str) -> None:
    line = refused(root)
    assert line.startswith(f"data.root={root.replace('red', '***')}: ")
    assert words in line


def test_damage_in_a_store_names_the_file(store: tuple[Proxy, Path]) -> None:
    proxy, folder = store
    sound = (folder / "hf" / "train-00000-of-00002.parquet").read_bytes()
    s3 = client(proxy)
    for data in (b"", b"PAR1 and no more", sound[:-200] + bytes(100) + sound[-100:]):
        s3.put_object(Bucket="scratch", Key="damaged/train.parquet", Body=data)
        assert refused("s3://scratch/damaged").startswith(
            "s3://scratch/damaged/train.parquet: not a readable Parquet file: "
        )


@pytest.mark.parametrize(
    ("root", "source", "words"),
    [
        ("s3://me:secret@b/x", "parquet", "data.root=s3://***@b/x: an address holds no user, key or token here"),
        ("abfs://c@a.dfs.core.windows.net/x", "parquet", "abfs://ACCOUNT.blob.core.windows.net/CONTAINER/FOLDER"),
        (
            "s3://b/x?access_key=secret",
            "parquet",
            "its parameters (after the '?') may be region, scheme, endpoint_override",
        ),
        ("s3:///x", "parquet", "it names no bucket or host: expected s3://BUCKET/FOLDER"),
        ("s3:/b/x", "parquet", "not an address of an object store, which begins with one of s3://"),
        ("S3://b/x", "parquet", "write s3://"),
        ("s3a://b/x", "parquet", "not an address of an object store"),
        ("hf://a/b", "parquet", "expected hf://datasets/OWNER/NAME"),
        ("https://b/x", "parquet", "not an address of an object store"),
        ("file://host/x", "parquet", "not an address of an object store"),
        ("s3://b/x", "imagefolder", "data.source=imagefolder needs a folder"),
        ("s3://b/x", "cifar10", "which `bootvit data pack` makes of any source"),
    ],
)
def test_an_address_that_cannot_be_a_root_is_one_line(root: str, source: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("digits/joint", [f"data.root={root}", f"data.source={source}"])
    assert words in str(caught.value)
    assert str(caught.value).startswith("override 'data.root=")
    assert "secret" not in str(caught.value)
    if "://" in root:
        assert words.partition(": ")[2] in refused(root) if source == "parquet" else True


def test_a_file_address_is_the_folder() -> None:
    assert load_config("digits/joint", ["data.root=file:///data/my%20set"]).data.root == "/data/my set"
    root = "s3://b/x?endpoint_override=http://h:9&region=eu"
    assert load_config("digits/joint", [f"data.root={root}", "data.source=parquet"]).data.root == root


# ----------------------------------------------------------------------------------------------------- commands


def test_commands_take_a_root_in_a_store(
    store: tuple[Proxy, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = store
    monkeypatch.chdir(tmp_path)
    tiny = ["model.vit.width=18", "model.vit.depth=1", "model.vit.heads=9", "model.vit.mlp_width=24"]
    tiny += ["model.vit.patch=4", "data.image_size=16", "schedule.epochs=1", "tracking.enabled=false"]
    words = ["digits/joint", "data.source=parquet", *tiny]

    def said(*command: str) -> str:
        assert main(list(command)) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        return re.sub(r'"seconds.*|"images_per_second.*', "", out.replace(str(folder), "s3://data"))

    for command in (["info"], ["check"], ["fraction", "--keys"]):
        there, here = (
            said("data", command[0], *words, f"data.root={root}/hf", *command[1:]) for root in ("s3://data", folder)
        )
        assert re.sub(r"[\d.]+ s\b.*", "", there) == re.sub(r"[\d.]+ s\b.*", "", here)
    said("data", "pack", *words, "data.root=s3://data/hf", "--out", "packed")
    said("data", "pack", *words, f"data.root={folder}/hf", "--out", "local")
    for name in ("train", "test"):
        assert (tmp_path / f"packed/{name}-00000.parquet").read_bytes() == (
            tmp_path / f"local/{name}-00000.parquet"
        ).read_bytes()
    said("train", *words, "--local", "name=there", "data.root=s3://data/hf")
    said("train", *words, "--local", "name=here", f"data.root={folder}/hf")
    assert said("eval", "runs/there", "--local", "--json") == said("eval", "runs/here", "--local", "--json")


def test_small_images_are_decoded_once(store: tuple[Proxy, Path]) -> None:
    proxy, folder = store
    there, here = opened("s3://data/hf"), opened(folder / "hf")
    assert np.array_equal(decoded(there.train).pixels, decoded(here.train).pixels)
    proxy.clear()
    decoded(opened("s3://data/hf").train)
    assert proxy.sent == 0
