"""What a person reads in MLflow's pages: names of runs, descriptions in Markdown, and a view of the table of runs.

Everything here is a pure function of records and settings.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.words import counted, status_of, without_training

# MLflow's tags: of a run or an experiment, what its page describes it by; of an experiment, a view of its runs, which
# the page offers by name.
NOTE = "mlflow.note.content"
VIEW = "mlflow.sharedViewState."
# Without it MLflow's pages are of another kind of work, and show no runs.
TRAINING = "workflowType=machine_learning"
# Of an evaluation, what is no metric, and what has another name than a setting.
COUNTERS = frozenset({"step", "max_steps"})
RENAMED = {"learning_rate": "current_learning_rate"}
# Begins the description of an experiment, if it is ours.
SEARCHED = "LoRA adapters, searched by bilora-ray"
# What settings that nearly each study searches are called in the name of a run.
SHORT = {"rank": "r", "auxiliary_rank": "a", "learning_rate": "lr "}
LONGEST_NAME = 120
# Begins the paragraph of a description that tells of finalists; it takes the place of an older one.
WINNER = "**Winner"
BEST = "**The best of its study.**"


def run_name(trial: TrialRecord) -> str:
    """The name of a trial's run: `trial 5: r8 a8 rho 0.0053 lr 0.006`."""
    words = [_in_short(key, value) for key, value in trial.sampled.items() if value is not None]
    name = f"trial {trial.number}: {' '.join(words)}" if words else f"trial {trial.number}"
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _in_short(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value.rpartition("/")[2]  # the name of a model or a file is at its end
    text = f"{value:.2g}" if isinstance(value, float) else json.dumps(value)
    return f"{SHORT.get(key, f'{key} ')}{text}"


def metric_name(key: str) -> str | None:
    """What MLflow calls the number `key` of an evaluation; None if it is no metric."""
    return None if key in COUNTERS else RENAMED.get(key, key)


def view_of(study: str, run_id: str, objective: Objective, searched: Iterable[str], time_ms: int) -> str:
    """The value of a VIEW tag: the study's runs alone, the best first, with what was searched and what came of it.

    Args:
        study: name of the study, which is the view's.
        run_id: of the study's run.
        objective: what trials are judged by.
        searched: the settings that differ between trials.
        time_ms: when the view was made.
    """
    best = f"metrics.`best_{objective.metric}`"
    columns = [best, *(f"params.`{key}`" for key in searched), "tags.`bilora_ray.status`"]
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": best,
        "orderByAsc": not objective.greater_is_better,
        "selectedColumns": columns,
    }
    return json.dumps({"name": study, "createdAt": time_ms, "updatedAt": time_ms, "state": json.dumps(state)})


def link(text: str, experiment_id: str, run_id: str) -> str:
    """A link to the page of a run."""
    return f"[{text}](#/experiments/{experiment_id}/runs/{run_id}?{TRAINING})"


def view_address(experiment_id: str, run_id: str) -> str:
    """Where a study's view is, in the pages of MLflow."""
    return f"#/experiments/{experiment_id}/runs?{TRAINING}&viewStateShareKey={run_id}"


def experiment_note(study: str, experiment_id: str, run_id: str) -> str:
    """The description of an experiment; that of a study is the run `run_id`."""
    newest = link(study, experiment_id, run_id)
    return f"{SEARCHED}. Newest study: {newest}, its [trials]({view_address(experiment_id, run_id)})"


def trial_note(trial: TrialRecord, study: str, parent: str, storage_path: Path) -> str:
    """The description of a trial's run, once it has ended.

    Args:
        trial: its record.
        study: name of the study.
        parent: the link to the study's run.
        storage_path: of the study.
    """
    lines = [f"Trial {trial.number} of {parent}: {status_of(trial)}{_values(trial)}"]
    if trial.error is not None or trial.broken is not None:
        lines += [_code(trial.error or trial.broken or "")]
    if trial.adapter is not None:
        lines += _take(trial, study, storage_path, f" --trial {trial.number}")
    return "\n\n".join(lines)


def best_note(note: str) -> str:
    """The description of a trial's run that is the best of its study."""
    return note if note.startswith(BEST) else f"{BEST} {note}"


def other_note(note: str) -> str:
    """The description of a trial's run that is no more the best of its study."""
    return note.removeprefix(f"{BEST} ")


def study_note(
    trials: Sequence[TrialRecord],
    best: TrialRecord | None,
    best_link: str,
    study: str,
    storage_path: Path,
    told: Sequence[str],
) -> str:
    """The description of a study's run.

    Args:
        trials: all of the study's.
        best: the best of them.
        best_link: the link to its run.
        study: name of the study.
        storage_path: of the study.
        told: what else there is to say, a line each, in Markdown.
    """
    tried = f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}{f': {counted(trials)}' if trials else ''}."
    if best is None:
        none = [] if any(trial.status is Status.COMPLETE for trial in trials) else ["No trial is complete yet."]
        return "\n\n".join([*none, tried, *_bullets(told)])
    lines = [f"**Best: {best_link}{_values(best)}**"]
    if best.adapter is not None:  # before all else, since the page shows the beginning only
        lines += _take(best, study, storage_path, "")
    return "\n\n".join([*lines, tried, *_bullets(told), _settings(best)])


def with_winner(note: str, line: str) -> str:
    """`note` after the paragraph that tells of finalists: `line`, which closes the bold type that it begins in."""
    first, _, rest = note.partition("\n\n")
    return f"{WINNER} {line}\n\n{rest if first.startswith(WINNER) else note}"


def _values(trial: TrialRecord) -> str:
    values = trial.values or ({} if trial.value is None else {str(trial.settings.get("metric", "")): trial.value})
    return "".join(f", {metric} {value:.6g}" for metric, value in values.items())


def _settings(trial: TrialRecord) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in trial.sampled.items() if value is not None]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows]) if rows else ""


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|").replace("\n", " ")


def _take(trial: TrialRecord, study: str, storage_path: Path, which: str) -> list[str]:
    command = f"bilora-ray export {shlex.quote(study)}{which} --storage-path {shlex.quote(str(storage_path))}"
    return [f"Adapter: `{trial.adapter}`", _code(f"{command} --output {shlex.quote(study)}-adapter")]


def _bullets(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def baseline_line(baseline: Mapping[str, Any], metric: str) -> str | None:
    """What a score is to be compared with, in words; None where that is not known.

    Args:
        baseline: `kind` (base-model, majority, mean) and values by metric.
        metric: that trials are judged by.
    """
    value = baseline.get(metric)
    if not isinstance(value, int | float):
        return None
    return f"To compare with: {without_training(baseline)} has {metric} {value:.6g}"
