"""Where runs are kept: a local folder, or one in an object store, `s3://bucket/runs` and what else pyarrow.fs knows.

In a store every object is written as a whole. A request that fails is sent again a few times; if that does not help it
is a `RunFailed`, and what the user can mend a `UserError`. Credentials come from where the cloud's own tools have them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, unquote

import pyarrow as pa
from pyarrow import fs

from bootvit.addresses import is_address, public_address, wrong_address
from bootvit.data.stores import answered, in_time, open_system
from bootvit.errors import RunFailed, UserError
from bootvit.files import write_atomic

AGAIN = (0.5, 2.0)  # seconds before a request that has failed is sent again, beside what Arrow's client does itself
SETTLE_S = 2.0  # after which a store without conditional writes shows who of two writers was the last
ANSWER_S = 60.0  # for the first answer of a store
AT_ONCE = 8  # requests
PIECE = 8 << 20  # bytes of a file at a time
T = TypeVar("T")


class Item(NamedTuple):
    """What a listing shows."""

    name: str  # below the folder that was listed
    is_folder: bool
    size: int
    changed: int | None = None  # ns since 1970, by the store's clock


class Store:
    """A folder in an object store."""

    def __init__(self, address: str) -> None:
        self.address = address
        base, mark, query = address.partition("?")
        self._base, self._query = base.rstrip("/"), mark + query
        self.at = public_address(self._base)  # for messages

    def __str__(self) -> str:
        return self.at

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self.address == other.address

    def __hash__(self) -> int:
        return hash(self.address)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.address,)

    def __truediv__(self, name: str) -> Store:
        return Store(f"{self._base}/{name}{self._query}")

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        one_request = f"{self.address}{'&' if self._query else '?'}allow_delayed_open=true"  # else three for an object

        def request() -> tuple[fs.FileSystem, str]:
            try:
                return open_system(one_request if self.address.startswith("s3://") else self.address)
            except pa.ArrowInvalid:  # an Arrow that does not know it yet
                return open_system(self.address)

        system, path = self._once(request)
        return system, path.rstrip("/")

    @property
    def system(self) -> fs.FileSystem:
        """Arrow's."""
        return self._opened[0]

    def path(self, name: str = "") -> str:
        """Of an object within the system."""
        return f"{self._opened[1]}/{name}" if name else self._opened[1]

    def check(self) -> None:
        """Raise `UserError` for a wrong address, `RunFailed` for a store that does not answer, or not in time."""

        def look() -> None:
            bucket = self.path().partition("/")[0] if self.system.type_name in ("s3", "gcs") else ""
            if bucket and self._once(lambda: self.system.get_file_info(bucket).type) == fs.FileType.NotFound:
                raise UserError(f"{self.at}: there is no bucket {bucket}")
            self._once(lambda: self.system.get_file_info(self.path("config.yaml")))

        in_time(look, self.at, ANSWER_S)

    # ------------------------------------------------------------------------------------------- objects

    def read(self, name: str) -> bytes | None:
        """An object; None where there is none."""

        def request() -> bytes | None:
            try:
                with self.system.open_input_stream(self.path(name)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._asked(request)

    def read_all(self, names: list[str]) -> list[bytes | None]:
        """Several, fetched at the same time."""
        if len(names) < 2:
            return [self.read(name) for name in names]
        with ThreadPoolExecutor(min(AT_ONCE, len(names))) as pool:
            return list(pool.map(self.read, names))

    def read_into(self, name: str, take: Callable[[bytes], object]) -> bool:
        """Give an object away piece by piece, from its beginning when a request is sent again (`take(b"")` first)."""

        def request() -> bool:
            try:
                with self.system.open_input_stream(self.path(name)) as stream:
                    take(b"")
                    while piece := stream.read(PIECE):
                        take(piece)
            except FileNotFoundError:
                return False
            return True

        return self._asked(request)

    def write(self, name: str, data: bytes | Path) -> None:
        """An object, or a file as one; readers see all of it or what was there before."""
        self._asked(lambda: self._write(self.path(name), data))

    def exists(self, name: str) -> bool:
        """Whether an object is there."""

        def request() -> bool:  # `get_file_info` would also ask whether it is a folder
            try:
                self.system.open_input_stream(self.path(name)).close()
            except FileNotFoundError:
                return False
            return True

        return self._asked(request)

    def list(self, folder: str = "", *, deep: bool = False) -> list[Item]:
        """What lies in a folder, sorted by name; nothing in one that is not there. New objects may be shown late."""
        top = self.path(folder)
        wanted = fs.FileSelector(top, allow_not_found=True, recursive=deep)
        infos = self._asked(lambda: self.system.get_file_info(wanted))
        found = [Item(i.path[len(top) + 1 :], i.type == fs.FileType.Directory, i.size or 0, i.mtime_ns) for i in infos]
        return sorted((item for item in found if item.name), key=lambda item: item.name)

    def delete(self, *names: str) -> None:
        """Remove objects, if they are there."""

        def remove(name: str) -> None:
            def request() -> None:
                with suppress(FileNotFoundError):
                    self.system.delete_file(self.path(name))

            self._asked(request)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(remove, names))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object that nobody else has written; False if somebody has.

        `data` must be this process's own, such as with a random id. Where the store has no conditional writes (S3 has,
        through boto3) the last of those that write within `SETTLE_S` seconds has written it.
        """
        if not self._put_if_absent(name, data):
            if self.exists(name):
                return False
            self.write(name, data)
            time.sleep(SETTLE_S)
        return self.read(name) == data

    @cached_property
    def conditional(self) -> bool:
        """Whether one of two writers of a new object is told that it is not the first."""
        return self._base.startswith("s3://") and find_spec("boto3") is not None

    # ------------------------------------------------------------------------------------------- requests

    def _write(self, path: str, data: bytes | Path) -> None:
        whole = self.system.type_name in ("hdfs", "local")  # readers would see a file that is being written
        place = f"{path}.part" if whole else path
        if whole:
            self.system.create_dir(path.rpartition("/")[0])
        stream = self.system.open_output_stream(place)
        if isinstance(data, bytes):
            stream.write(data)
        else:
            with data.open("rb") as file:
                while piece := file.read(PIECE):
                    stream.write(piece)
        stream.close()
        if whole:
            self.system.move(place, path)

    def _put_if_absent(self, name: str, data: bytes) -> bool:
        """Whether a conditional write was made, with success or not: `create` looks."""
        if not self.conditional:
            return False
        from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

        bucket, _, key = self.path(name).partition("/")

        def request() -> bool:
            try:
                self._client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except ParamValidationError:  # a boto3 that does not know the condition
                return False
            except ClientError as err:
                status = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if status == 501:  # a store that does not
                    return False
                if status not in (409, 412):
                    raise OSError(f"AWS Error {err} (HTTP status {status})") from err
            except BotoCoreError as err:
                raise OSError(f"AWS Error {err}") from err
            return True

        return self._asked(request)

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        given = {key: values[0] for key, values in parse_qs(self._query[1:]).items()}
        endpoint = given.get("endpoint_override")
        if endpoint and "://" not in endpoint:
            endpoint = f"{given.get('scheme', 'https')}://{endpoint}"
        own = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        how = Config(
            connect_timeout=5,
            read_timeout=20,
            retries={"max_attempts": 3, "mode": "standard"},
            s3={"addressing_style": "path"} if own else None,  # as Arrow's client does
        )
        return boto3.client("s3", endpoint_url=own, region_name=given.get("region"), config=how)

    def _asked(self, request: Callable[[], T]) -> T:
        """What a request answers, sent again if the store fails."""
        for pause in AGAIN:
            try:
                return self._once(request)
            except RunFailed:
                time.sleep(pause)
        return self._once(request)

    def _once(self, request: Callable[[], T]) -> T:
        try:
            return answered(request, where=self.at, at=self.at, address=self.address)
        except (OSError, pa.ArrowException) as err:
            raise RunFailed(f"{self.at}: {' '.join(str(err).split())[:300]}") from err


# ---------------------------------------------------------------------------------------- a folder, or a store

Place = Path | Store


def address_of(place: Place) -> str:
    """As it is given to another process."""
    return place.address if isinstance(place, Store) else str(place)


def place_at(place: str) -> Place:
    """A folder by its path, or a store by its address; `UserError` for an address that cannot be one."""
    if not is_address(place):
        return Path(place)
    if place.startswith("file:///"):
        return Path(unquote(place.removeprefix("file://")))
    if wrong := wrong_address(place):
        raise UserError(f"{public_address(place)}: {wrong}")
    return Store(place)


def read_at(place: Place, name: str) -> bytes | None:
    """A small file, or object; None where there is none."""
    if isinstance(place, Store):
        return place.read(name)
    try:
        return (place / name).read_bytes()
    except FileNotFoundError:
        return None


def write_at(place: Place, name: str, data: bytes) -> None:
    """Replace a small file, or object."""
    if isinstance(place, Store):
        place.write(name, data)
    else:
        write_atomic(place / name, data)


def delete_at(place: Place, name: str) -> None:
    """Remove one, if it is there."""
    if isinstance(place, Store):
        place.delete(name)
    else:
        (place / name).unlink(missing_ok=True)
