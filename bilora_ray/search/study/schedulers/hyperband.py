"""HyperBand (Li et al., JMLR 2018): brackets of successive halving, each with a later first rung than the one before.

Which bracket a trial is in follows from its number and the study's name. Nobody knows how soon a bad trial of this task
shows: in some brackets trials are stopped early, and many can be begun; in others they have longer to catch up. The
sampler learns of the trials of all brackets, as Optuna's TPE does beside Optuna's HyperbandPruner.
"""

from __future__ import annotations

from optuna.pruners import HyperbandPruner

from bilora_ray.search.study.schedulers.base import Asked
from bilora_ray.search.study.schedulers.halving import in_parts, is_weak_at_rungs
from bilora_ray.search.study.schedulers.rungs import first_rung, longest, reached


def is_weak(asked: Asked) -> bool:
    """Whether the trial's bracket stops it. Brackets, rungs and verdicts are functions of what the study keeps."""
    now = reached(asked)
    first = max(1, in_parts(first_rung(asked, now), now.unit))
    last = max(first, in_parts(longest(asked, now), now.unit))
    study, factor = asked.trial.study, asked.factor
    pruner = HyperbandPruner(min_resource=first, max_resource=last, reduction_factor=factor)
    pruner._try_initialization(study)  # or all would be in its first bracket
    bracket = pruner._get_bracket_id(study, asked.trial.storage.get_trial(asked.trial._trial_id))
    own_first = first * factor**bracket
    return is_weak_at_rungs(
        asked, now, pruner, own_first, lambda trial: pruner._get_bracket_id(study, trial) == bracket
    )
