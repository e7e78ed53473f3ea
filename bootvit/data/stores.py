"""Parquet files in an object store: what `data.root` is when it is an address of pyarrow.fs, such as `s3://bucket/x`,
or one of the Hugging Face Hub, `hf://datasets/OWNER/NAME`.

Credentials, region and endpoint come from where the cloud's own tools have them. A request that fails is sent again by
Arrow's client itself (to S3 with growing pauses, some 10 s in all, whether no server, a status of 5xx or 429, an answer
cut short, or 10 s without a byte); if that does not help it is a `RunFailed`; what the user can mend is a `UserError`.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from bootvit.addresses import public_address, without_secrets
from bootvit.errors import RunFailed, UserError

ADDRESS = re.compile(r"([A-Za-z][\w+.-]*)://")
ANSWER_S = 20.0  # for the first answer of a store
GOOGLE_S = 6  # Google's client would try for a quarter of an hour
S3_ATTEMPTS, S3_SILENT_S = 5, 10.0  # a server that takes requests and never answers is left after a minute
AHEAD = 8  # files or row groups on their way at once
AHEAD_BYTES = 256 << 20  # of row groups on their way at once, if more than one
BUFFER = 1 << 20  # bytes asked for at once, where a file is read only as far as needed

REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE|UNRECOGNIZED_CLIENT|EXPIRED_TOKEN|CREDENTIAL"
    r"|HTTP status 40[013]|401 Unauthorized|PERMISSION_DENIED|UNAUTHENTICATED|Authenti|Permission denied|Forbidden",
    re.IGNORECASE,
)
MISSING = re.compile(r"NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND|Bucket '.*' not found|HTTP status 404")
OF_THE_STORE = re.compile(  # what the clients say of a request; anything else that is wrong is wrong with the file
    r"AWS Error|Server Error|google::cloud|GCS|Azure|HDFS|HTTP|curl|connection|timed? ?out|unavailable|Read.* bytes",
    re.IGNORECASE,
)

T = TypeVar("T")
S = TypeVar("S")


@dataclass(eq=False)
class StorePath:
    """A folder or a file in a store; what was read of it is kept in it."""

    system: fs.FileSystem = field(repr=False)
    path: str  # within the system
    at: str  # the address without its query, for messages
    root: str  # `data.root`, for messages
    is_folder: bool = True
    size: int = 0
    changed: int | None = None  # ns
    columns: dict[str, pa.ChunkedArray] = field(default_factory=dict, repr=False)  # filled by `parquet_columns.preload`
    footer: pq.FileMetaData | None = field(default=None, repr=False)  # filled by `parquet_columns.footers`
    _source: Any = field(default=None, repr=False)  # the opened file; `cached_property` would lock all files at once
    _children: list[StorePath] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.at

    @property
    def name(self) -> str:
        """The last part."""
        return self.at.rpartition("/")[2]

    @property
    def stamp(self) -> tuple[str, int, int | None]:
        """Changes when the file does."""
        return self.at, self.size, self.changed

    @property
    def children(self) -> list[StorePath]:
        """What the folder holds, sorted by name; listed once."""
        if self._children is None:
            self._children = self._list()
        return self._children

    def _list(self) -> list[StorePath]:
        wanted = fs.FileSelector(self.path)
        try:
            found = self.asked(lambda: self.system.get_file_info(wanted))
        except (OSError, pa.ArrowException) as err:
            raise UserError(f"data.root={self.root}: {self.at} cannot be listed: {err}") from err
        parts = (
            StorePath(
                self.system,
                info.path,
                f"{self.at}/{info.base_name}",
                self.root,
                is_folder=info.type == fs.FileType.Directory,
                size=info.size or 0,
                changed=info.mtime_ns,
            )
            for info in found
        )
        return sorted(parts, key=lambda part: part.name)

    def parquet(self, act: Callable[[pq.ParquetFile], T], *, whole: bool = True) -> T:
        """What `act` makes of the opened Parquet file.

        `whole`: all of the columns that it asks for is fetched at once; else bit by bit, only as far as it reads.
        """
        way: dict[str, Any] = {"pre_buffer": True} if whole else {"pre_buffer": False, "buffer_size": BUFFER}

        def attempt() -> T:
            if self._source is None:  # a request of its own; several threads may read from what is opened
                self._source = self.system.open_input_file(self.path)
            return act(pq.ParquetFile(self._source, metadata=self.footer, **way))

        return self.asked(attempt)

    def asked(self, request: Callable[[], T]) -> T:
        """What a request answers; anything that is not the store's own doing is raised as it is."""
        return answered(request, where=f"data.root={self.root}", at=self.at, address=self.root)


