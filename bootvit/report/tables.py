"""Method x fraction: which runs may be averaged, and what they give.

Runs are averaged over seeds only. Two runs that differ in anything else that can change a result are two variants,
in two lines that say what differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bootvit.report.paper import paper_points
from bootvit.report.rows import RunRow, Split

METHODS = ("vit", "agent", "joint", "shared")
NETWORKS = ("vit", "agent")
SPLITS: tuple[Split, ...] = ("test", "held_out")
SHORT = 22  # characters of what tells variants apart that fit into a row's name; else they are A, B, ...

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
    variant: str  # what sets it apart from the method's other variants, in short; empty where there is one only

    @property
    def title(self) -> str:
        """`vit`, `agent`, `joint.vit` …"""
        alone = self.method in NETWORKS
        return self.method if alone else f"{self.method}.{self.network}"

    @property
    def name(self) -> str:
        """The same, and the variant: `joint.vit kd=0.5`, `joint.vit B`."""
        return f"{self.title} {self.variant}".rstrip()


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
    """Lines x columns on one split: test and held-out accuracy never meet in one."""

    split: Split
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    cells: Mapping[tuple[Line, Column], Cell]
    used: Mapping[tuple[Line, Column], tuple[RunRow, ...]]


@dataclass(frozen=True)
class Tables:
    """What was found on every split that was evaluated, test first, and the runs that are left out."""

    parts: tuple[Table, ...]
    apart: tuple[Apart, ...]
    legend: Mapping[str, str]  # {method and variant: what sets it apart, in full}

    @property
    def runs(self) -> list[RunRow]:
        """Every run behind the tables, once."""
        found = {row.place: row for part in self.parts for rows in part.used.values() for row in rows}
        return list(found.values())


def tables(rows: Sequence[RunRow]) -> Tables:
    """Average the finished runs over seeds, by split, method, network, variant, data set and fraction."""
    kept, apart = _sort_out(rows)
    labels, legend = _variant_labels(kept)
    parts = []
    for split in SPLITS:
        used: dict[tuple[Line, Column], list[RunRow]] = defaultdict(list)
        for row in kept:
            for network in row.scores(split):
                line = Line(row.method, network, labels[row.method, row.data, _digest(row)])
                used[line, Column(row.data, row.fraction)].append(row)
        if used:
            parts.append(made({key: tuple(found) for key, found in used.items()}, split))
    return Tables(tuple(parts), tuple(apart), legend)


def made(used: Mapping[tuple[Line, Column], tuple[RunRow, ...]], split: Split) -> Table:
    """The table of the runs of each of its cells."""
    return Table(
        split=split,
        columns=tuple(sorted({column for _, column in used})),
        lines=tuple(sorted({line for line, _ in used}, key=line_order)),
        cells={key: average(key[0], rows, split) for key, rows in used.items()},
        used=used,
    )


def line_order(line: Line) -> tuple[int, str, int, str]:
    """Methods and networks in the order of the paper, then the variants."""
    place = METHODS.index(line.method) if line.method in METHODS else len(METHODS)
    return place, line.method, NETWORKS.index(line.network) if line.network in NETWORKS else 2, line.variant


def _sort_out(rows: Sequence[RunRow]) -> tuple[list[RunRow], list[Apart]]:
    """The runs to average; and those that are unfinished, not finite, or repeated."""
    kept: dict[tuple[str, ...], RunRow] = {}
    apart: list[Apart] = []
    for row in sorted(rows, key=lambda row: not row.test):  # of two with one seed the tested one counts
        reason = _why_not(row)
        key = (row.method, row.data, repr(row.fraction), _digest(row), str(row.seed))
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
    scores = {**row.held_out, **row.test}
    if not scores:
        return "has no accuracy"
    broken = {network: value for network, value in scores.items() if not math.isfinite(value)}
    return f"accuracy is not finite: {broken}" if broken else None


def average(line: Line, rows: Sequence[RunRow], split: Split) -> Cell:
    """Mean and sample sd of one network's top-1 over runs that are alike but for their seed."""
    ordered = sorted(rows, key=lambda row: row.seed)
    values = tuple(row.scores(split)[line.network] for row in ordered)
    first = ordered[0]
    points = paper_points(line.method, line.network, first.config, first.data) if split == "test" else {}
    return Cell(
        mean=statistics.fmean(values),
        sd=statistics.stdev(values) if len(values) > 1 else None,
        values=values,
        seeds=tuple(row.seed for row in ordered),
        split=split,
        paper=points.get(first.fraction),
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


def _variant_labels(rows: Iterable[RunRow]) -> tuple[dict[tuple[str, str, str], str], dict[str, str]]:
    """({(method, data, digest): label}, {method and label: what differs}); keys that differ tell them apart."""
    variants: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        variants[row.method, row.data][_digest(row)] = variant_of(row)
    labels: dict[tuple[str, str, str], str] = {}
    legend: dict[str, str] = {}
    for (method, data), found in variants.items():
        keys = differing(list(found.values()))
        whole = {digest: ", ".join(f"{key}={own.get(key, '-')}" for key in keys) for digest, own in found.items()}
        names = short_keys(keys)
        short = {d: ", ".join(f"{names[key]}={own.get(key, '-')}" for key in keys) for d, own in found.items()}
        if max(map(len, short.values())) > SHORT:
            short = {digest: letters(place) for place, digest in enumerate(sorted(found, key=lambda d: whole[d]))}
        for digest in found:
            labels[method, data, digest] = short[digest]
            if keys:
                legend[f"{method} {short[digest]} on {data}"] = whole[digest]
    return labels, dict(sorted(legend.items()))


def differing(every: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys that have not the same value everywhere."""
    keys = sorted({key for each in every for key in each})
    return [key for key in keys if len({each.get(key) for each in every}) > 1]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """{key: its shortest end that no other key has}: `objective.vit.kd` is `kd`, or `vit.kd` beside the agent's."""

    def ends(key: str) -> list[str]:
        parts = key.split(".")
        return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]

    taken = Counter(end for key in keys for end in ends(key))
    return {key: next((end for end in ends(key) if taken[end] == 1), key) for key in keys}


def letters(place: int) -> str:
    """A, B, … Z, AA, AB, …"""
    rest, last = divmod(place, 26)
    return (letters(rest - 1) if rest else "") + chr(ord("A") + last)
