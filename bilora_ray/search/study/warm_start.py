"""What a study takes from earlier ones: the settings of their best trials, in order, and nothing that they measured.

Values of other data, models or metrics cannot be compared, but the order of a study's own trials can be told. It is
taken once, as the study begins, and kept in its attributes: whatever becomes of the others, a resumed search does the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.search.space import Choice, Distribution, Space, Value, setting_of
from bilora_ray.search.study.control.evaluations import best_first
from bilora_ray.settings import is_integer

WARM_START = "warm_start"
# What a study says of its space, as `studies` writes it.
SPACE = "space"
# Of each source: the better quarter of its trials, and no more than so many, are what is believed of this study.
BEST_SHARE, MOST = 0.25, 8
# Of so many sources the best point runs first, after those of the space file; a wrong one costs a whole trial.
FIRST_POINTS = 2


def taken(sources: Sequence[optuna.Study], space: Space) -> list[dict[str, Any]]:
    """Of each source its best trials, best first, with those of their settings that `space` searches too.

    A number outside its range becomes the end that is nearest; a value that is no choice here is left out.

    Raises:
        UserError: a source has no setting in common with `space`, or no trial that measured anything.
    """
    found = []
    for source in sources:
        ended = source.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        ranked = best_first(source, [trial for trial in ended if _has_measured(trial)])
        if not ranked:
            raise UserError(f"--warm-start {source.study_name}: none of its trials has measured anything")
        best = ranked[: min(MOST, max(1, round(BEST_SHARE * len(ranked))))]
        trials = [
            {"study": source.study_name, "trial": trial.number, "settings": _here(source, trial, space)}
            for trial in best
        ]
        trials = [one for one in trials if one["settings"]]
        if not trials:
            raise UserError(
                f"--warm-start {source.study_name}: none of its settings ({', '.join(best[0].params)}) has values "
                f"that are searched here ({', '.join(space.distributions)})"
            )
        found += trials
    return found


def first_points(warm: Sequence[Mapping[str, Any]]) -> list[dict[str, Value]]:
    """The settings to try first: the best trial of each source, of a few."""
    best: dict[str, dict[str, Value]] = {}
    for one in warm:
        best.setdefault(one["study"], one["settings"])
    return list(best.values())[:FIRST_POINTS]


def in_words(warm: Sequence[Mapping[str, Any]]) -> str:
    """What was taken, in a line; empty if nothing was."""
    if not warm:
        return ""
    counts: dict[str, int] = {}
    for one in warm:
        counts[one["study"]] = counts.get(one["study"], 0) + 1
    trials = ", ".join(f"{count} of the best trials of '{study}'" for study, count in counts.items())
    settings = dict.fromkeys(key for one in warm for key in one["settings"])
    return f"warm start from {trials}: {', '.join(settings)}"


def _has_measured(trial: FrozenTrial) -> bool:
    """Whether a trial tells how good its settings are, that is not that they fail or break a limit."""
    told = trial.state == TrialState.COMPLETE or bool(trial.intermediate_values)
    return told and max(trial.constraints.values(), default=0.0) <= 0


def _here(source: optuna.Study, trial: FrozenTrial, space: Space) -> dict[str, Value]:
    """The settings of a trial of another study as this space can have them, each in the sub-space that it is of."""
    own = space.sampled(trial.params)
    fixed = {"method": TrialConfig.model_fields["method"].default, **source.user_attrs.get(SPACE, {}).get("fixed", {})}
    known = {**fixed, **own, **space.fixed}
    values: dict[str, Value] = {
        name: _fitted(name, known[setting_of(name)], distribution)
        for name, distribution in space.distributions.items()
        if setting_of(name) in known and space.asked(name, known)
    }
    found: dict[str, Value] = {name: value for name, value in values.items() if value is not None}
    # What all trials of the source shared goes along with what it searched, and is nothing that it found.
    return found if any(setting_of(name) in own for name in found) else {}


def _fitted(key: str, value: Value, distribution: Distribution) -> Value:
    if isinstance(distribution, Choice):
        return value if value in distribution.choice else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return distribution.nearest(value, is_integer(setting_of(key)))
