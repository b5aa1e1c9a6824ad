"""The MLflow runs of one study: a parent, and under it one child a trial.

MLflow's status of a run, and the tag `bilora_ray.status` beside it:

| trial       | status   | tag         |                                                             |
| ----------- | -------- | ----------- | ----------------------------------------------------------- |
| running     | RUNNING  | running     |                                                             |
| complete    | FINISHED | complete    |                                                             |
| pruned      | FINISHED | pruned      | an early stop is a decision of the search, not an accident  |
| failed      | FAILED   | failed      |                                                             |
| interrupted | KILLED   | interrupted | by a person or a machine; a resume sets it back to RUNNING  |
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilora_ray.records import Objective, Served, Status, TrialRecord
from bilora_ray.settings import leaves_model
from bilora_ray.tracking.models import candidate, log_model
from bilora_ray.tracking.pages import (
    NOTE,
    SEARCHED,
    VIEW,
    best_note,
    experiment_note,
    link,
    metric_name,
    other_note,
    run_name,
    study_note,
    trial_note,
    view_of,
    with_winner,
)
from bilora_ray.tracking.provenance import dataset_inputs, source, version_tags
from bilora_ray.tracking.run import COMPLETE, INTERRUPTED, Point, Run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

STUDY, TRIAL, PARENT = "bilora_ray.study", "bilora_ray.trial", "mlflow.parentRunId"
SAMPLED, ERROR, BEST = "bilora_ray.sampled", "bilora_ray.error", "bilora_ray.best"
BEST_TRIAL, BEST_RUN, BEST_SAMPLED = "bilora_ray.best_trial", "bilora_ray.best_run_id", "bilora_ray.best_sampled"
# What a trial goes on from that did not begin by itself: its run has what was evaluated from there on.
PARENT_TRIAL, PARENT_STEP = "bilora_ray.parent_trial", "bilora_ray.parent_step"
FRONT, BROKEN = "bilora_ray.pareto_front", "bilora_ray.broken"
ADAPTER = "adapter"
PAGE = 1000


@dataclass(frozen=True)
class StudyInfo:
    """What MLflow is told about a study.

    Attributes:
        name: of the study.
        tags: of the parent run, which must carry all of them, and the name, to be found again. So an id among them
            keeps apart studies that share a name and a server.
        params: settings that all trials share.
        digests: of the data: source -> digest of its content.
        objectives: what trials are judged by, the first before all.
        searched: the settings that differ between trials.
        storage_path: where the study's adapters are.
        report: the file of its report, whether or not it is there.
        search: the study whose finalists it trains, if it does; such a one has no view.
        source: tags of every run, which say what made it.
        versions: the same, of versions; a page shows tags in the order in which they came, and these come last.
    """

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    digests: Mapping[str, str]
    objectives: Sequence[Objective]
    searched: Sequence[str]
    storage_path: Path
    report: Path
    search: str | None = None
    source: Mapping[str, str] = field(default_factory=source)
    versions: Mapping[str, str] = field(default_factory=version_tags)


class StudyRuns:
    """Finds the runs of a study, makes what is missing, and sets the parent RUNNING.

    Every method raises whatever MLflow, the network or the disk raises; the object is not to be used after that.

    Args:
        client: of the MLflow store.
        experiment_id: of the study's project.
        study: what MLflow is told.
    """

    def __init__(self, client: MlflowClient, experiment_id: str, study: StudyInfo) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._study = study
        self._datasets = dataset_inputs(study.digests, study.params)
        self._parent = self._find_parent() or self._create(study.name, {STUDY: study.name, **study.tags})
        self._parent.begin(study.params, {}, self._datasets)
        self._trials = self._find_trials()
        self._describe_experiment()

    def sync(self, trial: TrialRecord) -> None:
        """Make the run of `trial` say what the record says."""
        run = self._trials.get(trial.number)
        # The workers of a trial that was stopped may have made an evaluation more before they heard of it.
        if run is not None and run.has_ended_as(trial.status.value, len(trial.history)):
            return
        if run is None or not run.live:
            # Another process may have had the trial since, and made its run or written to it.
            self._trials.update(self._find_trials(f" AND tags.`{TRIAL}` = '{trial.number}'"))
            run = self._trials.get(trial.number)
        if run is None:
            tags = {PARENT: self._parent.run_id, TRIAL: str(trial.number)}
            run = self._trials[trial.number] = self._create(run_name(trial), tags)
        if not run.live:
            tags = {SAMPLED: json.dumps(dict(trial.sampled))}
            if trial.parent is not None:
                tags |= {PARENT_TRIAL: str(trial.parent.number), PARENT_STEP: str(trial.parent.step)}
            run.begin(trial.settings, tags, self._datasets)
        run.log(_points(trial, self._study.objectives))
        if trial.status is Status.RUNNING:
            return
        # Whole models of all trials would fill a disk: of those the best one is kept, at the end.
        left = None if leaves_model(trial.settings) else trial.adapter
        if trial.status is Status.COMPLETE and left is not None and left.is_dir():
            run.keep(left, ADAPTER)
        parent = link(self._study.name, self._experiment_id, self._parent.run_id)
        note = trial_note(trial, self._study.name, parent, self._study.storage_path)
        why = {ERROR: trial.error, BROKEN: trial.broken, NOTE: note}
        tags = {key: line for key, line in why.items() if line is not None}
        run.end(trial.status.value, {**tags, **self._study.versions}, len(trial.history))

    def end(
        self,
        trials: Iterable[TrialRecord],
        best_number: int | None,
        interrupted: bool,
        others: bool,
        front: Sequence[int] = (),
        told: Sequence[str] = (),
        served: Served | None = None,
    ) -> None:
        """End the parent and every run that is not over, and mark the best, and the front. The parent tells of it all.

        Args:
            trials: all of the study's, each in sync.
            best_number: the best trial's; None if none is complete, or none is to be taken.
            interrupted: whether the study is to go on later.
            others: whether other processes go on with it now.
            front: the numbers of the trials on the Pareto front; none where there is one objective.
            told: lines for the parent's description, in Markdown.
            served: what MLflow is told of the best's adapter, which becomes a model; None: it does not.
        """
        trials = list(trials)
        for number, run in self._trials.items():
            if number != best_number:
                run.untag(BEST)
                if run.note != (note := other_note(run.note)):
                    run.tag({NOTE: note})
            if number not in front:
                run.untag(FRONT)
        for trial in trials:
            if trial.status is Status.RUNNING:
                self._trials[trial.number].end(INTERRUPTED, self._study.versions)
            if trial.number == best_number:
                self._tell_best(trial)
        if front:
            for number in front:
                self._trials[number].tag({FRONT: "true"})
            self._parent.tag({FRONT: json.dumps(list(front))})
        best = next((trial for trial in trials if trial.number == best_number), None)
        self._describe(trials, best, told)
        if not others:
            ended = COMPLETE if any(trial.status is Status.COMPLETE for trial in trials) else Status.FAILED.value
            self._parent.end(INTERRUPTED if interrupted else ended, self._study.versions)
        if best is not None and best.adapter is not None and served is not None:
            runs = (self._parent.run_id, self._trials[best.number].run_id)
            log_model(self._client, self._experiment_id, *runs, candidate(self._study.name, best, served))

    def interrupt(self, numbers: Iterable[int]) -> None:
        """End the runs of the trials `numbers`, each in sync, and the parent, until the study is resumed."""
        runs = [self._trials[number] for number in numbers if number in self._trials]
        for run in (*runs, self._parent):
            run.end(INTERRUPTED, self._study.versions)

    def _tell_best(self, trial: TrialRecord) -> None:
        run = self._trials[trial.number]
        run.tag({BEST: "true", NOTE: best_note(run.note)})
        sampled = json.dumps(dict(trial.sampled))
        self._parent.tag({BEST_TRIAL: str(trial.number), BEST_RUN: run.run_id, BEST_SAMPLED: sampled})
        # The step counts trials, so that a study that is resumed with more of them shows how its best moved.
        self._parent.log(_result(trial, step=len(self._trials)))

    def _describe(self, trials: Sequence[TrialRecord], best: TrialRecord | None, told: Sequence[str]) -> None:
        study, best_link = self._study, ""
        if best is not None:
            best_link = link(f"trial {best.number}", self._experiment_id, self._trials[best.number].run_id)
        if study.report.is_file():
            self._parent.keep_file(study.report)
            told = [*told, f"Report: `{study.report.name}` among the artifacts, and `{study.report}`"]
        self._parent.tag({NOTE: study_note(trials, best, best_link, study.name, study.storage_path, told)})

    def _describe_experiment(self) -> None:
        """Have the experiment's page offer a view of the study, and its description name it, once it is new."""
        experiment_id, run_id, study = self._experiment_id, self._parent.run_id, self._study
        tags = self._client.get_experiment(experiment_id).tags
        if study.search is not None or f"{VIEW}{run_id}" in tags:
            return
        view = view_of(study.name, run_id, study.objectives[0], study.searched, int(time.time() * 1000))
        self._client.set_experiment_tag(experiment_id, f"{VIEW}{run_id}", view)
        if tags.get(NOTE, SEARCHED).startswith(SEARCHED):  # else a person has written another one
            self._client.set_experiment_tag(experiment_id, NOTE, experiment_note(study.name, experiment_id, run_id))

    def _create(self, name: str, tags: Mapping[str, str]) -> Run:
        every = {**tags, **self._study.source}
        return Run(self._client, self._client.create_run(self._experiment_id, tags=every, run_name=name))

    def _find_parent(self) -> Run | None:
        for run in self._search(f"tags.`{STUDY}` = '{self._study.name}'"):
            if all(run.data.tags.get(key) == value for key, value in self._study.tags.items()):
                return Run(self._client, run)
        return None

    def _find_trials(self, condition: str = "") -> dict[int, Run]:
        trials: dict[int, Run] = {}
        # The whole list first: to delete between two pages would shift the second.
        for run in list(self._search(f"tags.`{PARENT}` = '{self._parent.run_id}'{condition}")):
            number = run.data.tags.get(TRIAL)
            if number is None:
                continue  # a run that a person put under the study
            if int(number) in trials:
                # A request whose answer was lost was sent again: an empty twin. MLflow can restore what it deletes.
                self._client.delete_run(run.info.run_id)
            else:
                trials[int(number)] = Run(self._client, run)
        return trials

    def _search(self, condition: str) -> Iterator[MlflowRun]:
        """Runs of the experiment, the oldest first."""
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id], condition, max_results=PAGE, order_by=["start_time ASC"], page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return


