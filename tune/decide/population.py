"""Population based training, in rounds: the worst members copy the best ones and change what they copied.

Every member of a population trains `search.interval` epochs; when all have, the exchange is decided, from the values
and the seed alone. So a sweep that was killed makes the same exchanges again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tune.decide.log import Event, Trial
from tune.decide.select import worst
from tune.spec.domain import Domain
from tune.spec.schema import Sweep
from tune.spec.space import Setting, canonical, domain_of, uniform

RESAMPLE = 0.25  # chance that a value is drawn anew instead of moved
FACTORS = (0.8, 1.25)


def population(sweep: Sweep, trial: Trial) -> str:
    """Members may copy one another if they are of one cell of the grid, and of one seed."""
    drawn = drawn_domains(sweep, trial.spec.overrides)
    cell = {key: value for key, value in trial.spec.overrides.items() if key not in drawn}
    return canonical([trial.spec.group, cell, trial.spec.seed])


def exchange(sweep: Sweep, members: Sequence[Trial], epoch: int) -> list[Event]:
    """What the worst members copy from the best after `epoch` epochs: {"id", "donor", "overrides"}.

    Only values that were measured in this round are compared; a member without one counts as the worst.
    """
    search = sweep.file.search
    sign = 1 if sweep.file.select.best == "max" else -1

    def rank(member: Trial) -> tuple[float, str]:
        new = [at for at in member.values if epoch - search.interval < at <= epoch]
        return sign * (member.values[max(new)] if new else worst(sweep)), member.spec.id

    ranked = sorted(members, key=rank)
    count = min(int(len(ranked) * search.quantile) or 1, len(ranked) // 2)
    changes = []
    for loser in ranked[:count]:
        donor = ranked[len(ranked) - count + int(uniform(search.seed, loser.spec.id, epoch, "donor") * count)]
        mutated = {
            key: mutate(donor.overrides[key], domain, uniform(search.seed, loser.spec.id, epoch, key, "move"))
            if uniform(search.seed, loser.spec.id, epoch, key, "how") >= RESAMPLE
            else domain.draw(uniform(search.seed, loser.spec.id, epoch, key, "draw"))
            for key, domain in drawn_domains(sweep, donor.overrides).items()
        }
        changes.append({"id": loser.spec.id, "donor": donor.spec.id, "overrides": {**donor.overrides, **mutated}})
    return changes


def drawn_domains(sweep: Sweep, setting: Setting) -> dict[str, Domain]:
    """The domains of a setting's keys, grids aside."""
    found = {key: domain_of(sweep, key, setting) for key in setting}
    return {key: domain for key, domain in found.items() if domain is not None and domain.kind != "grid"}


def mutate(value: Any, domain: Domain, u: float) -> Any:
    """A neighbour of a value, inside its domain."""
    if domain.listed:
        place = domain.values.index(value) + (1 if u < 0.5 else -1)
        return domain.values[min(max(place, 0), len(domain.values) - 1)]
    low, high = domain.values
    moved = min(max(value * FACTORS[u < 0.5], low), high)
    return round(moved) if domain.kind == "randint" else moved
