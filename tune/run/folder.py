"""The sweep's folder: what is there under a sweep's name, and who may go on with it."""

from __future__ import annotations

import json
import shutil
from typing import Any, Literal

import yaml

from bootvit.config import leaves, parse_yaml
from bootvit.errors import UserError
from bootvit.files import write_atomic
from bootvit.runs import FREE_ON_RESUME, check_storage, is_foreign
from bootvit.storage import Place, read_at
from tune.spec.schema import Sweep
from tune.tell.record import asked

State = Literal["absent", "unfinished", "finished"]
STATE_KEYS = {"status", "reason", "counts", "cost", "best", "trials"}
FREE = (
    *("sweep.base", "sweep.concurrency", "sweep.resources.", "sweep.budget.", "sweep.retries"),
    *("sweep.trial_timeout", "sweep.callbacks", "sweep.progress"),
)


def check_folder(sweep: Sweep, *, resume: bool, overwrite: bool, retry_failed: bool = False) -> State:
    """What is there under the sweep's name; `UserError` where going on would destroy or mix something."""
    place = sweep.place
    check_storage(sweep.base.model_copy(update={"name": sweep.file.name}))
    resume = resume or retry_failed
    state = folder_state(sweep, retry_failed=retry_failed)
    if state != "absent" and not (resume or overwrite):
        raise UserError(f"{place}: a sweep of this name exists ({state}): --resume, --overwrite, or name=… for another")
    if state == "absent" and is_foreign(place):
        raise UserError(f"{place}: exists and is not a sweep; choose another name= or ray.storage_path=")
    if state != "absent" and not resume:
        return "absent"
    if state != "absent":
        check_same_sweep(sweep)
    return state


def claim_folder(sweep: Sweep, state: State) -> None:
    """Take the sweep's folder; nothing of an older sweep is left in it where `state` is absent."""
    path = sweep.folder
    if state == "absent" and path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(resolved(sweep), sort_keys=False, default_flow_style=None, width=110)
    write_atomic(path / "sweep.yaml", text.encode())


def folder_state(sweep: Sweep, *, retry_failed: bool) -> State:
    """A finished sweep counts as unfinished where there is more to do: what the file asks for has grown, a winner
    could not be tested, or trials that failed are to be tried again.
    """
    place = sweep.place
    if read_at(place, "sweep.yaml") is None:
        return "absent"
    if read_at(place, "sweep.json") is None:
        return "unfinished"
    document = read_state(place)
    more = document.get("asked") != asked(sweep) or document["reason"]
    more = more or (retry_failed and document["counts"].get("failed", 0) > 0)
    return "finished" if document["status"] == "finished" and not more else "unfinished"


def read_state(place: Place) -> dict[str, Any]:
    """sweep.json; `UserError` if it is not what this version writes."""
    path = f"{place}/sweep.json"
    try:
        document = json.loads(read_at(place, "sweep.json") or b"")
    except ValueError as err:
        raise UserError(f"{path}: not readable as JSON: {err}") from err
    missing = STATE_KEYS - set(document) if isinstance(document, dict) else STATE_KEYS
    if missing:
        raise UserError(f"{path}: lacks {sorted(missing)}; remove it, and --resume makes it anew from events.jsonl")
    return dict(document)


def resolved(sweep: Sweep) -> dict[str, Any]:
    """Everything that decides what the sweep computes."""
    return {"sweep": sweep.file.model_dump(mode="json"), "base": sweep.base.model_dump(mode="json")}


def read_resolved(sweep: Sweep) -> dict[str, Any]:
    """The same, as it was when the sweep was started."""
    data = read_at(sweep.place, "sweep.yaml") or b""
    return dict(parse_yaml(data.decode(errors="replace"), f"{sweep.place}/sweep.yaml"))


def check_same_sweep(sweep: Sweep) -> None:
    """Refuse to go on with a sweep that would compute something else; more samples or seeds are no such thing."""
    before = read_resolved(sweep)
    was, now = leaves(before), leaves(resolved(sweep))
    for key in sorted({*was, *now}):
        free = key.startswith(FREE) or key.removeprefix("base.").removeprefix("sweep.set.").startswith(FREE_ON_RESUME)
        if was.get(key) == now.get(key) or free or grows(sweep, key, was.get(key), now.get(key)):
            continue
        name, then = key.removeprefix("sweep."), was.get(key)
        raise UserError(f"{sweep.place}: cannot resume with {name}={now.get(key)}: it was started with {name}={then}")


def grows(sweep: Sweep, key: str, was: Any, now: Any) -> bool:
    """Whether a sweep can take up a larger number: all of what it has done stays part of it."""
    plain = sweep.file.algorithm in ("grid", "random") and not sweep.file.fidelity
    if key == "sweep.search.samples":
        return (plain or sweep.file.suggests) and now > was
    if key == "sweep.seeds":
        old, new = was or [sweep.base.seed], now or [sweep.base.seed]
        return plain and new[: len(old)] == old
    return False
