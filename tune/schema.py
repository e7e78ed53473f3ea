"""The sweep file: its schema, and how files and overrides become one `Sweep`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bootvit.config import (
    Config,
    Positive,
    Section,
    explain,
    find_config,
    load_config,
    make_config,
    merge,
    nest,
    parse_override,
    parse_yaml,
    read_layers,
    validate,
)
from bootvit.errors import UserError
from tune.domain import DOMAINS, Domain

__all__ = ["Sweep", "SweepFile", "explain", "load_sweep"]

FORBIDDEN = {
    "name": "every trial has its own name",
    "seed": "use `seeds: [0, 1, 2]`",
    "ray": "it says where trials run, not what they compute; use `resources`",
    "tracking": "it says where trials are recorded, not what they compute",
    "data.held_out": "trials that hold out different images cannot be compared",
}
HELD_OUT = 0.1  # where neither the base nor the sweep says how many images selection needs
METRIC = r"^held_out\.(vit|agent)\.(top1|top5|loss)$"


class SearchConfig(Section):
    """How settings are chosen."""

    algorithm: Literal["grid", "random", "optuna", "pbt"] | None = Field(
        None, description="null: grid if every key is a grid, else random"
    )
    samples: int = Field(1, ge=1, description="settings drawn for each cell of the grid; pbt: size of a population")
    seed: int = Field(0, ge=0, lt=2**32)
    sampler: Literal["tpe", "gp", "qmc"] = Field("tpe", description="Optuna's")
    interval: int = Field(1, ge=1, description="pbt: epochs between two exchanges")
    quantile: float = Field(0.25, gt=0, le=0.5, description="pbt: share of members that copy a better one")


class SchedulerConfig(Section):
    """Which running trials are stopped early; only trials of one group are compared."""

    name: Literal["asha", "none"] = "none"
    grace_epochs: int = Field(1, ge=1, description="no trial is stopped before it has done so many epochs")
    reduction: float = Field(3, gt=1, description="one trial in so many goes on at every rung")


class SelectConfig(Section):
    """What makes a setting the best; always measured on held-out training images."""

    metric: Annotated[str, Field(pattern=METRIC)] = Field(
        "held_out.vit.top1", description="of a trial that trains only the other network: that one's"
    )
    mode: Literal["max", "min"] = "max"


class ResourcesConfig(Section):
    """What one trial takes, all its workers together."""

    cpu: Positive | None = Field(None, description="null: ray.num_workers x ray.cpus_per_worker of the base")
    gpu: float = Field(0, ge=0, description="may be a fraction: four trials of 0.25 share a GPU")


class BudgetConfig(Section):
    """When it is spent no new trial starts."""

    trials: int | None = Field(None, ge=1)
    hours: Positive | None = Field(None, description="wall time, over all resumptions")
    gpu_hours: Positive | None = Field(None, description="of all trials")
    at_end: Literal["finish", "stop"] = Field("finish", description="what running trials do when the time is spent")


class SweepFile(Section):
    """A sweep, as the file says it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+,-]*$", max_length=100)
    base: str
    set: dict[str, Any] = Field({}, description="keys of the base that are other in this sweep, the same in all trials")
    space: dict[str, Domain]
    search: SearchConfig = SearchConfig()
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] | None = Field(None, description="null: the base's seed")
    scheduler: SchedulerConfig = SchedulerConfig()
    group_by: tuple[str, ...] | None = Field(None, description="null: data.fraction and method")
    select: SelectConfig = SelectConfig()
    fidelity: Literal["data.fraction"] | None = Field(None, description="small fractions are rungs for the largest")
    concurrency: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    resources: ResourcesConfig = ResourcesConfig()
    budget: BudgetConfig = BudgetConfig()
    retries: int = Field(2, ge=0, description="of a trial that crashes, from its checkpoint")
    test: Literal["trial", "retrain"] = Field("trial", description="how the winners meet the test set, once")

    @field_validator("scheduler", mode="before")
    @classmethod
    def _none_is_a_scheduler(cls, value: Any) -> Any:
        return {"name": "none"} if value in ("none", None) else value

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) != max(len(value), 1):
            raise ValueError("give at least one seed, and each of them once")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if not self.space:
            raise ValueError("space is empty: name at least one key, such as data.fraction: {grid: [0.05, 0.1]}")
        if self.fidelity:
            self._check_fidelity(self.fidelity)
        if self.algorithm == "grid":
            for key, domain in self.space.items():
                if domain.kind != "grid":
                    raise ValueError(f"search.algorithm=grid, but space.{key} is {domain.kind}: use grid, or random")
        if self.algorithm in ("optuna", "pbt") and all(d.kind == "grid" for d in self.space.values()):
            raise ValueError(f"search.algorithm={self.algorithm} has nothing to choose: every key of space is a grid")
        if self.algorithm == "pbt":
            self._check_pbt()
        return self

    def _check_fidelity(self, key: str) -> None:
        domain = self.space.get(key)
        if domain is None or domain.kind != "grid" or domain.when or len(domain.values) < 2:
            raise ValueError(
                f"fidelity={key} needs space.{key}: {{grid: [...]}} with at least two values, without when"
            )
        if key in (self.group_by or ()):
            raise ValueError(
                f"fidelity={key}: small fractions are rungs for the largest, so they cannot be in group_by"
            )
        if self.algorithm in ("optuna", "pbt"):
            raise ValueError(f"fidelity={key} works with search.algorithm grid or random, not {self.algorithm}")

    def _check_pbt(self) -> None:
        if self.scheduler.name != "none":
            raise ValueError("search.algorithm=pbt replaces losers itself: set scheduler: none")
        for key, domain in self.space.items():
            if domain.kind != "grid" and not key.startswith(("objective.", "optim.")):
                raise ValueError(f"search.algorithm=pbt changes {key} while training: only objective and optim can")

    @property
    def algorithm(self) -> str:
        """The search algorithm, `search.algorithm` or what the space asks for."""
        only_grids = all(domain.kind == "grid" for domain in self.space.values())
        return self.search.algorithm or ("grid" if only_grids else "random")


