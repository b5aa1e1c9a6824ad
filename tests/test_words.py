"""The words that a study is told in: one table, whoever tells it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args, get_type_hints

import pytest

from bilora_ray.cli.leaderboard import _beside
from bilora_ray.config import TrialConfig
from bilora_ray.records import Objective, Status, TrialRecord
from bilora_ray.release.card import _scores
from bilora_ray.report.found import Found
from bilora_ray.report.sections import _gain
from bilora_ray.tracking.pages import baseline_line, study_note, trial_note
from bilora_ray.training.data.labels import Unlearned
from bilora_ray.training.probe.untrained import OF_BASE
from bilora_ray.words import WITHOUT_TRAINING, status_of

LOSS = Objective("eval_loss", greater_is_better=False)


def told(baseline: dict[str, Any]) -> dict[str, str]:
    """What each place that names a baseline makes of it."""
    config = TrialConfig(model_name_or_path="m", task="causal-lm", train_data="d")
    of_study = SimpleNamespace(baseline_of=lambda _: baseline, config=lambda _: None, objective=LOSS)
    return {
        "show": _beside(cast(Any, of_study), TrialRecord(0, Status.COMPLETE, {}, {})),
        "MLflow": str(baseline_line(baseline, "eval_loss")),
        "the page": " ".join(_gain(Found(cast(Any, None), cast(Any, None), [LOSS], [], baseline=baseline), 0.5)),
        "the card": _scores(config, {"eval_loss": 0.5, "baseline": baseline}),
    }


@pytest.mark.parametrize("kind", [*WITHOUT_TRAINING, "a kind of a later version"])
def test_a_baseline_has_the_same_words_wherever_it_is_told(kind: str) -> None:
    words = WITHOUT_TRAINING.get(kind, "no training")
    assert {place: words in line for place, line in told({"kind": kind, "eval_loss": 2.5}).items()} == dict.fromkeys(
        ["show", "MLflow", "the page", "the card"], True
    )


def test_each_kind_of_baseline_has_its_words() -> None:
    assert {OF_BASE, *get_args(get_type_hints(Unlearned)["kind"])} == set(WITHOUT_TRAINING)


@pytest.mark.parametrize("status", [Status.COMPLETE, Status.PRUNED, Status.FAILED])
def test_a_trial_stands_in_mlflow_as_on_the_terminal(status: Status) -> None:
    ended = TrialRecord(1, status, {}, {}), TrialRecord(2, Status.COMPLETE, {}, {}, ended_by="max_hours")
    for trial in ended:
        assert trial_note(trial, "s", "s", Path()).startswith(f"Trial {trial.number} of s: {status_of(trial)}")
    note = study_note(ended, None, "", "s", Path(), [])
    assert note.endswith(f"2 trials: 1 {status_of(ended[0])}, 1 ended by max_hours.")
