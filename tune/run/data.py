"""What the driver of a sweep has to know of the data, looked up once for each fraction."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from bootvit.config import Config, DataConfig
from bootvit.data import open_splits
from bootvit.errors import UserError
from bootvit.loop import check_evaluable
from bootvit.models.checks import check_batches
from bootvit.weights import check_weights
from tune.spec.schema import Sweep
from tune.tell.dry_run import Planned


class Facts(NamedTuple):
    """One data set with one fraction."""

    data: str  # fingerprint of the whole data set
    subset: str  # digest of the training images
    images: int  # number of training images
    has_test: bool
    classes: int


@lru_cache(maxsize=256)
def _facts(text: str) -> Facts:
    config = Config.model_validate_json(text)
    splits = open_splits(config.data)
    check_evaluable(config, splits)
    train = splits.train
    return Facts(splits.fingerprint, train.digest, len(train), splits.test is not None, len(splits.classes))


def fingerprints(data: DataConfig) -> Facts:
    """The facts of a data section."""
    return _facts(Config(data=data).model_dump_json())


def plan(configs: Iterable[Config]) -> list[Planned]:
    """The configs with what the dry run's estimate needs of their data."""
    found = ((config, fingerprints(config.data)) for config in configs)
    return [Planned(config, facts.images, facts.classes) for config, facts in found]


def check_data(sweep: Sweep, configs: Iterable[Config]) -> None:
    """Open every data set, fraction and file of weights that the sweep uses; `UserError` for an unusable one."""
    checked: set[str] = set()
    for config in configs:
        facts = fingerprints(config.data)
        networks = config.model_dump_json(include={"method": True, "model": True, "data": {"image_size"}})
        if networks not in checked:
            _check_weights(sweep, config)
            checked.add(networks)
        check_batches(config, facts.images)
        if sweep.file.test == "retrain" and not facts.has_test:
            source = config.data.source
            raise UserError(f"{sweep.path}: test=retrain: data.source={source} has no test split; use test: trial")
        if sweep.file.test == "retrain" and sweep.file.algorithm == "pbt":
            raise UserError(f"{sweep.path}: test=retrain: pbt's winner is a schedule, not a setting; use test: trial")


def _check_weights(sweep: Sweep, config: Config) -> None:
    try:
        check_weights(config)
    except UserError as err:
        raise UserError(f"{sweep.path}: {err}") from err
