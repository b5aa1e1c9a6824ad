"""The study database is the truth: which trials there are, what each was given, how each ended.

An Optuna study in one storage holds it. Tune and MLflow follow. A trial that is RUNNING there while no search process
lives was interrupted; it is handed out again, under its own number, before any new one is asked for.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import NopPruner
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from bilora_ray.config import TrialConfig, applies
from bilora_ray.errors import UserError, nearest
from bilora_ray.search.proposals import is_weak, propose
from bilora_ray.search.space import Choice, Range, ResourceConfig, Space, StudyConfig
from bilora_ray.search.storage import Layout, open_storage, study_names
from bilora_ray.tracking.records import Status, TrialRecord
from bilora_ray.training.folder import TrialFolder

ID, SPACE, DIGESTS, ERROR = "id", "space", "digests", "error"
STATUS = {
    TrialState.RUNNING: Status.RUNNING,
    TrialState.COMPLETE: Status.COMPLETE,
    TrialState.PRUNED: Status.PRUNED,
    TrialState.FAIL: Status.FAILED,
}
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
# What may differ between the first start of a study and its resume.
FREE_TO_CHANGE = frozenset({"num_trials", "max_concurrent"})


class SearchStudy:
    """One study: proposes settings, remembers results, decides on early stops.

    Args:
        study: the Optuna study.
        space: what is searched.
        layout: where the trials' folders are.
    """

    def __init__(self, study: optuna.Study, space: Space, layout: Layout) -> None:
        self.study = study
        self.space = space
        self.layout = layout
        self._orphans: list[int] = []
        self._live: dict[int, Trial] = {}

    def adopt(self) -> None:
        """Take over the trials of a search that was interrupted: `next_trial` hands them out first.

        One that died while it was sampled gets the rest of its settings now, before anything reads them.
        """
        self._orphans = [trial.number for trial in self._trials(TrialState.RUNNING)]
        for number in self._orphans:
            propose(self.study, self.space, number)

    def next_trial(self) -> int | None:
        """The number of a trial to run: an interrupted one if there is any, else a new one; None when all are given."""
        if self._orphans:
            number = self._orphans.pop(0)
        elif len(self._trials(TrialState.RUNNING, *ENDED)) < self.space.study.num_trials:
            # What `propose` samples is decided by the number, so this sampler has nothing to say.
            self.study.sampler = RandomSampler(seed=0)
            number = self.study.ask().number
        else:
            return None
        self._live[number] = propose(self.study, self.space, number)
        return number

    def config(self, number: int) -> TrialConfig:
        """The settings of trial `number`."""
        return self.space.trial_config(self._trials()[number].params)

    def folder(self, number: int) -> TrialFolder:
        """Where trial `number` keeps its checkpoints and its best adapter."""
        return self.layout.trial(self.study.study_name, number)

    def report(self, number: int, metrics: Mapping[str, float]) -> Status:
        """Take in one evaluation of a running trial and say how the trial stands after it.

        Args:
            number: of the trial.
            metrics: `step`, `max_steps` and the study's metric, at least. An evaluation that the study knows already,
                which a resumed trial tells again, changes nothing.
        """
        trial = self._live[number]
        step, value = int(metrics["step"]), float(metrics[self.metric])
        known = self._trials()[number].intermediate_values
        if step not in known:
            trial.report(value, step)
        if step >= metrics["max_steps"]:
            best = max if self.greater_is_better else min
            self._end(number, TrialState.COMPLETE, best([*known.values(), value]))
            return Status.COMPLETE
        newest = step >= max(known, default=0)
        if newest and is_weak(trial, step, int(metrics["max_steps"]), self.space.study):
            self._end(number, TrialState.PRUNED)
            return Status.PRUNED
        return Status.RUNNING

    def fail(self, number: int, error: str) -> None:
        """End a trial that cannot go on, with the one line that says why."""
        self._live[number].set_user_attr(ERROR, error)
        self._end(number, TrialState.FAIL)

    def record(self, number: int) -> TrialRecord:
        """What the study and the trial's folder know of one trial."""
        return self._record(self._trials()[number])

    def find(self, number: int) -> TrialRecord:
        """As `record`, for a number that a user gave. UserError if there is no such trial."""
        records = self.records()
        for record in records:
            if record.number == number:
                return record
        has = f"it has 0 to {len(records) - 1}" if records else "it has none yet"
        raise UserError(f"study '{self.study.study_name}': no trial {number}; {has}")

    def records(self) -> list[TrialRecord]:
        """All trials that were ever started, by number."""
        return [self._record(trial) for trial in self._trials() if trial.state != TrialState.WAITING]

    def finished(self) -> bool:
        """Whether as many trials have ended as the study asks for."""
        return len(self._trials(*ENDED)) >= self.space.study.num_trials

    def best(self) -> TrialRecord | None:
        """The complete trial with the best value; the earliest of equals."""
        complete = [record for record in self.records() if record.value is not None]
        sign = -1 if self.greater_is_better else 1
        return min(complete, key=lambda record: sign * (record.value or 0.0), default=None)

    @property
    def id(self) -> str:
        """What tells this study from another one of its name."""
        return str(self.study.user_attrs[ID])

    @property
    def metric(self) -> str:
        """Name of the metric that trials are judged by."""
        return str(self.space.fixed.get("metric", TrialConfig.model_fields["metric"].default))

    @property
    def greater_is_better(self) -> bool:
        """Whether a larger value is a better trial."""
        return self.study.direction == StudyDirection.MAXIMIZE

    def importances(self) -> dict[str, float]:
        """How much of the values' variance each searched setting explains; empty below four complete trials."""
        values = {trial.value for trial in self._trials(TrialState.COMPLETE)}
        if len(self._trials(TrialState.COMPLETE)) < 4 or len(values) < 2:
            return {}
        return optuna.importance.get_param_importances(self.study)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _end(self, number: int, state: TrialState, value: float | None = None) -> None:
        self.study.tell(self._live.pop(number), values=value, state=state)
        self.folder(number).discard_tensors()

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        folder = self.folder(trial.number)
        state = folder.state()
        best_step = state.get("best_step")
        settings: dict[str, Any] = {**self.space.fixed, **trial.params}
        if all(key in trial.params for key in self.space.distributions if self.space.asked(key, trial.params)):
            config = self.space.trial_config(trial.params)
            settings = {key: value for key, value in config.model_dump().items() if applies(key, config.method)}
        return TrialRecord(
            number=trial.number,
            status=STATUS[trial.state],
            settings=settings,
            sampled=dict(trial.params),
            history=state.get("history", ()),
            value=trial.value if trial.state == TrialState.COMPLETE else None,
            adapter=None if best_step is None else folder.adapter_at(best_step),
            error=trial.user_attrs.get(ERROR),
        )


