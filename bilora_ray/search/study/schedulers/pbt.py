"""Population based training (Jaderberg et al., 2017, https://arxiv.org/abs/1711.09846), as trials end by it.

There is a rung after each `grace_period`. Whoever comes to one and is worse than three quarters of all that have come
there ends; its place is taken by a new trial, which goes on from the checkpoint of one of the best: see `population`.
"""

from __future__ import annotations

import math

from bilora_ray.search.study.population.lineage import RUNG, loss_at, parent_of, ranked
from bilora_ray.search.study.schedulers.base import JUDGED, Asked
from bilora_ray.search.study.schedulers.rungs import first_rung, noted, reached

# One in so many is among the worst, or the best.
SHARE = 4
# Sums of epochs and seconds are a little off.
NEARLY = 1e-9


def is_weak(asked: Asked) -> bool:
    """Whether the trial is among the worst at a rung that its newest evaluation is the first to reach.

    A process that died between the note of a rung and that of the verdict leaves the rung without one: the comparison
    is made again.
    """
    now = reached(asked)
    rung = math.floor(now.amount / first_rung(asked, now) * (1 + NEARLY))
    own = asked.trial.storage.get_trial(asked.trial._trial_id)
    parent, key = parent_of(own.user_attrs), RUNG.format(rung)
    # At its parent's rung a trial is not compared again: that would count one training twice.
    if rung <= (0 if parent is None else parent.rung):
        return False
    loss = asked.objective.as_loss(float(asked.metrics[asked.objective.metric]))
    loss = loss if math.isfinite(loss) else math.inf
    if key not in own.user_attrs:
        # JSON has no infinity.
        told = {"step": asked.step, "loss": None if math.isinf(loss) else loss}
        asked.trial.set_user_attr(key, {**told, "seconds": float(asked.metrics.get("train_runtime", 0.0))})
    elif own.user_attrs[key]["step"] <= own.user_attrs.get(JUDGED, -1):
        return False
    there = ranked(asked.trial.study.get_trials(deepcopy=False), rung)
    if len(there) < SHARE:
        return False
    staying = (loss_at(trial, rung) for trial in there[: len(there) - len(there) // SHARE])
    # Of equals none ends, since nothing is known of who is the worse; but for those that measured no number.
    return noted(asked, now, loss > max(filter(math.isfinite, staying), default=math.inf))
