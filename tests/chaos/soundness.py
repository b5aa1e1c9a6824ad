"""What must hold of a study when it is done, whatever was killed on its way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from chaos.searches import Search
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.numpy import load_file

from bilora_ray.records import Status, TrialRecord
from bilora_ray.search.study.view import StudyView
from bilora_ray.training.folder import COMPLETE, STATE, TENSORS, TrialFolder

LOST, DUPLICATED, TORN, LEFT_RUNNING, DISAGREES = (
    "trials lost",
    "duplicated",
    "checkpoints torn",
    "MLflow runs left RUNNING",
    "MLflow disagrees",
)
KINDS = (LOST, DUPLICATED, TORN, LEFT_RUNNING, DISAGREES)
Finding = tuple[str, str]  # its kind, and what was found


def findings(search: Search) -> list[Finding]:
    """All that is wrong with the finished study of `search`."""
    study = search.study()
    records = study.records()
    return [
        *_trials(search, study, records),
        *torn(search),
        *_runs(search, records),
    ]


def assert_sound(search: Search) -> None:
    """Nothing is wrong with the finished study of `search`."""
    assert findings(search) == [], search.log


def torn(search: Search) -> Iterator[Finding]:
    """Checkpoints, and adapters that they name, that cannot be read. The study need not be done."""
    for path in sorted(search.layout.trials(search.name).glob("*")):
        folder = TrialFolder(path)
        for checkpoint in folder.checkpoints.glob("*"):
            try:
                if COMPLETE.fullmatch(checkpoint.name):
                    _read(folder, checkpoint)
            except Exception as error:  # whatever it is, it cannot be read
                yield TORN, f"{checkpoint}: {type(error).__name__}: {error}"


def _read(folder: TrialFolder, checkpoint: Path) -> None:
    state = json.loads((checkpoint / STATE).read_text())
    assert folder.checkpoint_at(state["step"]) == checkpoint
    if (checkpoint / TENSORS).exists():  # an ended trial's are removed
        load_file(checkpoint / TENSORS)
    load_file(folder.adapter_at(state["best_step"]) / "adapter_model.safetensors")


def assert_resumed(search: Search, in_flight: Mapping[int, int]) -> None:
    """The trials that were `in_flight`, at these steps, went on from there."""
    assert in_flight, "no trial had a checkpoint: the moment is chosen badly"
    for number, step in in_flight.items():
        state = search.trial(number).state()
        # The verdict on a known evaluation may have died with the search: then the resumed trial stops where it was.
        assert max(state["resumed_at"], default=0) >= step or state["step"] == step, (number, step, state["resumed_at"])


def _trials(search: Search, study: StudyView, records: list[TrialRecord]) -> Iterator[Finding]:
    numbers = [record.number for record in records]
    for number in sorted(set(range(search.num_trials)) - set(numbers)):
        yield LOST, f"{search.name}: trial {number} is missing"
    for number in sorted(set(numbers) - set(range(search.num_trials))):
        yield DUPLICATED, f"{search.name}: trial {number} is one too many"
    for record in records:
        what = f"{search.name}: trial {record.number}"
        if record.status not in (Status.COMPLETE, Status.PRUNED):
            yield LOST, f"{what} is {record.status.value} ({record.error})"
        steps = [int(metrics["step"]) for metrics in record.history]
        last = steps[-1] if steps else 0
        if record.status is Status.COMPLETE and last != search.max_steps:
            yield LOST, f"{what} is complete at step {last}"
        if steps != list(range(search.eval_steps, last + 1, search.eval_steps)):
            yield DUPLICATED, f"{what} was evaluated at {steps}"
        if not set(study.study.trials[record.number].intermediate_values) <= set(steps):
            yield LOST, f"{what}: the study knows evaluations that its folder does not"


def _runs(search: Search, records: list[TrialRecord]) -> Iterator[Finding]:
    client = MlflowClient(search.mlflow_uri or f"sqlite:///{search.runs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("bilora-ray")
    runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
    parents = [run for run in runs if run.data.tags.get("bilora_ray.study") == search.name]
    if [run.info.status for run in parents] != ["FINISHED"]:
        yield LEFT_RUNNING, f"{search.name}: runs of the study are {[run.info.status for run in parents]}"
    ids = {run.info.run_id for run in parents}
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") in ids]
    by_number: dict[int, list[Run]] = {}
    for run in children:
        by_number.setdefault(int(run.data.tags["bilora_ray.trial"]), []).append(run)
        if run.info.status == "RUNNING":
            yield LEFT_RUNNING, f"{search.name}: {run.info.run_name}"
    for record in records:
        yield from _run(search, client, record, by_number.get(record.number, []))


def _run(search: Search, client: MlflowClient, record: TrialRecord, runs: list[Run]) -> Iterator[Finding]:
    what = f"{search.name}: trial {record.number}"
    if len(runs) != 1:
        yield DISAGREES, f"{what} has {len(runs)} runs"
        return
    tag, status = runs[0].data.tags.get("bilora_ray.status"), runs[0].info.status
    if tag != record.status.value or status != "FINISHED":
        yield DISAGREES, f"{what} is {record.status.value}, its run {status} and {tag}"
    told = Counter(metric.step for metric in client.get_metric_history(runs[0].info.run_id, "eval_loss"))
    if told != Counter(int(metrics["step"]) for metrics in record.history):
        yield DISAGREES, f"{what}: its run has the steps {sorted(told.elements())}"