def check_study(space: Space, layout: Layout, resume: bool, digests: Mapping[str, str]) -> None:
    """Refuse to begin a study that exists or to resume one that does not, before anything is written.

    Args:
        space: the study's.
        layout: where studies are.
        resume: whether it shall go on.
        digests: data source -> digest of its content, now.

    Raises:
        UserError: that, or the study began with another space or with other data.
    """
    name, names = space.study.name, study_names(layout)
    begun = name in names and _has_begun(name, layout)
    if resume and not begun:
        hint = f"; {nearest(name, names)}" if names and name not in names else ""
        raise UserError(f"study '{name}': nothing to resume in {layout.storage_path}{hint}")
    if resume:
        study = optuna.load_study(study_name=name, storage=open_storage(layout))
        _check_same(name, "space", study.user_attrs[SPACE], _described(space))
        _check_same(name, "data", {"content": study.user_attrs[DIGESTS]}, {"content": dict(digests)})
    elif begun:
        raise UserError(
            f"study '{name}' exists in {layout.storage_path}: go on with --resume, or give this one another name"
        )
    elif any(layout.trials(name).glob("*")):
        raise UserError(f"{layout.trials(name)}: holds trials that the study database does not know; move it away")


def open_study(space: Space, layout: Layout, digests: Mapping[str, str]) -> SearchStudy:
    """The study of `space`, created if `check_study` found none. One that was made but never begun is made anew."""
    name = space.study.name
    if name in study_names(layout) and not _has_begun(name, layout):
        optuna.delete_study(study_name=name, storage=open_storage(layout))
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    greater_is_better = space.first_config().greater_is_better
    study = optuna.create_study(
        study_name=name,
        storage=open_storage(layout),
        direction=StudyDirection.MAXIMIZE if greater_is_better else StudyDirection.MINIMIZE,
        pruner=NopPruner(),
        load_if_exists=True,
    )
    if ID not in study.user_attrs:
        study.set_user_attr(ID, uuid.uuid4().hex)
        study.set_user_attr(DIGESTS, dict(digests))
    study.set_user_attr(SPACE, _described(space))
    for point in space.points_to_evaluate:
        study.enqueue_trial(point, skip_if_exists=True)
    opened = SearchStudy(study, space, layout)
    opened.adopt()
    return opened


