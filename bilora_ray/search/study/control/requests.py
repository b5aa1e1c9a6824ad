"""What a person asks of a search that runs, from another terminal: the study database passes it on.

The search looks whenever a trial reports or begins, and every other second besides. What was asked of one that dies is
still there when it is resumed, but for the request to stop it, which it has then followed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from bilora_ray.config import applies
from bilora_ray.errors import UserError, nearest
from bilora_ray.files import is_held
from bilora_ray.records import Status
from bilora_ray.search.space import Choice, Distribution, Space, Value, setting_of
from bilora_ray.search.study.layout import Layout

# Of a trial: it ends at its next evaluation. Of a study: which request was the last one.
STOP = "stop"
POLL_S = 0.2


@dataclass(frozen=True)
class Waiting:
    """A trial that waits to be begun.

    Attributes:
        number: its own.
        before: the trials that begin before it, in their order.
    """

    number: int
    before: Sequence[int]


def enqueue(study: optuna.Study, values: Mapping[str, Value]) -> Waiting:
    """Have `values`, which are `checked`, be those of the next trial, behind those that were asked for before.

    Nobody else may be `choosing` a trial of the study meanwhile.
    """
    before = [trial.number for trial in _waiting(study)]
    study.enqueue_trial(dict(values))
    (number,) = {trial.number for trial in _waiting(study)}.difference(before)
    return Waiting(number, before)


def checked(space: Space, values: Mapping[str, Value]) -> None:
    """Refuse settings for a trial that `space` could not have drawn, or that would have no effect.

    Raises:
        UserError: a setting is not searched, is outside its distribution, or is none of its method's; or they do not go
            together.
    """
    name = space.study.name
    for key, value in values.items():
        names = space.names_of(key)
        if not names:
            fixed = f"is {space.fixed[key]!r} for all trials of it; " if key in space.fixed else "is not searched; "
            raise UserError(f"study '{name}': {key} {fixed}{nearest(key, map(setting_of, space.distributions))}")
        asked = [space.distributions[one] for one in names if space.asked(one, values)]
        among = asked or [space.distributions[one] for one in names]
        if not any(_holds(distribution, value) for distribution in among):
            words = ", or ".join(map(str, among))
            raise UserError(f"study '{name}': {key} {value!r} is outside its distribution, {words}")
    methods = [values["method"]] if "method" in values else _methods(space)
    for key in values:
        others = [str(method) for method in methods if not applies(key, str(method))]
        if others:
            name_it = "" if "method" in values else "; name the method too"
            raise UserError(f"study '{name}': {key} has no effect with method {' or '.join(others)}{name_it}")
        if not any(space.asked(one, values) for one in space.names_of(key)):
            conditions = ", or when ".join(space.parts[one].condition for one in space.names_of(key))
            raise UserError(f"study '{name}': {key} has no effect but when {conditions}; name that too")
    space.trial_config(space.first(values))


def _holds(distribution: Distribution, value: Value) -> bool:
    if isinstance(distribution, Choice):
        return value in distribution.choice
    return isinstance(value, int | float) and distribution.holds(value)


def _methods(space: Space) -> Sequence[Value]:
    return space.distributions["method"].ends() if "method" in space.distributions else ()


def _waiting(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.WAITING,))


def stop_study(study: optuna.Study) -> None:
    """Ask all processes that run `study` to stop, as Ctrl-C does."""
    study.set_user_attr(STOP, uuid.uuid4().hex)


def stop_trial(study: optuna.Study, number: int, status: Status) -> None:
    """Ask that a running trial end at its next evaluation, judged by what it has reached.

    Args:
        study: its study.
        number: its own.
        status: its own. UserError if it has ended.
    """
    if status not in (Status.RUNNING, Status.INTERRUPTED):
        raise UserError(f"study '{study.study_name}': trial {number} has ended already ({status.value})")
    try:
        study._storage.set_trial_user_attr(study.get_trials(deepcopy=False)[number]._trial_id, STOP, True)
    except optuna.exceptions.UpdateFinishedTrialError:
        raise UserError(f"study '{study.study_name}': trial {number} has just ended") from None


def is_searched(study: optuna.Study, layout: Layout) -> bool:
    """Whether any process runs `study` now; of PostgreSQL, whether one runs a trial of it."""
    name = study.study_name
    if layout.study_database is None:
        return is_held(layout.searching(name))
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return any(is_held(layout.claim(name, trial.number)) for trial in running)


def await_end(study: optuna.Study, layout: Layout, wait_s: float) -> bool:
    """Wait until no process runs `study`. Whether that came within `wait_s` seconds."""
    deadline = time.monotonic() + wait_s
    while is_searched(study, layout):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True
