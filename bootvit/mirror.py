"""Sends what a run writes on its node to the object store that it is kept in, beside training, which never waits."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bootvit import checkpoint
from bootvit.checkpoint import Saved
from bootvit.errors import RunFailed, UserError
from bootvit.files import PREDICTIONS, read_json, write_json
from bootvit.remote import Head, Hold, TakenOver, entry, entry_name, object_name, object_of
from bootvit.storage import Store

LOOK_S = 1.0  # seconds between two looks at the folder
PAUSE_S = 2.0  # between two entries of the log that only hold lines of the journal, and
SHARE = 0.01  # not more than so much of the time since the start: else a run of a week would have 300,000 entries
DOWN_S = 10.0  # after a store has failed
END_S = 120.0  # for what is left at the end, as long as the store fails


class Mirror:
    """A thread that sends what is complete, in an order in which every reader sees a whole run.

    Checkpoints go first, then an entry of the log that names them, with the lines of the journal that were there by
    then; what it no longer names is removed; result.json comes last. Nothing here changes an object but those few
    documents that are replaced as a whole. Without a `hold` only a worker's log is sent.
    """

    def __init__(self, store: Store, path: Path, hold: Hold | None, known: Head | None = None) -> None:
        self._store, self._path, self._hold = store, path, hold
        self._there = {object_name(one["step"], one["sha256"]) for one in known.checkpoints} if known else set()
        self._sent, self._inode, self._entries = 0, -1, 0
        self._step = newest_step(checkpoint.described(path / "checkpoints"))
        self._head: Head | None = None
        self._data = known.data if known else None
        self._stamps: dict[str, tuple[int, int]] = {}
        self._began = self._last = self._logs = time.monotonic()
        self._warned = False
        self.taken: TakenOver | None = None
        self._lock = threading.Lock()  # held while something is sent
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Send all that is complete now, before somebody is told of it; `RunFailed` if the store does not take it."""
        if (failed := self._send_rest()) is not None:
            raise failed

    def close(self) -> RunFailed | None:
        """Send the rest, and end; what has come between, if anything."""
        self._end.set()
        self._thread.join()
        return self._send_rest()

    def _send_rest(self) -> RunFailed | None:
        """Send it, for `END_S` seconds at most while the store fails."""
        until = time.monotonic() + END_S
        while (failed := self._attempt(whole=True)) is not None and time.monotonic() < until and self.taken is None:
            time.sleep(LOOK_S)
        if failed is None or self.taken is not None:
            return self.taken
        return RunFailed(
            f"{failed}; what {self._store} has not got of this run is in {self._path} on this machine, and the same "
            "command with --resume, here, sends it"
        )

    def _work(self) -> None:
        while not self._end.wait(LOOK_S):
            if self._attempt(whole=False) is not None and (self.taken is not None or self._end.wait(DOWN_S)):
                return

    def _attempt(self, *, whole: bool) -> Exception | None:
        """One look at the folder; what has failed, which the next one tries again."""
        with self._lock:
            return self._look(whole=whole)

    def _look(self, *, whole: bool) -> Exception | None:
        try:
            if self._hold is not None:
                self._send(self._hold, whole=whole)
            if whole or self._due(self._logs):
                self._put_changed("logs/*/*")
                self._logs = time.monotonic()
        except TakenOver as err:
            self.taken = err
            with suppress(FileNotFoundError):  # the other one is on this machine, and has cleared this folder away
                write_json(self._path / "lease.json", {"id": None})  # the loop stops where it writes next
            return err
        except (RunFailed, UserError, OSError) as err:
            if not self._warned:
                print(
                    f"bootvit: warning: {err}; training goes on, and what is not sent is in {self._path}",
                    file=sys.stderr,
                    flush=True,
                )
            self._warned = True
            return err
        return None

    # ------------------------------------------------------------------------------------------- one look

    def _send(self, hold: Hold, *, whole: bool) -> None:
        kept = checkpoint.described(self._path / "checkpoints")  # before the journal, which then covers them
        new = [saved for saved in kept if object_of(saved) not in self._there]
        lines, start, inode = self._lines()
        self._check_whole(kept, inode)
        due = lines and (whole or self._due(self._last))
        if new:
            hold.check()
        for saved in new:
            self._upload(saved)
        kept = [saved for saved in kept if object_of(saved) in self._there]  # or it was pruned
        head = self._made_head(kept, start)
        if new or due or self._head is None or self._head._replace(start=0) != head._replace(start=0):
            hold.check()
            self._store.write(entry_name(hold.number, self._entries), entry(head, lines))
            self._entries, self._sent, self._inode, self._head = self._entries + 1, start + len(lines), inode, head
            self._last = time.monotonic()
            self._clear(hold, kept)
        self._put_changed("mlflow.json")
        if whole:
            hold.check()
            self._put_changed(PREDICTIONS)
            self._put_changed("result.json")

    def _check_whole(self, kept: list[Saved], inode: int) -> None:
        """Raise `TakenOver` if the folder was cleared away under this process: the store would be told to forget it.

        `RunFailed`, which is tried again, while it is only incomplete, as when a checkpoint is just being replaced.
        """
        if newest_step(kept) < self._step or (inode == -1 and self._step >= 0):
            if not (self._path / "lease.json").exists():
                raise TakenOver(f"{self._path}: this run's working copy was removed; {self._store} stays as it is")
            raise RunFailed(f"{self._path}: the newest checkpoint or the journal is not there at this moment")
        self._step = newest_step(kept)

    def _due(self, since: float) -> bool:
        now = time.monotonic()
        return now - since >= max(PAUSE_S, SHARE * (now - self._began))

    def _lines(self) -> tuple[bytes, int, int]:
        """(complete lines of the journal that were not sent, where they begin, which file it is).

        A journal that was cut is another file, and is sent anew.
        """
        path = self._path / "metrics.jsonl"
        if not path.exists():
            return b"", 0, -1
        inode = path.stat().st_ino
        start = self._sent if inode == self._inode else 0
        with path.open("rb") as file:
            file.seek(start)
            data = file.read()
        return data[: data.rfind(b"\n") + 1], start, inode

    def _upload(self, saved: Saved) -> None:
        try:
            self._store.write(object_of(saved), saved.path)
        except (UserError, RunFailed, OSError):
            if saved.path.exists():
                raise
            return  # pruned
        self._there.add(object_of(saved))

    def _made_head(self, kept: list[Saved], start: int) -> Head:
        mark = self._path / "checkpoints" / "best.json"
        if self._data is None and kept:
            self._data = checkpoint.data_of(kept[-1])
        described = [{key: value for key, value in saved._asdict().items() if key != "path"} for saved in kept]
        return Head(start, described, read_json(mark) if mark.exists() else None, self._data)

    def _clear(self, hold: Hold, kept: list[Saved]) -> None:
        """Remove what no reader is told of any more; at first also what earlier writers have left."""
        named = {object_of(saved) for saved in kept}
        old = self._there - named
        if self._entries == 1:
            old |= {f"checkpoints/{item.name}" for item in self._store.list("checkpoints")} - named
            mine = entry_name(hold.number, 0)
            old |= {name for item in self._store.list("log") if (name := f"log/{item.name}") < mine}
        if old:
            hold.check()  # another writer's may be among them
            self._store.delete(*sorted(old))
            self._there -= old

    def _put_changed(self, pattern: str) -> None:
        """Replace the objects of files that are not in the store as they are."""
        for file in sorted(self._path.glob(pattern)):
            about = file.stat()
            stamp = about.st_mtime_ns, about.st_size
            if self._stamps.get(file.name) != stamp:
                self._store.write(str(file.relative_to(self._path)), file.read_bytes())
                self._stamps[file.name] = stamp


def newest_step(found: list[Saved]) -> int:
    """Of the newest checkpoint; -1 without one."""
    return max((saved.step for saved in found), default=-1)


@contextmanager
def mirrored(store: Store, path: Path, hold: Hold | None, known: Head | None = None) -> Iterator[Mirror]:
    """Send a folder while this is entered; at the end all of it, or `RunFailed`, which says where it lies."""
    mirror = Mirror(store, path, hold, known)

    def close() -> RunFailed | None:
        failed = mirror.close()
        if hold is not None and failed is not None and mirror.taken is None:
            hold.unsent = True
        return failed

    try:
        yield mirror
    except BaseException:
        if (failed := close()) is not None and mirror.taken is None:
            print(f"bootvit: warning: {failed}", file=sys.stderr, flush=True)
        raise
    if (failed := close()) is not None:
        raise failed