def load_study(layout: Layout, name: str) -> SearchStudy:
    """The study `name` as its database knows it. UserError if there is none that has begun."""
    names = study_names(layout)
    if name not in names:
        raise UserError(f"study '{name}': not in {layout.storage_path}{f'; {nearest(name, names)}' if names else ''}")
    study = optuna.load_study(study_name=name, storage=open_storage(layout))
    if SPACE not in study.user_attrs:
        raise UserError(f"study '{name}': was never begun")
    return SearchStudy(study, _space(study), layout)


def num_trials_before(layout: Layout, name: str) -> int:
    """How many trials study `name` was asked for when it last ran; 0 if there is no such study."""
    if name not in study_names(layout):
        return 0
    study = optuna.load_study(study_name=name, storage=open_storage(layout))
    return int(study.user_attrs.get(SPACE, {}).get("study", {}).get("num_trials", 0))


def delete_study(space: Space, layout: Layout) -> None:
    """Remove a study and its folder."""
    optuna.delete_study(study_name=space.study.name, storage=open_storage(layout))
    shutil.rmtree(layout.study(space.study.name), ignore_errors=True)


def _has_begun(name: str, layout: Layout) -> bool:
    study = optuna.load_study(study_name=name, storage=open_storage(layout))
    begun = any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))
    return begun and SPACE in study.user_attrs


def _described(space: Space) -> dict[str, Any]:
    """A space as the study database keeps it."""
    described = {
        "study": space.study.model_dump(mode="json"),
        "resources": space.resources.model_dump(mode="json"),
        "fixed": space.fixed,
        "distributions": {key: distribution.model_dump() for key, distribution in space.distributions.items()},
    }
    return json.loads(json.dumps(described))


def _space(study: optuna.Study) -> Space:
    described = study.user_attrs[SPACE]
    return Space(
        path=Path(f"study {study.study_name}"),
        study=StudyConfig(**described["study"]),
        resources=ResourceConfig(**described["resources"]),
        fixed=described["fixed"],
        distributions={
            key: Choice(**values) if "choice" in values else Range(**values)
            for key, values in described["distributions"].items()
        },
        points_to_evaluate=(),
    )


def _check_same(name: str, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for section in now:
        was, given = before.get(section, {}), now[section]
        # Of the resources, the number of workers alone changes what a trial computes: its batches.
        for key in ("workers",) if section == "resources" else {**was, **given}:
            if key not in FREE_TO_CHANGE and was.get(key) != given.get(key):
                raise UserError(
                    f"study '{name}' began with other {what}: {key} was {was.get(key)!r}, is {given.get(key)!r}; "
                    f"of a study only {' and '.join(sorted(FREE_TO_CHANGE))} may change"
                )
