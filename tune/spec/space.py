"""From a search space to settings and trials: cells of the grid, draws, conditions, and the check of every value."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bootvit.config import Config, merge, nest, validate, whole
from bootvit.errors import UserError
from bootvit.models.checks import check_models
from bootvit.storage import address_of
from tune.spec.domain import Domain
from tune.spec.schema import Sweep, get

LABEL = 100  # characters of what a trial's name says of it
Setting = dict[str, Any]  # searched key -> value; only the keys that count there
Draw = Callable[[str, Domain], Any]


@dataclass(frozen=True)
class Spec:
    """One trial: a setting with a seed."""

    id: str
    group: str
    seed: int
    overrides: Setting

    @property
    def setting(self) -> str:
        """What the trials that differ only in their seed have in common."""
        return canonical(self.overrides)


def canonical(value: Any) -> str:
    """Equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def uniform(*parts: Any) -> float:
    """A number in [0, 1) that depends on `parts` alone."""
    digest = hashlib.sha256(canonical(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# ------------------------------------------------------------------------------------------------ settings


def in_order(space: Mapping[str, Sequence[Domain]], path: object = "space") -> list[str]:
    """The keys, each after those that its `when` asks for, otherwise as the file has them."""
    out: list[str] = []

    def visit(key: str, above: tuple[str, ...]) -> None:
        if key in above:
            raise UserError(f"{path}: space.{key}.when depends on itself through {' -> '.join((*above, key))}")
        for other in [name for domain in space[key] for name in domain.when]:
            if other in space and other not in out:
                visit(other, (*above, key))
        if key not in out:
            out.append(key)

    for key in space:
        visit(key, ())
    return out


def counts(domain: Domain, setting: Setting, base: Config) -> bool:
    """Whether a key's `when` holds in this setting."""
    for key, wanted in domain.when.items():
        value = setting[key] if key in setting else get(base, key)
        if value not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def domain_of(sweep: Sweep, key: str, setting: Setting) -> Domain | None:
    """The domain that a key has in this setting: the first whose condition holds; None if the key does not count."""
    return next((domain for domain in sweep.file.space[key] if counts(domain, setting, sweep.base)), None)


def settings(sweep: Sweep, draw: Draw | None) -> Iterator[Setting]:
    """Every cell of the grid with one draw for each of its other keys; without `draw` these are left out."""
    space = sweep.file.space
    keys = in_order(space, sweep.path)

    def walk(left: Sequence[str], setting: Setting) -> Iterator[Setting]:
        if not left:
            yield setting
            return
        key, rest = left[0], left[1:]
        domain = domain_of(sweep, key, setting)
        if domain is None:
            yield from walk(rest, setting)
        elif domain.kind == "grid":
            for value in domain.values:
                yield from walk(rest, {**setting, key: value})
        else:
            yield from walk(rest, setting if draw is None else {**setting, key: draw(key, domain)})

    yield from walk(keys, {})


def sample(sweep: Sweep, number: int) -> Iterator[Setting]:
    """Draw `number` for every cell: the same quantile of a key in every cell, so that cells can be compared."""
    seed = sweep.file.search.seed
    yield from settings(sweep, lambda key, domain: domain.draw(uniform(seed, number, key)))


def planned_settings(sweep: Sweep) -> list[Setting]:
    """The settings of a grid or random search, or of PBT's first round; equal ones once, draw by draw."""
    samples = 1 if sweep.file.algorithm == "grid" else sweep.file.search.samples
    every = (setting for number in range(samples) for setting in sample(sweep, number))
    if sweep.file.algorithm == "pbt":  # members of a population may start equal
        return list(every)
    return distinct(sweep, every)


def distinct(sweep: Sweep, every: Iterator[Setting]) -> list[Setting]:
    """Settings that lead to the same run are one."""
    seen: dict[str, Setting] = {}
    for setting in every:
        config = trial_config(sweep, setting, sweep.seeds[0])
        seen.setdefault(canonical(config.model_dump(mode="json")), setting)
    return list(seen.values())


def count_trials(sweep: Sweep) -> int:
    """How many trials there are at most."""
    if sweep.file.suggests:
        return sweep.file.search.samples * len(list(settings(sweep, None))) * len(sweep.seeds)
    return len(planned_settings(sweep)) * len(sweep.seeds)


# -------------------------------------------------------------------------------------------------- trials


def make_specs(sweep: Sweep, pairs: Sequence[tuple[Setting, int]], first: int) -> list[Spec]:
    """A trial for each setting and seed, numbered from `first`."""
    specs: list[Spec] = []
    for setting, seed in pairs:
        group = group_name(sweep, trial_config(sweep, setting, seed))
        specs.append(Spec(f"{first + len(specs):04d}-{label(sweep, setting, seed)}", group, seed, setting))
    return specs


def label(sweep: Sweep, setting: Setting, seed: int) -> str:
    """What a trial's name says of it: the values in which trials differ, as far as there is room."""
    keys = [key for key in differing(sweep) if key in setting]
    last = [key.split(".")[-1] for key in keys]
    names = [
        key.removeprefix("objective.") if last.count(end) > 1 else end for key, end in zip(keys, last, strict=True)
    ]
    values = [f"{name}={short(setting[key])}" for name, key in zip(names, keys, strict=True)]
    text = "".join(f"{value}," for value in values)[: LABEL - len(f"seed={seed}")] + f"seed={seed}"
    return re.sub(r"[^A-Za-z0-9._=+,-]", "_", text)


def differing(sweep: Sweep) -> list[str]:
    """The searched keys with more than one value; those that a population changes are left out."""
    copied = sweep.file.algorithm == "pbt"
    return [
        key
        for key, domains in ((key, sweep.file.space[key]) for key in in_order(sweep.file.space))
        if len(domains) > 1 or len(set(map(canonical, domains[0].values))) > 1 or domains[0].when
        if not (copied and any(domain.kind != "grid" for domain in domains))
    ]


def short(value: Any) -> str:
    """A value in a name."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def get_value(sweep: Sweep, setting: Setting, key: str) -> Any:
    """A key's value in a setting, else in the base."""
    return setting[key] if key in setting else get(sweep.base, key)


def group_name(sweep: Sweep, config: Config) -> str:
    """`data.fraction=0.1 method=joint`: trials with another one do not compete with this."""
    return " ".join(f"{key}={get(config, key)}" for key in sweep.group_by) or "all"


def trial_config(sweep: Sweep, setting: Setting, seed: int, name: str = "trial") -> Config:
    """The whole config of a trial, checked; a value that does not fit is a `UserError` that names it."""
    data = whole(sweep.base)
    origins = dict.fromkeys(setting, f"{sweep.path}: space")
    for key, value in setting.items():
        data = merge(data, nest(key, value))
    data = merge(data, {"seed": seed, "name": name, "ray": {"storage_path": address_of(sweep.place / "trials")}})
    return validate(Config, data, str(sweep.path), origins)


# ----------------------------------------------------------------------------------------------- the check


def check_space(sweep: Sweep) -> list[Config]:
    """Every trial that is planned, and both ends of every range in every cell, as configs.

    Raises `UserError` at the first that the schema, the models or the selection refuse.
    """
    configs: dict[str, Config] = {}
    for setting in trial_settings(sweep):
        config = trial_config(sweep, setting, sweep.seeds[0])
        configs.setdefault(canonical(config.model_dump(mode="json")), config)
    checked: set[str] = set()
    for config in configs.values():
        shape = canonical(
            [config.method, config.model.model_dump(), config.data.image_size, config.objective.model_dump()]
        )
        if shape not in checked:
            _check_model(sweep, config)
            checked.add(shape)
        _check_selection(sweep, config)
    return list(configs.values())


def trial_settings(sweep: Sweep) -> Iterator[Setting]:
    """The settings that `check_space` looks at."""
    if not sweep.file.suggests:
        yield from planned_settings(sweep)
    for _, domain in sweep.file.domains:
        if domain.kind == "grid":
            continue
        for end in domain.values:
            yield from settings(sweep, lambda _, d, domain=domain, end=end: end if d is domain else d.values[0])  # type: ignore[misc]


def _check_model(sweep: Sweep, config: Config) -> None:
    try:
        check_models(config)
    except UserError as err:
        raise UserError(f"{sweep.path}: space: method={config.method}: {err}") from err


def _check_selection(sweep: Sweep, config: Config) -> None:
    """Refuse decisions at epochs that are not evaluated."""
    grace, name = sweep.file.scheduler.grace_epochs, sweep.file.scheduler.name
    every, total = config.schedule.eval_every, config.schedule.epochs
    if name != "none" and grace > total:
        raise UserError(f"{sweep.path}: scheduler.grace_epochs={grace} is more than schedule.epochs={total}")
    if name != "none" and grace % every:
        raise UserError(
            f"{sweep.path}: scheduler.grace_epochs={grace}: no evaluation is there with schedule.eval_every={every}: "
            f"set grace_epochs to a multiple of it, such as {every * (grace // every + 1)}"
        )
    interval = sweep.file.search.interval
    if sweep.file.algorithm == "pbt" and interval < min(every, total):
        raise UserError(
            f"{sweep.path}: search.interval={interval}: members cannot be compared after so many epochs, because they "
            f"are evaluated every schedule.eval_every={every}: set interval to {every} or more"
        )


def metric_of(config: Config, metric: str) -> str:
    """The journal's name of the selection metric: that of the trial's only network, if it lacks the one asked for."""
    split, net, score = metric.split(".")
    return f"{split}/{net if net in config.networks else config.networks[0]}/{score}"