def add_result(
    client: MlflowClient,
    experiment_id: str,
    study: StudyInfo,
    metrics: Mapping[str, float],
    winner: str | None,
    files: Sequence[Path] = (),
) -> None:
    """Add what came of a study to its run; nothing if it has none. Raises as `StudyRuns`.

    Args:
        client: of the MLflow store.
        experiment_id: of the study's project.
        study: which.
        metrics: by name; of the `step` that is among them.
        winner: what its finalists say, one line; None: nothing new.
        files: that are kept beside its report.
    """
    found = client.search_runs([experiment_id], f"tags.`{STUDY}` = '{study.name}'", order_by=["start_time ASC"])
    for run in found:
        if all(run.data.tags.get(key) == value for key, value in study.tags.items()):
            ours, step = Run(client, run), int(metrics.get("step", 0))
            ours.log((key, step, value) for key, value in metrics.items() if key != "step")
            if winner is not None:
                ours.tag({NOTE: with_winner(run.data.tags.get(NOTE, ""), winner)})
            for file in (study.report, *files):
                if file.is_file():
                    ours.keep_file(file)
            return


def _points(trial: TrialRecord, objectives: Sequence[Objective]) -> Iterator[Point]:
    """What is logged of a trial: what it is judged by goes first, for MLflow's pages show metrics in this order."""
    judged = [one.metric for one in objectives]
    step, best = 0, None
    found: dict[tuple[str, int], float] = {}
    for metrics in trial.history:
        step = int(metrics["step"])
        if judged[0] in metrics and objectives[0].improves(metrics, best):
            best = metrics
        found |= {(f"best_{key}", step): best[key] for key in judged if best is not None and key in best}
        for key in (*judged, *metrics):
            if key in metrics and (name := metric_name(key)) is not None:
                found[name, step] = metrics[key]
    if trial.status is not Status.RUNNING:
        found |= {(key, at): value for key, at, value in _result(trial, step)}
    return ((name, at, value) for (name, at), value in found.items())


def _result(trial: TrialRecord, step: int) -> Iterator[Point]:
    if trial.value is not None:
        for metric, value in (trial.values or {trial.settings["metric"]: trial.value}).items():
            yield f"best_{metric}", step, value
