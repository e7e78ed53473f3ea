"""The sweep file's schema."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_serializer, field_validator, model_validator

from bootvit.addresses import public_address
from bootvit.config import Config, Positive, Section
from tune.spec.domain import Domain

SMALL = ("loss", "ece")  # measures of which less is better
METRIC = r"^held_out\.(vit|agent)\.(ema_)?(top1|top5|loss|balanced_accuracy|macro_f1|auroc|ece)$"

if TYPE_CHECKING:
    from bootvit.storage import Place


OWN = ("grid", "random", "pbt")  # algorithms that know their trials at the start
TUNES = ("ax", "bayesopt", "bohb", "hebo", "hyperopt", "nevergrad", "zoopt")  # Ray Tune's names of its searchers


class SearchConfig(Section):
    """How settings are chosen."""

    read_by = (
        "tune/decide/search.py",
        "tune/decide/population.py",
        "tune/decide/optuna_study.py",
        "tune/spec/space.py",
    )
    algorithm: str | None = Field(
        None,
        description="grid, random, optuna, pbt; one of Ray Tune's searchers by its name, or its module:Class, if it "
        "takes a seed; null: grid if every key is a grid, else random.",
    )
    samples: int = Field(
        1, ge=1, description="Settings drawn for each cell of the grid; for pbt the population's size."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="What the drawn settings depend on.")
    sampler: Literal["tpe", "gp", "qmc"] = Field("tpe", description="Optuna's way to suggest, for algorithm=optuna.")
    interval: int = Field(1, ge=1, description="Epochs between two exchanges of a population, for algorithm=pbt.")
    quantile: float = Field(
        0.25, gt=0, le=0.5, description="Share of a population that copies a better member, for algorithm=pbt."
    )

    @field_validator("algorithm")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        names = (*OWN, "optuna", *TUNES)
        if value is None or value in names or re.fullmatch(r"[\w.]+:\w+", value):
            return value
        near = get_close_matches(value, names, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown algorithm {value!r}{hint}; known: {', '.join(names)}, or module:Class of a searcher")


class SchedulerConfig(Section):
    """Which running trials are stopped early; only trials of one group are compared."""

    read_by = ("tune/decide/stopping.py",)
    name: Literal["asha", "hyperband", "median", "none"] = Field(
        "none", description="The rule by which poor trials are stopped early."
    )
    grace_epochs: int = Field(1, ge=1, description="Epochs before which no trial is stopped.")
    reduction: float = Field(3, gt=1, description="At every rung one trial in so many goes on (not for median).")


class SelectConfig(Section):
    """What makes a setting the best; always measured on held-out training images."""

    read_by = ("tune/decide/select.py", "tune/spec/space.py")
    metric: Annotated[str, Field(pattern=METRIC)] = Field(
        "held_out.vit.top1",
        description="The measure, held_out.NETWORK.top1, or in top1's place top5, loss, balanced_accuracy, macro_f1, "
        "auroc or ece, with ema_ before it for averaged weights; of a trial that trains only the other network, "
        "that one's.",
    )
    mode: Literal["max", "min"] | None = Field(
        None, description="Whether the largest or the smallest is the best; null: min for loss and ece, else max."
    )

    @model_validator(mode="after")
    def _loss_is_small(self) -> Self:
        if self.mode == "max" and self.metric.endswith(SMALL):
            raise ValueError(f"mode=max with metric={self.metric}: smaller is better; leave mode out")
        return self

    @property
    def best(self) -> Literal["max", "min"]:
        """`mode`, or what the metric asks for."""
        return self.mode or ("min" if self.metric.endswith(SMALL) else "max")


class ResourcesConfig(Section):
    """What one trial takes, all its workers together."""

    read_by = ("tune/spec/schema.py", "tune/run/capacity.py")
    cpu: Positive | None = Field(
        None, description="CPUs of a trial; null: ray.num_workers x ray.cpus_per_worker of the base."
    )
    gpu: float = Field(0, ge=0, description="GPUs of a trial; four trials of 0.25 share one.")


class BudgetConfig(Section):
    """When it is spent no new trial starts."""

    read_by = ("tune/decide/budget.py",)
    trials: int | None = Field(None, ge=1, description="Trials that may be begun; null: all.")
    hours: Positive | None = Field(None, description="Hours of wall time, over all resumptions; null: no limit.")
    gpu_hours: Positive | None = Field(None, description="Hours of all GPUs of all trials; null: no limit.")
    at_end: Literal["finish", "stop"] = Field("finish", description="What running trials do once the time is spent.")

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return (self.trials, self.hours, self.gpu_hours) != (None, None, None)


class SweepFile(Section):
    """A sweep, as the file says it."""

    read_by = (
        "tune/spec/load.py",
        "tune/spec/schema.py",
        "tune/spec/space.py",
        "tune/run/driver.py",
        "tune/run/tuner.py",
    )
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+,-]*$", max_length=100, description="The sweep's name and its folder's."
    )
    base: str = Field(
        description="The config that every trial begins with: a file, relative to this one, or a shipped config's name."
    )
    set: dict[str, Any] = Field({}, description="Keys of the base that have another value in all trials of this sweep.")
    space: dict[str, tuple[Domain, ...]] = Field(
        description="The keys that are searched, each with a domain, or a list: the first whose `when` holds counts."
    )
    search: SearchConfig = SearchConfig()
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] | None = Field(
        None, description="Seeds with which every setting is repeated; null: the base's seed."
    )
    scheduler: SchedulerConfig = SchedulerConfig()
    group_by: tuple[str, ...] | None = Field(
        None, description="Keys whose values separate groups that never compete; null: data.fraction and method."
    )
    select: SelectConfig = SelectConfig()
    fidelity: Literal["data.fraction"] | None = Field(
        None, description="The key whose small values are rungs on the way to the largest; null: none."
    )
    concurrency: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Trials at a time; auto: as many as the cluster has room for."
    )
    resources: ResourcesConfig = ResourcesConfig()
    budget: BudgetConfig = BudgetConfig()
    retries: int = Field(2, ge=0, description="How often a trial that crashes is begun again, from its checkpoint.")
    trial_timeout: Positive | None = Field(
        None,
        description="Seconds without a report, such as an epoch's end, after which a trial is begun again; null: none.",
    )
    callbacks: tuple[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], ...] = Field(
        (), description="Callbacks of Ray Tune's as module:Class, such as ray.tune.logger:TBXLoggerCallback."
    )
    progress: Literal["lines", "table"] = Field(
        "lines", description="What the terminal shows: a line a trial, or Tune's table too."
    )
    test: Literal["trial", "retrain"] = Field(
        "trial",
        description="What of a winner meets the test set, once: the trial itself, or one trained anew on all images.",
    )

    @field_serializer("set")
    def _without_secrets(self, values: dict[str, Any]) -> dict[str, Any]:
        return {key: public_address(value) if isinstance(value, str) else value for key, value in values.items()}

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
            for key, domain in self.domains:
                if domain.kind != "grid":
                    raise ValueError(f"search.algorithm=grid, but space.{key} is {domain.kind}: use grid, or random")
        if (self.suggests or self.algorithm == "pbt") and all(d.kind == "grid" for _, d in self.domains):
            raise ValueError(f"search.algorithm={self.algorithm} has nothing to choose: every key of space is a grid")
        if self.algorithm == "pbt":
            self._check_pbt()
        return self

    def _check_fidelity(self, key: str) -> None:
        found = [domain for name, domain in self.domains if name == key]
        domain = found[0] if len(found) == 1 else None
        if domain is None or domain.kind != "grid" or domain.when or len(domain.values) < 2:
            raise ValueError(
                f"fidelity={key} needs space.{key}: {{grid: [...]}} with at least two values, without when"
            )
        if key in (self.group_by or ()):
            raise ValueError(
                f"fidelity={key}: small fractions are rungs for the largest, so they cannot be in group_by"
            )
        if self.suggests or self.algorithm == "pbt":
            raise ValueError(f"fidelity={key} works with search.algorithm grid or random, not {self.algorithm}")

    def _check_pbt(self) -> None:
        if self.scheduler.name != "none":
            raise ValueError("search.algorithm=pbt replaces losers itself: set scheduler: none")
        for key, domain in self.domains:
            if domain.kind != "grid" and not key.startswith(("objective.", "optim.")):
                raise ValueError(f"search.algorithm=pbt changes {key} while training: only objective and optim can")

    @property
    def domains(self) -> list[tuple[str, Domain]]:
        """Every domain of every key."""
        return [(key, domain) for key, domains in self.space.items() for domain in domains]

    @property
    def algorithm(self) -> str:
        """The search algorithm, `search.algorithm` or what the space asks for."""
        only_grids = all(domain.kind == "grid" for _, domain in self.domains)
        return self.search.algorithm or ("grid" if only_grids else "random")

    @property
    def suggests(self) -> bool:
        """Whether a searcher is asked for settings, one after another."""
        return self.algorithm not in OWN


@dataclass(frozen=True)
class Sweep:
    """A sweep file with everything it refers to."""

    file: SweepFile
    base: Config
    path: Path
    copy: Path | None = None  # the driver's, of a sweep in an object store

    @property
    def place(self) -> Place:
        """Where the sweep is: `<ray.storage_path>/<name>/`."""
        from bootvit.storage import place_at  # with Arrow, which a sweep file does not need

        return place_at(self.base.ray.storage_path) / self.file.name

    @property
    def folder(self) -> Path:
        """The same, as its driver has it."""
        place = self.copy or self.place
        assert isinstance(place, Path), "a sweep in a store has no folder before it is taken"
        return place

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of every setting."""
        return self.file.seeds or (self.base.seed,)

    @property
    def cpus(self) -> float:
        """CPUs of one trial, all its workers together."""
        return float(self.file.resources.cpu or self.base.ray.most * self.base.ray.cpus_per_worker)

    @property
    def gpus(self) -> float:
        """GPUs of one trial, all its workers together."""
        return self.file.resources.gpu

    @property
    def group_by(self) -> tuple[str, ...]:
        """The keys whose values separate groups that never compete."""
        default = tuple(key for key in ("data.fraction", "method") if key != self.file.fidelity)
        return default if self.file.group_by is None else self.file.group_by


def get(config: Config, key: str) -> Any:
    """The value of a dotted key, as JSON has it."""
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return json.loads(json.dumps(node.model_dump(mode="json") if hasattr(node, "model_dump") else node))
