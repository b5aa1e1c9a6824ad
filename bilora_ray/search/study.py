"""The study database is the truth: which trials there are, what each was given, how each ended.

An Optuna study in one storage holds it. Tune and MLflow follow. A trial that is RUNNING there while no search process
lives was interrupted; it is handed out again, under its own number, before any new one is asked for.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from bilora_ray.config import TrialConfig, applies, is_integer
from bilora_ray.errors import UserError, nearest
from bilora_ray.search.space import Choice, Range, ResourceConfig, Space, StudyConfig, Value
from bilora_ray.tracking.records import Status, TrialRecord
from bilora_ray.training.folder import TrialFolder, locked

ID, SPACE, ERROR, GRACE_PERIOD = "id", "space", "error", "grace_period"
STATUS = {
    TrialState.RUNNING: Status.RUNNING,
    TrialState.COMPLETE: Status.COMPLETE,
    TrialState.PRUNED: Status.PRUNED,
    TrialState.FAIL: Status.FAILED,
}
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
# What may differ between the first start of a study and its resume.
FREE_TO_CHANGE = frozenset({"num_trials", "max_concurrent"})


@dataclass(frozen=True)
class Layout:
    """Where a storage path keeps things."""

    storage_path: Path

    @property
    def database_file(self) -> Path:
        """The SQLite file of the Optuna storage that all studies of the storage path share."""
        return self.storage_path / "studies.db"

    def study(self, name: str) -> Path:
        """Folder of one study."""
        return self.storage_path / name

    def trial(self, name: str, number: int) -> TrialFolder:
        """Folder of one trial: its checkpoints and its best adapter."""
        return TrialFolder(self.study(name) / "trials" / f"{number:04d}")


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
        self._orphans = [trial.number for trial in self._trials(TrialState.RUNNING)]
        self._live: dict[int, Trial] = {}

    def next_trial(self) -> int | None:
        """The number of a trial to run: an interrupted one if there is any, else a new one; None when all are given."""
        if self._orphans:
            number = self._orphans.pop(0)
            trial = Trial(self.study, self._trials()[number]._trial_id)
        elif len(self._trials()) - len(self._trials(TrialState.WAITING)) < self.space.study.num_trials:
            self.study.sampler = _sampler(self.space, len(self._trials()))
            trial = self.study.ask()
        else:
            return None
        _sample(trial, self.space)
        self._live[trial.number] = trial
        return trial.number

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
        if step not in known and self._weak(trial, int(metrics["max_steps"])):
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
        raise UserError(f"study '{self.study.study_name}': no trial {number}; it has 0 to {len(records) - 1}")

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
        """How much of the values' variance each searched setting explains, by Optuna; empty below four trials."""
        if len(self._trials(TrialState.COMPLETE)) < 4:
            return {}
        return optuna.importance.get_param_importances(self.study)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _end(self, number: int, state: TrialState, value: float | None = None) -> None:
        self.study.tell(self._live.pop(number), values=value, state=state)
        self.folder(number).discard_tensors()

    def _weak(self, trial: Trial, max_steps: int) -> bool:
        """Asynchronous successive halving. Its rungs live in the study, so a resumed search stops as the first did."""
        if isinstance(self.study.pruner, NopPruner):
            self.study.pruner = self._pruner(max_steps)
        return trial.should_prune()

    def _pruner(self, max_steps: int) -> BasePruner:
        settings = self.space.study
        if settings.scheduler == "none":
            return NopPruner()
        default = settings.grace_period or max(1, max_steps // settings.reduction_factor**2)
        grace_period = self.study.user_attrs.get(GRACE_PERIOD, default)
        self.study.set_user_attr(GRACE_PERIOD, grace_period)
        return SuccessiveHalvingPruner(min_resource=grace_period, reduction_factor=settings.reduction_factor)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        folder = self.folder(trial.number)
        config = self.space.trial_config(trial.params)
        settings = {key: value for key, value in config.model_dump().items() if applies(key, config.method)}
        return TrialRecord(
            number=trial.number,
            status=STATUS[trial.state],
            settings=settings,
            sampled=dict(trial.params),
            history=folder.state().get("history", ()),
            value=trial.value if trial.state == TrialState.COMPLETE else None,
            adapter=folder.best_adapter(),
            error=trial.user_attrs.get(ERROR),
        )


def check_study(space: Space, layout: Layout, resume: bool) -> None:
    """Refuse to begin a study that exists or to resume one that does not, before anything is written.

    Raises:
        UserError: that, or the study began with another space.
    """
    name, names = space.study.name, study_names(layout)
    begun = name in names and _has_begun(name, layout)
    if resume and name not in names:
        hint = f"; {nearest(name, names)}" if names else ""
        raise UserError(f"study '{name}': nothing to resume in {layout.storage_path}{hint}")
    if resume:
        _check_same_space(space, optuna.load_study(study_name=name, storage=open_storage(layout)))
    elif begun:
        raise UserError(
            f"study '{name}' exists in {layout.storage_path}: go on with --resume, or begin another with "
            "--set study.name=NAME"
        )


def open_study(space: Space, layout: Layout) -> SearchStudy:
    """The study of `space`, created if `check_study` found none. One that was made but never begun is made anew."""
    name = space.study.name
    if name in study_names(layout) and not _has_begun(name, layout):
        optuna.delete_study(study_name=name, storage=open_storage(layout))
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    config = space.trial_config({key: distribution.ends()[0] for key, distribution in space.distributions.items()})
    study = optuna.create_study(
        study_name=name,
        storage=open_storage(layout),
        direction=StudyDirection.MAXIMIZE if config.greater_is_better else StudyDirection.MINIMIZE,
        pruner=NopPruner(),
        load_if_exists=True,
    )
    if ID not in study.user_attrs:
        study.set_user_attr(ID, uuid.uuid4().hex)
    study.set_user_attr(SPACE, _described(space))
    for point in space.points_to_evaluate:
        study.enqueue_trial(point, skip_if_exists=True)
    return SearchStudy(study, space, layout)


def load_study(layout: Layout, name: str) -> SearchStudy:
    """The study `name` as its database knows it. UserError if there is none."""
    names = study_names(layout)
    if name not in names:
        raise UserError(f"study '{name}': not in {layout.storage_path}{f'; {nearest(name, names)}' if names else ''}")
    study = optuna.load_study(study_name=name, storage=open_storage(layout))
    return SearchStudy(study, _space(study), layout)


def delete_study(space: Space, layout: Layout) -> None:
    """Remove a study and its folder."""
    optuna.delete_study(study_name=space.study.name, storage=open_storage(layout))
    shutil.rmtree(layout.study(space.study.name), ignore_errors=True)


def study_names(layout: Layout) -> list[str]:
    """The studies in a storage path."""
    if not layout.database_file.exists():
        return []
    return optuna.get_all_study_names(open_storage(layout))


@contextmanager
def locked_study(layout: Layout, name: str) -> Iterator[None]:
    """Be the one process that runs study `name`. UserError if another one does, or the folder cannot be written."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(layout.study(name) / "search.lock", wait_s=0))
        except TimeoutError:
            raise UserError(f"study '{name}' is being searched by another process") from None
        except OSError as error:
            raise UserError(f"--storage-path {layout.storage_path}: cannot be written ({error.strerror})") from None
        yield


def open_storage(layout: Layout) -> optuna.storages.RDBStorage:
    """The storage of all studies under a storage path, made if missing."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    layout.storage_path.mkdir(parents=True, exist_ok=True)
    # Two processes may report at one time: wait for the other's write instead of failing.
    return optuna.storages.RDBStorage(
        f"sqlite:///{layout.database_file}", engine_kwargs={"connect_args": {"timeout": 60}}
    )


def _has_begun(name: str, layout: Layout) -> bool:
    study = optuna.load_study(study_name=name, storage=open_storage(layout))
    return any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def _sample(trial: Trial, space: Space) -> None:
    sampled: dict[str, Value] = {}
    for key, distribution in space.distributions.items():
        if not space.asked(key, sampled):
            continue
        if isinstance(distribution, Choice):
            sampled[key] = trial.suggest_categorical(key, distribution.choice)
        elif is_integer(key):
            step = int(distribution.step or 1)
            low, high = int(distribution.low), int(distribution.high)
            sampled[key] = trial.suggest_int(key, low, high, step=step, log=distribution.log)
        else:
            sampled[key] = trial.suggest_float(
                key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
            )


def _sampler(space: Space, num_asked: int) -> BaseSampler:
    """A sampler for one proposal. Its seed counts the proposals, so that a resume does not repeat the first ones."""
    seed = int(np.random.SeedSequence([space.study.seed, num_asked]).generate_state(1)[0])
    if space.study.sampler == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


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


def _check_same_space(space: Space, study: optuna.Study) -> None:
    before, now = study.user_attrs.get(SPACE, {}), _described(space)
    for section in ("study", "fixed", "distributions"):
        was, given = before.get(section, {}), now[section]
        for key in {**was, **given}:
            if key not in FREE_TO_CHANGE and was.get(key) != given.get(key):
                raise UserError(
                    f"study '{study.study_name}' began with another space: {key} was {was.get(key)!r}, "
                    f"is {given.get(key)!r}; of a study only {' and '.join(sorted(FREE_TO_CHANGE))} may change"
                )
