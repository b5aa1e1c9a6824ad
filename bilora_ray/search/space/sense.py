"""What a space file may say and nobody means: refused where it can never be right, and noted where it does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import range_of
from bilora_ray.paths import kind_of
from bilora_ray.search.space.space import Space


def check_sense(space: Space) -> None:
    """Refuse a target that no metric has, a first trial of no settings, and test rows that are missing or the trials'.

    Raises:
        UserError: one of these.
    """
    target, metric = space.study.target, space.objectives[0].metric
    least, greatest = range_of(metric)
    if target is not None and not least <= target <= greatest:
        raise UserError(f"{space.path}: study.target: {target:g}, and {metric} is from {least:g} to {greatest:g}")
    for index, point in enumerate(space.study.points_to_evaluate):
        if not point:
            raise UserError(f"{space.path}: study.points_to_evaluate[{index}]: names no setting")
    config = space.first_config()
    if config.retention_data is not None and not config.has_test:
        raise UserError(f"{space.path}: trial.retention_data: is read where test rows are scored; give trial.test_data")
    if config.has_test:
        test = _source(config.on_test())
        for source, other in (("train_data", config), ("validation_data", _on_validation(config))):
            if test == _source(other):
                raise UserError(f"{space.path}: trial.test_data: is {source}, and a test is of rows that no trial saw")


def _source(config: TrialConfig) -> tuple[str | None, ...]:
    """What identifies the rows: only the Hub has splits and revisions, and a local file may have many names."""
    kind = kind_of(config.train_data, is_data=True)
    if kind == "hub":
        return (config.train_data, config.train_split, config.train_revision)
    return (os.path.realpath(config.train_data) if kind == "local" else config.train_data,)


def _on_validation(config: TrialConfig) -> TrialConfig:
    """As `TrialConfig.on_test`, of the validation rows; of none that are named, the settings as they are."""
    name, split = config.validation_data, config.validation_split
    if name is None and split is None:
        return config
    revision = config.train_revision if name is None else config.validation_revision
    update = {"train_data": name or config.train_data, "train_split": split or "train", "train_revision": revision}
    return config.model_copy(update=update)


def without_effect(space: Space, rows: int | None = None) -> Iterator[str]:
    """Lines about what the numbers of a study make idle.

    Args:
        space: the space.
        rows: that a trial trains on; None: not known.
    """
    study = space.study
    if study.finalists > study.num_trials:
        yield f"finalists: {study.finalists} are more than the {study.num_trials} trials (num_trials): all are chosen"
    if study.scheduler == "pbt" and study.population > study.num_trials:
        lent = f"{study.population} are more than the {study.num_trials} trials (num_trials)"
        yield f"population: {lent}, so that weak ones lend their checkpoints too"
    longest, unit = _longest(space, rows), study.rung_unit or "steps"
    if study.grace_period is not None and longest is not None and study.grace_period >= longest:
        does = "ends by the others" if study.scheduler == "pbt" else "is stopped early"
        yield f"grace_period: {study.grace_period:g} {unit}, and the longest trial has {longest:g}, so that none {does}"


def _longest(space: Space, rows: int | None) -> float | None:
    """How much of the unit of the grace period the longest trial has; None: it is not known before trials run."""
    workers, unit = space.resources.workers, space.study.rung_unit or "steps"
    largest = space.with_step(max).step_rows(workers)

    def steps(config: TrialConfig) -> float | None:
        if config.max_steps is not None:
            return config.max_steps
        if rows is None:
            return None
        return ceil(ceil(rows / config.step_rows(workers)) * config.num_train_epochs)

    def amount(config: TrialConfig) -> float | None:
        count, each = steps(config), config.step_rows(workers)
        if unit == "epochs" and config.max_steps is None:
            return config.num_train_epochs
        if count is None or (unit == "epochs" and rows is None):
            return None
        # Without a unit the grace period is in steps of the largest batch.
        per = {"steps": 1.0 if space.study.rung_unit else each / largest, "rows": each, "epochs": each / (rows or 1)}
        return count * per[unit] if unit in per else None

    if amount(space.first_config()) is None:
        return None
    return amount(space.with_end(max, lambda config: amount(config) or 0.0))
