"""Method x fraction: which runs may be averaged, and what they give.

Runs are averaged over seeds only. Two runs that differ in anything else that can change a result are two variants,
in two lines that say what differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bootvit.report.paper import paper_points
from bootvit.report.rows import RunRow, Split

METHODS = ("vit", "agent", "joint", "shared")
NETWORKS = ("vit", "agent")

# the table's own axes, and where or how conveniently a run was made; data.fingerprint stands for data.root
NOT_A_VARIANT = ("name", "seed", "method", "data.fraction", "data.root", "data.workers", "data.eval_batch_size")
NOT_A_VARIANT_BELOW = (
    *("tracking.", "checkpoint.", "model.checkpoint_blocks", "ray.storage_path", "ray.max_failures"),
    *("ray.cpus_per_worker", "ray.use_gpu", "ray.wait_minutes", "ray.collective_timeout"),
)
NO_PEER = ("objective.temperature", "objective.hint_", "optim.agent.")
UNUSED_BELOW = {
    "vit": ("model.agent.", "objective.agent.", "objective.vit.kd", "objective.vit.hint", *NO_PEER),
    "agent": ("objective.vit.", "objective.agent.kd", "objective.agent.hint", *NO_PEER),
}


class Column(NamedTuple):
    """A data set and the share of it that was used."""

    data: str
    fraction: float


class Line(NamedTuple):
    """One network of one method, in one variant."""

    method: str
    network: str
    variant: str  # what sets it apart from the method's other variants; empty where there is one only

    @property
    def title(self) -> str:
        """`vit`, `agent`, `joint.vit` …"""
        alone = self.method in NETWORKS
        return self.method if alone else f"{self.method}.{self.network}"


class Cell(NamedTuple):
    """Top-1 in percent over seeds."""

    mean: float
    sd: float | None  # of the sample; None for one seed
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    split: Split
    paper: float | None


class Apart(NamedTuple):
    """A run that is in no average, and why."""

    row: RunRow
    reason: str


@dataclass(frozen=True)
class Table:
    """Lines x columns, and the runs that are left out."""

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    cells: Mapping[tuple[Line, Column], Cell]
    apart: tuple[Apart, ...]
    used: Mapping[tuple[Line, Column], tuple[RunRow, ...]]


def table(rows: Sequence[RunRow]) -> Table:
    """Average the finished runs over seeds, by method, network, variant, data set and fraction."""
    kept, apart = _sort_out(rows)
    labels = _variant_labels(kept)
    used: dict[tuple[Line, Column], list[RunRow]] = defaultdict(list)
    for row in kept:
        for network in row.scores:
            line = Line(row.method, network, labels[row.method, row.data, _digest(row)])
            used[line, Column(row.data, row.fraction)].append(row)
    cells = {key: average(key[0], found) for key, found in used.items()}
    return Table(
        columns=tuple(sorted({column for _, column in used})),
        lines=tuple(sorted({line for line, _ in used}, key=line_order)),
        cells=cells,
        apart=tuple(apart),
        used={key: tuple(found) for key, found in used.items()},
    )


def line_order(line: Line) -> tuple[int, str, int, str]:
    """Methods and networks in the order of the paper, then the variants."""
    place = METHODS.index(line.method) if line.method in METHODS else len(METHODS)
    return place, line.method, NETWORKS.index(line.network) if line.network in NETWORKS else 2, line.variant


def _sort_out(rows: Sequence[RunRow]) -> tuple[list[RunRow], list[Apart]]:
    """The runs to average; and those that are unfinished, not finite, repeated, or judged by another split."""
    kept: dict[tuple[str, ...], RunRow] = {}
    apart: list[Apart] = []
    tested = {_group(row) for row in rows if row.status == "finished" and row.test}
    for row in rows:
        reason = _why_not(row)
        if reason is None and not row.test and _group(row) in tested:
            reason = "has held-out accuracy only; other runs of its group are judged on the test split"
        key = (*_group(row), str(row.seed))
        if reason is None and key in kept:
            reason = f"repeats seed {row.seed} of {kept[key].name}"
        if reason is None:
            kept[key] = row
        else:
            apart.append(Apart(row, reason))
    return list(kept.values()), apart


def _why_not(row: RunRow) -> str | None:
    if row.status != "finished":
        return f"{row.status} after {row.epochs} epochs" + (f": {row.reason}" if row.reason else "")
    if not row.scores:
        return "has no accuracy"
    broken = {network: value for network, value in row.scores.items() if not math.isfinite(value)}
    return f"accuracy is not finite: {broken}" if broken else None


def _group(row: RunRow) -> tuple[str, ...]:
    return row.method, row.data, repr(row.fraction), _digest(row)


def average(line: Line, rows: Sequence[RunRow]) -> Cell:
    """Mean and sample sd of one network's top-1 over runs that are alike but for their seed."""
    ordered = sorted(rows, key=lambda row: row.seed)
    values = tuple(row.scores[line.network] for row in ordered)
    first = ordered[0]
    return Cell(
        mean=statistics.fmean(values),
        sd=statistics.stdev(values) if len(values) > 1 else None,
        values=values,
        seeds=tuple(row.seed for row in ordered),
        split=first.split,
        paper=paper_points(line.method, line.network, first.config, first.data).get(first.fraction),
    )


# ----------------------------------------------------------------------------------------------- variants


def variant_of(row: RunRow) -> dict[str, str]:
    """What else, besides the table's axes and the seed, can have changed the run's result."""
    unused = (*NOT_A_VARIANT_BELOW, *UNUSED_BELOW.get(row.method, ()))
    kept = {k: v for k, v in row.config.items() if k not in NOT_A_VARIANT and not k.startswith(unused)}
    return kept | ({"data.fingerprint": row.fingerprint} if row.fingerprint else {})


def _digest(row: RunRow) -> str:
    text = json.dumps(variant_of(row), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _variant_labels(rows: Iterable[RunRow]) -> dict[tuple[str, str, str], str]:
    """{(method, data, digest): label}; within a method and a data set the keys that differ tell variants apart."""
    variants: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        variants[row.method, row.data][_digest(row)] = variant_of(row)
    return {
        (*group, digest): _label(digest, found[digest], found.values())
        for group, found in variants.items()
        for digest in found
    }


def _label(digest: str, own: Mapping[str, str], every: Iterable[Mapping[str, str]]) -> str:
    """At most three of the keys that differ; then the digest, which is unique, stands for the rest."""
    every = list(every)
    keys = sorted({key for each in every for key in each})
    differ = [key for key in keys if len({each.get(key) for each in every}) > 1]
    if not differ:
        return ""
    shown = ", ".join(f"{key}={own.get(key, '-')}" for key in differ[:3])
    return shown if len(differ) <= 3 else f"{shown}, {len(differ) - 3} more keys (#{digest})"
