"""What a person asks of a search that runs, from another terminal: the study database passes it on.

The search looks whenever a trial reports or begins, and every other second besides. What was asked of one that dies is
still there when it is resumed, but for the request to stop it, which it has then followed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from bilora_ray.errors import UserError, nearest
from bilora_ray.files import is_held
from bilora_ray.records import Status
from bilora_ray.search.space import Space, Value, setting_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.population.lineage import parent_of
from bilora_ray.search.study.view import ASKED_FOR

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


def enqueue(study: optuna.Study, parameters: Mapping[str, Value]) -> Waiting:
    """Have `parameters`, which are `checked`, be those of the next trial, behind those that were asked for before.

    Nobody else may be `choosing` a trial of the study meanwhile.
    """
    before = [trial.number for trial in _waiting(study)]
    study.enqueue_trial(dict(parameters))
    (number,) = {trial.number for trial in _waiting(study)}.difference(before)
    return Waiting(number, before)


def checked(space: Space, values: Mapping[str, Value]) -> dict[str, Value]:
    """The parameters, as Optuna calls them, of a trial that gets `values`, which are by setting.

    Raises:
        UserError: a setting is not searched or is outside its distribution, or has no effect in some of the trials that
            could begin so; or they do not go together.
    """
    name, searched = space.study.name, {setting_of(part) for part in space.distributions}
    for key in values:
        if key not in searched:
            fixed = f"is {space.fixed[key]!r} for all trials of it; " if key in space.fixed else "is not searched; "
            raise UserError(f"study '{name}': {key} {fixed}{nearest(key, searched)}")

    def told(part: str) -> Iterable[Value]:
        if setting_of(part) in values:
            return [values[setting_of(part)]]
        return space.cases(part) if space.decides(part) else space.ends(part)[:1]

    parameters: dict[str, Value] = {}
    for case in space.each(told):
        for key, value in values.items():
            parts = [part for part in case if setting_of(part) == key]
            if not parts:
                raise UserError(f"study '{name}': {key} has no effect{_where(space, case, values)}")
            for part in parts:
                if not space.distributions[part].holds(value):
                    distribution = space.distributions[part]
                    raise UserError(f"study '{name}': {key} {value!r} is outside its distribution, {distribution}")
                parameters[part] = value
        space.trial_config(case)
    return parameters


def _where(space: Space, case: Mapping[str, Value], values: Mapping[str, Value]) -> str:
    """The condition of a `case` in words, and what to name beside `values` for another one."""
    deciding = {setting_of(part): value for part, value in case.items() if space.decides(part)}
    unnamed = [key for key in deciding if key not in values]
    also = f"; name {' and '.join(unnamed)} too" if unnamed else ""
    where = " and ".join(f"{key} is {value}" for key, value in deciding.items())
    return f" where {where}{also}" if where else ""


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


def drop(study: optuna.Study, number: int) -> bool:
    """Take a trial that waits out of the queue: once it begins it gets settings that are proposed, as any other.

    Nobody else may be `choosing` a trial of the study meanwhile.

    Returns:
        Whether it was waiting.

    Raises:
        UserError: it waits to go on from another's checkpoint, which no person has asked for.
    """
    for trial in _waiting(study):
        if trial.number == number and trial.system_attrs.get(ASKED_FOR):
            if (parent := parent_of(trial.user_attrs)) is not None:
                raise UserError(
                    f"study '{study.study_name}': trial {number} is to go on from trial {parent.number}; "
                    "the scheduler wants it"
                )
            study._storage.set_trial_system_attr(trial._trial_id, ASKED_FOR, {})
            return True
    return False


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