@dataclass(frozen=True)
class Sweep:
    """A sweep file with everything it refers to."""

    file: SweepFile
    base: Config
    path: Path

    @property
    def folder(self) -> Path:
        """`<ray.storage_path>/<name>/`."""
        return Path(self.base.ray.storage_path) / self.file.name

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every setting."""
        return self.file.seeds or (self.base.seed,)

    @property
    def group_by(self) -> tuple[str, ...]:
        """The keys whose values separate groups that never compete."""
        default = tuple(key for key in ("data.fraction", "method") if key != self.file.fidelity)
        return default if self.file.group_by is None else self.file.group_by


def load_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep file; keys of its own schema are the sweep's, all others the base config's.

    Raises `UserError` for a missing file, an unknown key, a wrong type or a value that fits no trial.
    """
    path = find_config(name)
    data = read_layers(path)
    if isinstance(data.get("base"), str):
        data["base"] = str(_base_path(path, data["base"]))
    origins: dict[str, str] = {}
    for_base = []
    for text in overrides:
        key, value = parse_override(text)
        if key.split(".")[0] in SweepFile.model_fields:
            data = merge(data, nest(key, value))
            origins[key] = f"override {text!r}"
        else:
            for_base.append(text)
    if isinstance(data.get("space"), dict):
        data["space"] = flatten_space(data["space"])
    if isinstance(data.get("set"), dict):
        data["set"] = flatten_values(data["set"])
    file = validate(SweepFile, data, str(path), origins)
    for text in for_base:
        key, _ = parse_override(text)
        if key in file.space:
            raise UserError(f"override {text!r}: the sweep searches {key}; change space.{key} instead")
    for key in file.set:
        if key in file.space:
            raise UserError(f"{path}: set.{key}: the sweep searches this key; remove it from one of the two")
    sweep = Sweep(file, _base_config(path, file, for_base), path)
    check_keys(sweep)
    return sweep


def _base_config(path: Path, file: SweepFile, overrides: Sequence[str]) -> Config:
    """The base with `set` and the command line's keys; without a held-out part a sweep could select nothing."""
    base = load_config(file.base)
    data = base.model_dump(mode="json")
    origins = {}
    for key, value in file.set.items():
        data, origins[key] = merge(data, nest(key, value)), f"{path}: set"
    for text in overrides:
        key, value = parse_override(text)
        data, origins[key] = merge(data, nest(key, value)), f"override {text!r}"
    if data["data"]["held_out"] == 0:
        data["data"]["held_out"] = HELD_OUT
    return make_config(data, file.base, origins)


def _base_path(path: Path, base: str) -> Path:
    """Where `base` of a sweep file is: beside the file that says so, else a shipped config."""
    layer = _layer_with_base(path.resolve()) or path.resolve()
    there = layer.parent / base
    return there if there.is_file() else find_config(base)


def _layer_with_base(path: Path) -> Path | None:
    """The file, of a sweep file and those that it extends, whose `base` counts."""
    data = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    if "base" in data:
        return path
    parents = data.get("extends", [])
    for parent in reversed([parents] if isinstance(parents, str) else parents):
        found = _layer_with_base((path.parent / parent).resolve())
        if found:
            return found
    return None


def flatten_space(space: dict[str, Any]) -> dict[str, Any]:
    """`{data: {fraction: {grid: ...}}}` as `{data.fraction: {grid: ...}}`; a key set to null is taken out."""
    out: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if value is None:
                out.pop(prefix + key, None)
            elif isinstance(value, dict) and not set(value) & {*DOMAINS, "when"} and _all_mappings(value):
                walk(value, f"{prefix}{key}.")
            elif isinstance(value, dict):
                out[prefix + key] = merge(out.get(prefix + key, {}), value)
            else:
                out[prefix + key] = value

    walk(space, "")
    return out


def flatten_values(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{data: {held_out: 0.1}}` as `{data.held_out: 0.1}`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flatten_values(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _all_mappings(value: dict[str, Any]) -> bool:
    return bool(value) and all(isinstance(part, dict) or part is None for part in value.values())


def check_keys(sweep: Sweep) -> None:
    """Refuse keys that cannot be searched, grouped by, or asked for in `when`."""
    from bootvit.config import suggest

    for key, domain in sweep.file.space.items():
        for forbidden, reason in FORBIDDEN.items():
            if key == forbidden or key.startswith(f"{forbidden}."):
                raise UserError(f"{sweep.path}: space.{key} cannot be searched: {reason}")
        for other in domain.when:
            if not known(sweep.base, other):
                raise UserError(
                    f"{sweep.path}: space.{key}.when: unknown key {other!r}{suggest(Config, other.split('.'))}"
                )
    for key in sweep.group_by:
        if not known(sweep.base, key):
            raise UserError(f"{sweep.path}: group_by: unknown key {key!r}{suggest(Config, key.split('.'))}")


def known(config: Config, key: str) -> bool:
    """Whether a config has this dotted key."""
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def get(config: Config, key: str) -> Any:
    """The value of a dotted key, as JSON has it."""
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return json.loads(json.dumps(node.model_dump(mode="json") if hasattr(node, "model_dump") else node))