def answered(request: Callable[[], T], *, where: str, at: str, address: str) -> T:
    """What a request to the store at `address` answers; messages begin with `where` and name the object `at`.

    `UserError` for what is not there or refused, `RunFailed` for a store that fails; anything else as it is.
    """
    try:
        return request()
    except Exception as err:
        if not (isinstance(err, (OSError, pa.ArrowException)) or type(err).__module__.startswith("http")):
            raise
        reason = without_secrets(" ".join(str(err).split())[:300], address)
        if isinstance(err, FileNotFoundError) or MISSING.search(reason):
            hub = "data set, revision or folder; for a private one set HF_TOKEN, or `hf auth login`"
            what = hub if address.startswith("hf:") else "bucket, folder or file"
            raise UserError(f"{where}: there is nothing at {at}: no such {what}") from err
        if REFUSED.search(reason):
            raise UserError(f"{where}: the store refuses: {reason}") from err
        if OF_THE_STORE.search(reason):
            raise RunFailed(f"{where}: the store does not answer as it should: {reason}") from err
        raise


def open_system(address: str) -> tuple[fs.FileSystem, str]:
    """Arrow's file system for an address, and the path in it."""
    if address.startswith("hf:"):
        return open_hub(address)
    limit = "retry_limit_seconds"
    if address.startswith(("gs:", "gcs:")) and limit not in address:
        address += f"{'&' if '?' in address else '?'}{limit}={GOOGLE_S}"
    system, path = fs.FileSystem.from_uri(address)
    if system.type_name == "s3":  # `from_uri` knows the endpoint, but takes no number of attempts: it would be 30
        _, (options,) = system.__reduce__()
        few = {"retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS)}
        system = fs.S3FileSystem(**options | few | {"request_timeout": S3_SILENT_S})
    return system, path


def open_hub(address: str) -> tuple[fs.FileSystem, str]:
    """The Hugging Face Hub's (HF_ENDPOINT says which, HF_TOKEN or `hf auth login` who asks)."""
    from huggingface_hub import HfFileSystem  # timm brings it along

    hub = HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"), skip_instance_cache=True)
    return fs.PyFileSystem(Hub(hub)), address.removeprefix("hf://")


class Hub(fs.FSSpecHandler):  # type: ignore[misc]
    """Arrow's way to the hub's client."""

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """What a folder holds; `isdir`, which Arrow asks, would take a hub that fails for one without the folder."""
        self.fs.info(selector.base_dir)
        return list(super().get_file_info_selector(selector))


def open_root(address: str) -> StorePath:
    """The folder at an address; `UserError` for a wrong one, `RunFailed` for a store that does not answer."""
    shown = public_address(address)
    at = shown.partition("?")[0].rstrip("/")

    def opened() -> StorePath:
        new = StorePath(fs.LocalFileSystem(), "", at, shown)  # its way of asking only
        system, path = new.asked(lambda: open_system(address))
        root = StorePath(system, path.rstrip("/"), at, shown)
        _ = root.children
        return root

    try:
        return in_time(opened, f"data.root={shown}")
    except (OSError, pa.ArrowException, ImportError) as err:
        raise UserError(f"data.root={shown}: {' '.join(str(err).split())[:300]}") from err


def in_time(act: Callable[[], T], where: str, seconds: float | None = None) -> T:
    """What `act` returns or raises; `RunFailed` if that takes too long: then it goes on in a thread of its own."""
    seconds = ANSWER_S if seconds is None else seconds
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except BaseException as err:  # raised by `result`
            done.set_exception(err)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError as err:
        if done.done():
            raise
        raise RunFailed(f"{where}: the store gave no answer in {seconds:g} s") from err


def ahead(act: Callable[[S], T], items: Iterable[S], window: int = AHEAD) -> Iterator[T]:
    """`map`, in order, with the next few under way in threads."""
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(window)
    try:
        for item in items:
            waiting.append(pool.submit(act, item))
            if len(waiting) > window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
