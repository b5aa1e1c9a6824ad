"""What a study has found, for who may only read it: no lock is taken, and nothing is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bilora_ray.checking import completed
from bilora_ray.config import TrialConfig
from bilora_ray.digests import by_setting
from bilora_ray.errors import UserError, nearest
from bilora_ray.files import is_held
from bilora_ray.measures import SHARPNESS
from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.search.space import FINALISTS_OF, LIMITED, RUNS_OF, Space
from bilora_ray.search.study.control.budget import RUN, Ended, end_of
from bilora_ray.search.study.control.evaluations import ENDED_BY, broken, evaluations_of
from bilora_ray.search.study.control.front import front_of, losses_of
from bilora_ray.search.study.importances import Importances, importances_of
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.population.lineage import parent_of
from bilora_ray.search.study.warm_start import WARM_START
from bilora_ray.settings import applies, deciding
from bilora_ray.training.folder import TrialFolder

ID, ERROR, DIGESTS, STOPPED = "id", "error", "digests", "stopped_after"
# What a study keeps of the choice of its finalists: see `control.finalists`.
FINALISTS = "finalists"
# What each study of a comparison keeps: the comparison's `name`, and what it was `asked` for.
COMPARISON = "comparison"
# The trials whose adapters were removed, by the setting that was why: see `control.disk`.
REMOVED = "removed"
# Where Optuna keeps what a trial that waits was asked to have.
ASKED_FOR = "fixed_params"
# What the metric is without training, and whose adapter is compared with that: see `control.untrained`.
BASELINE, COMPARED = "baseline", "compared"
# With which versions, and on what, the study was last searched.
MADE_WITH = "made_with"
# On how many threads a training without a search computes, from its begin on.
THREADS = "threads"
# A trial that failed by its own settings is PRUNED with a constraint that it broke, since samplers read nothing of a
# FAIL. Other failures, and all of version 0.1.0, are FAIL.
STATUS = {
    TrialState.RUNNING: Status.RUNNING,
    TrialState.COMPLETE: Status.COMPLETE,
    TrialState.PRUNED: Status.PRUNED,
    TrialState.FAIL: Status.FAILED,
}
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def objective_of(study: optuna.Study, fixed: Mapping[str, Any]) -> Objective:
    """What the trials of `study`, which share the settings `fixed`, are judged by; the first of several objectives."""
    metric = fixed.get("metric", TrialConfig.model_fields["metric"].default)
    return Objective(str(metric), study.directions[0] == StudyDirection.MAXIMIZE)


def search_of(study: optuna.Study) -> str | None:
    """The search whose finalists `study` trains; None if it is no such study."""
    storage, search = study._storage, study.study_name.removesuffix(FINALISTS_OF.format(""))
    if search == study.study_name or search not in optuna.get_all_study_names(storage):
        return None
    return search if FINALISTS in optuna.load_study(study_name=search, storage=storage).user_attrs else None


def comparison_of(study: optuna.Study) -> str | None:
    """The comparison that `study` is a part of; None if it is no such study."""
    told = study.user_attrs.get(COMPARISON)
    return None if told is None else str(told["name"])


def compared_in(study: optuna.Study) -> str | None:
    """The comparison whose runs `study` trains, of which the luckiest is none to take; None if it is no such study."""
    name = comparison_of(study)
    return name if name is not None and study.study_name == RUNS_OF.format(name) else None


class StudyView:
    """One study, as its database and its trials' folders know it.

    Args:
        study: the Optuna study.
        space: what is searched.
        layout: where the trials' folders are.
    """

    def __init__(self, study: optuna.Study, space: Space, layout: Layout) -> None:
        self.study = study
        self.space = space
        self.layout = layout

    def config(self, number: int) -> TrialConfig:
        """The settings of trial `number`."""
        return self.space.trial_config(self.trial(number).params)

    def digests(self, number: int) -> dict[str, str]:
        """Setting -> digest of the data and the base that trial `number` must find, as far as the study knows it."""
        return self.digests_for(self.config(number))

    def digests_for(self, config: TrialConfig) -> dict[str, str]:
        """As `digests`, of what a trial with `config` reads: what the study knows of it."""
        return by_setting(self.study.user_attrs[DIGESTS], config)

    def folder(self, number: int) -> TrialFolder:
        """Where trial `number` keeps its checkpoints and its best adapter."""
        return self.layout.trial(self.study.study_name, number)

    def record(self, number: int) -> TrialRecord:
        """What the study and the trial's folder know of one trial."""
        return self._record(self.trial(number))

    def chosen(self, number: int | None, prefer: str | None = None) -> TrialRecord:
        """As `record`, for a number that a user gave; None: the best, by the objective that a user may `prefer`.

        Raises:
            UserError: there is no such trial, or no such objective.
        """
        records = self.records()
        if number is None:
            best = self._best_by(prefer, records) if prefer is not None else self.objective.best_of(records)
            if best is None:
                raise UserError(
                    f"study '{self.study.study_name}': no trial is complete; name one with --trial, or finish it"
                )
            return best
        for record in records:
            if record.number == number:
                return record
        if number in {record.number for record in self.queued()}:
            raise UserError(f"study '{self.study.study_name}': trial {number} is queued, and has not begun")
        has = f"it has 0 to {len(records) - 1}" if records else "it has none yet"
        raise UserError(f"study '{self.study.study_name}': no trial {number}; {has}")

    def records(self) -> list[TrialRecord]:
        """All trials that were ever started, by number."""
        return [self._record(trial) for trial in self.trials() if trial.state != TrialState.WAITING]

    def records_now(self) -> list[TrialRecord]:
        """As `records`, with those interrupted that are running in the database and in no process."""
        interrupted = self.interrupted()
        return [
            replace(record, status=Status.INTERRUPTED)
            if record.status is Status.RUNNING and record.number in interrupted
            else record
            for record in self.records()
        ]

    def queued(self) -> list[TrialRecord]:
        """The trials that wait to be begun with settings that were asked for, by number, as `records` would have them.

        Nothing is drawn for them yet: what was not asked for is among neither `settings` nor `sampled`.
        """
        asked = {trial.number: trial for trial in self.trials(TrialState.WAITING) if trial.system_attrs.get(ASKED_FOR)}
        return [self._waiting(trial) for trial in asked.values()]

    def interrupted(self) -> set[int]:
        """The running trials that no process has a claim to."""
        unclaimed = self._unclaimed()
        if unclaimed:  # who has just been given a trial is about to claim it, and who ends one to give it up
            self.layout.await_choice(self.study.study_name)
            unclaimed &= self._unclaimed()
        return unclaimed

    def finished(self) -> bool:
        """Whether as many trials have ended as the study asks for, or all that began before a budget was used up."""
        if len(self.trials(*ENDED)) >= self.space.study.num_trials:
            return True
        return self.end() is not None and not self.trials(TrialState.RUNNING)

    def end(self) -> Ended | None:
        """Which budget has ended the search, if one has."""
        return end_of(self.study.user_attrs, self.space)

    def best(self) -> TrialRecord | None:
        """See `Objective.best_of`; None of the runs of a comparison, which are no search."""
        return None if compared_in(self.study) is not None else self.objective.best_of(self.records())

    @property
    def id(self) -> str:
        """What tells this study from another one of its name."""
        return str(self.study.user_attrs[ID])

    @property
    def objective(self) -> Objective:
        """What trials are judged by; the first of several objectives."""
        return objective_of(self.study, self.space.fixed)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All that trials are judged by."""
        return (self.objective, *self.space.objectives[1:])

    def front(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Of all `records` those on the Pareto front, the best by the first objective first; none if there is one."""
        return front_of(records, self.objectives) if len(self.objectives) > 1 else []

    @property
    def warm_start(self) -> list[dict[str, Any]]:
        """What the study took from earlier ones as it began: `study`, `trial` and `settings` of each trial."""
        return list(self.study.user_attrs.get(WARM_START, ()))

    def baseline(self) -> dict[str, Any] | None:
        """What the metrics are without training, and its `kind`: see `records.Untrained`. None: not known."""
        return self.study.user_attrs.get(BASELINE)

    def origin(self, record: TrialRecord) -> dict[str, Any]:
        """What the card and the recipe of a trial's adapter say of where it comes from, and of what it is worth."""
        metric, baseline = self.objective.metric, self._judge().baseline_of(self.config(record.number))
        known = {"study": self.space.study.name, "trial": record.number, metric: record.value, **record.values}
        return {**known, **({"baseline": baseline} if baseline else {})}

    def baseline_of(self, config: TrialConfig) -> dict[str, Any] | None:
        """The baseline of a trial with these settings, whose base model or rows may be others than the winner's."""
        return self.baseline() if self.has_measured(config) else None

    def has_measured(self, config: TrialConfig) -> bool:
        """Whether what it knows without training is that of a trial with these settings."""
        measured = self.study.user_attrs.get(COMPARED, {}).get("settings")
        if measured is None:
            return False
        then, now = completed(TrialConfig, measured), decisive(config)
        return {key: then[key] for key in now} == now

    def baseline_of_best(self) -> dict[str, Any] | None:
        """As `baseline_of`, of the best trial: of one with another base nothing is said beside it."""
        best = self.best()
        return None if best is None else self.baseline_of(self.config(best.number))

    def examples(self) -> list[dict[str, Any]]:
        """Some validation rows with the answers of the winner's adapter and of its base model; none: not known.

        Those of an earlier winner, which a longer search has left behind, are none of the study's any more.
        """
        compared = self.study.user_attrs.get(COMPARED)
        if compared is None:
            return []
        if compared["study"] == self.study.study_name:
            best = self.best()
            if best is None or best.number != compared["trial"]:
                return []
        try:
            return json.loads(self.layout.examples(self.study.study_name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return []

    @property
    def seconds(self) -> float | None:
        """For which searches have run it; None if that is not known. Downtime is none of it."""
        run = self.study.user_attrs.get(RUN)
        return None if run is None else float(run["seconds"])

    @property
    def made_with(self) -> dict[str, str]:
        """With which versions and on what machine it was last searched, by name; empty if that is not known."""
        return dict(self.study.user_attrs.get(MADE_WITH, {}))

    def importances(self) -> Importances:
        """Which of the searched settings mattered, among the trials that are complete or were stopped early."""
        ended = [
            trial
            for trial in self.trials(TrialState.COMPLETE, TrialState.PRUNED)
            # What one is worth that goes on from another is not its settings' doing alone.
            if not _failed(trial) and parent_of(trial.user_attrs) is None
        ]
        judged = [trial if len(self.objectives) == 1 else self._by_the_first(trial) for trial in ended]
        workers = self.space.resources.workers
        return importances_of(
            judged, self.space.distributions, lambda sampled: self.space.trial_config(sampled).step_rows(workers)
        )

    def _judge(self) -> StudyView:
        """The study that knows what its trials are compared with: of finalists their search."""
        search = search_of(self.study)
        if search is None:
            return self
        return StudyView(optuna.load_study(study_name=search, storage=self.study._storage), self.space, self.layout)

    def _best_by(self, metric: str, records: Sequence[TrialRecord]) -> TrialRecord | None:
        objectives = {one.metric: one for one in self.objectives}
        if metric not in objectives:
            name = self.study.study_name
            raise UserError(f"study '{name}': '{metric}' is no objective of it; {nearest(metric, objectives)}")
        # Of equal trials one that is on the front.
        return min(
            front_of(records, self.objectives),
            key=lambda record: losses_of(record.values, [objectives[metric]]),
            default=None,
        )

    def _by_the_first(self, trial: FrozenTrial) -> FrozenTrial:
        """`trial` with its evaluations as Optuna keeps those of one objective, the first."""
        known, judged = evaluations_of(trial, self.objectives), copy.copy(trial)
        judged.intermediate_values = {step: metrics[self.objective.metric] for step, metrics in known.items()}
        return judged

    def _removed(self, number: int) -> str | None:
        """The setting for which the adapter of trial `number` was removed, if it was."""
        removed = self.study.user_attrs.get(REMOVED, {})
        return next((why for why, numbers in removed.items() if number in numbers), None)

    def trial(self, number: int) -> FrozenTrial:
        """One trial, read by itself: what a report costs must not grow with the study."""
        storage = self.study._storage
        return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number))

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those in one of `states`, or all."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _unclaimed(self) -> set[int]:
        name, running = self.study.study_name, self.trials(TrialState.RUNNING)
        return {trial.number for trial in running if not is_held(self.layout.claim(name, trial.number))}

    def _waiting(self, trial: FrozenTrial) -> TrialRecord:
        sampled = self.space.sampled(trial.system_attrs[ASKED_FOR])
        settings = {**self.space.fixed, **sampled}
        return TrialRecord(trial.number, Status.QUEUED, settings, sampled, parent=parent_of(trial.user_attrs))

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        folder = self.folder(trial.number)
        state = folder.state()
        history, best_step = state.get("history", ()), state.get("best_step")
        metrics = [one.metric for one in self.objectives]
        kept: Mapping[str, float] = next((told for told in history if told["step"] == best_step), {})
        settings: dict[str, Any] = {**self.space.fixed, **self.space.sampled(trial.params)}
        if all(key in trial.params for key in self.space.distributions if self.space.asked(key, trial.params)):
            config = self.space.trial_config(trial.params)
            settings = {key: value for key, value in config.model_dump().items() if applies(key, config.method)}
        told = dict(zip(metrics, trial.values, strict=True)) if trial.state == TrialState.COMPLETE else {}
        # The workers of a trial that was ended may have made an evaluation more, and with it another adapter.
        known = kept or told
        adapter = None if best_step is None else folder.adapter_at(best_step)
        # The study is asked only about what is not there: most is.
        removed = None if adapter is None or adapter.is_dir() else self._removed(trial.number)
        failed = _failed(trial)
        ended_by = trial.user_attrs.get(ENDED_BY) if trial.state == TrialState.COMPLETE else None
        stopped = ended_by is not None or (trial.state == TrialState.PRUNED and not failed)
        return TrialRecord(
            number=trial.number,
            status=status_of(trial),
            settings=settings,
            sampled=self.space.sampled(trial.params),
            history=history,
            value=known.get(self.objective.metric),
            loss=kept.get("eval_loss"),
            adapter=None if removed else adapter,
            removed=removed,
            error=trial.user_attrs.get(ERROR) if failed else None,
            values={metric: known[metric] for metric in dict.fromkeys([*metrics, SHARPNESS]) if metric in known},
            broken=broken(trial, self.space.study),
            stopped_after=trial.user_attrs.get(STOPPED, {}) if stopped else {},
            parent=parent_of(trial.user_attrs),
            ended_by=ended_by,
        )


def status_of(trial: FrozenTrial) -> Status:
    """How a trial stands. One that breaks a limit of the study was stopped early for it, if only by its last step."""
    if _failed(trial):
        return Status.FAILED
    excess = max((value for key, value in trial.constraints.items() if key in LIMITED), default=0.0)
    return Status.PRUNED if trial.state == TrialState.COMPLETE and excess > 0 else STATUS[trial.state]


def _failed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL or (trial.state == TrialState.PRUNED and ERROR in trial.constraints)


def decisive(config: TrialConfig) -> dict[str, Any]:
    """The settings that a base model alone is measured by: of the seed only what it draws rows by."""
    without = {*deciding("training", "training rows", "memory"), "seed"}
    return {**config.model_dump(mode="json", exclude=without), "split_seed": config.resolved_split_seed}
