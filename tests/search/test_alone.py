"""A trial without a search: what the study says of each evaluation is what the training hears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from optuna.trial import TrialState
from tiny_trials import CHAT_TEMPLATE, Tiny, evaluate_adapter

from bilora_ray.cli.main import main
from bilora_ray.errors import MachineError, UserError
from bilora_ray.recipe import read_recipe
from bilora_ray.records import Status
from bilora_ray.search import alone
from bilora_ray.search.preflight import preflight
from bilora_ray.search.session import Observers
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import check_study, open_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.training import loop


@pytest.fixture
def study(tiny: Tiny, tmp_path: Path) -> SearchStudy:
    """A study of one trial, which evaluates at the steps 2, 4, 6 and 8."""
    return study_of_one(tiny, tmp_path)


def study_of_one(tiny: Tiny, tmp_path: Path, **more: Any) -> SearchStudy:
    trial = tiny.config("causal-lm", **more).model_dump(exclude_unset=True)
    settings = ["study.name=s", "study.num_trials=1", *(f"trial.{key}={value}" for key, value in trial.items())]
    study = open_study(load_space(None, settings), Layout(tmp_path / "runs"), {})
    assert study.next_trials() == [0]
    return study


def test_the_last_evaluation_ends_the_trial(study: SearchStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = []
    fit = loop.fit

    def spied(config: Any, folder: Any, report: loop.Report, *more: Any, **others: Any) -> Any:
        return fit(config, folder, lambda metrics: verdicts.append(report(metrics)) or verdicts[-1], *more, **others)

    monkeypatch.setattr(loop, "fit", spied)
    alone._train(study, 0, Observers([]), lambda _: None)
    assert verdicts == [True, True, True, False]
    assert study.record(0).status is Status.COMPLETE


def test_a_trial_that_is_out_of_patience_is_complete(tiny: Tiny, tmp_path: Path) -> None:
    # No evaluation is better than the first by so much.
    study = study_of_one(tiny, tmp_path, early_stopping_patience=2, early_stopping_threshold=100.0)
    alone._train(study, 0, Observers([]), lambda _: None)
    record = study.record(0)
    assert record.status is Status.COMPLETE
    assert [metrics["step"] for metrics in record.history] == [2, 4, 6]
    assert record.value == min(metrics["eval_loss"] for metrics in record.history)
    assert record.adapter is not None
    assert record.adapter.is_dir()


def test_a_trial_that_the_study_ends_trains_no_further(study: SearchStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    def prune(number: int, metrics: Mapping[str, float]) -> Status:
        study._end(number, TrialState.PRUNED)
        return Status.PRUNED

    monkeypatch.setattr(study, "report", prune)
    alone._train(study, 0, Observers([]), lambda _: None)
    assert study.folder(0).state()["step"] == 2
    assert study.record(0).status is Status.PRUNED


def test_a_trial_that_diverges_late_is_failed_and_its_earlier_adapter_exported(
    study: SearchStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = loop.evaluate

    def diverging(*arguments: Any) -> dict[str, float]:
        metrics = evaluate(*arguments)
        return metrics if study.folder(0).latest() is None else metrics | {"eval_loss": math.nan}

    monkeypatch.setattr(loop, "evaluate", diverging)
    alone._train(study, 0, Observers([]), lambda _: None)
    record = study.record(0)
    assert (record.status, record.error) == (Status.FAILED, "loss is nan at step 4")
    study.release()
    typed = ["export", "s", "--trial", "0", "--storage-path", str(tmp_path / "runs"), "--output", str(tmp_path / "x")]
    result = CliRunner().invoke(main, typed)
    assert result.exit_code == 0, result.output
    assert read_recipe(tmp_path / "x")["step"] == 2
    assert evaluate_adapter(tmp_path / "x", study.config(0))["eval_loss"] == record.loss


def test_what_would_be_the_same_again_is_one_line_and_fails_the_trial(
    study: SearchStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: Any, **others: Any) -> None:
        raise TypeError("not so")

    monkeypatch.setattr(loop, "fit", fit)
    alone._train(study, 0, Observers([]), lambda _: None)
    record = study.record(0)
    assert (record.status, record.error) == (Status.FAILED, "TypeError: not so")
    assert study.study.trials[0].state is TrialState.FAIL


def test_a_trial_does_not_go_on_with_other_rows_than_the_study_began_with(tiny: Tiny, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((tiny.folder / "texts-train.jsonl").read_bytes())
    trial = tiny.config("causal-lm", train_data=str(rows)).model_dump(exclude_unset=True)
    settings = ["study.name=s", "study.num_trials=1", *(f"trial.{key}={value}" for key, value in trial.items())]
    began = preflight(load_space(None, settings)).digests
    study = open_study(load_space(None, settings), Layout(tmp_path / "runs"), began)
    assert study.next_trials() == [0]
    with rows.open("a") as file:
        file.write('{"prompt": "a", "completion": "b"}\n')
    now = preflight(load_space(None, settings)).digests
    line = (
        f"train_data: {rows} has changed since the study began: its digest was {began[str(rows)]}, is {now[str(rows)]}"
    )
    with pytest.raises(MachineError) as caught:
        alone._train(study, 0, Observers([]), lambda _: None)
    assert str(caught.value) == f"{line}; mend that and go on with --resume"
    # Nothing is lost: with the rows as they were it goes on.
    assert study.record(0).status is Status.RUNNING
    rows.write_bytes((tiny.folder / "texts-train.jsonl").read_bytes())
    alone._train(study, 0, Observers([]), lambda _: None)
    assert study.record(0).status is Status.COMPLETE


def test_a_trial_does_not_go_on_with_another_chat_template(tiny: Tiny, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE)
    data = {f"{split}_data": str(tiny.folder / f"chats-{split}.jsonl") for split in ("train", "validation")}
    trial = tiny.config("causal-lm", **data, messages_column="messages", chat_template=str(template))
    given = trial.model_dump(exclude_unset=True).items()
    settings = ["study.name=s", "study.num_trials=1", *(f"trial.{key}={value}" for key, value in given)]
    space, layout = load_space(None, settings), Layout(tmp_path / "runs")
    study = open_study(space, layout, preflight(space).digests)
    assert study.next_trials() == [0]
    template.write_text(CHAT_TEMPLATE.removeprefix("{{ bos_token }}"))
    with pytest.raises(MachineError, match=f"^chat_template: {template} has changed since the study began: "):
        alone._train(study, 0, Observers([]), lambda _: None)
    study.release()
    with pytest.raises(UserError, match=f"^study 's' began with other chat template: {template} was "):
        check_study(space, layout, True, preflight(space).digests)
    template.write_text(CHAT_TEMPLATE)
    check_study(space, layout, True, preflight(space).digests)
