"""The winner of a trial beside its base model: the same numbers as `evaluate` gives, and the same texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_trials import Tiny, evaluate_adapter, run_fit

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError
from bilora_ray.measures import Task
from bilora_ray.records import Untrained
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.probe.untrained import compare
from bilora_ray.training.rows import about, read_sources, rows_of


def compared(config: TrialConfig, path: Path, measured: bool = True) -> Untrained:
    run_fit(config, path)
    folder = TrialFolder(path)
    adapter = folder.best_adapter()
    assert adapter is not None
    return compare(config, folder, adapter, {}, measured)


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_where_texts_are_written_the_base_model_is_measured_as_evaluate_does(
    tiny: Tiny, tmp_path: Path, task: Task
) -> None:
    config = tiny.config(task, predict_with_generate=True, metric="eval_exact_match", max_new_tokens=8)
    found = compared(config, tmp_path)
    assert found.baseline == {"kind": "base-model", **evaluate_adapter(None, config)}
    assert len(found.examples) == 8
    assert all(set(row) == {"prompt", "expected", "adapter", "base_model"} for row in found.examples)
    # What differs is the adapter's doing.
    assert any(row["adapter"] != row["base_model"] for row in found.examples)


def test_a_baseline_that_is_there_is_not_measured_again(tiny: Tiny, tmp_path: Path) -> None:
    found = compared(tiny.config("causal-lm"), tmp_path, measured=False)
    assert found.baseline is None
    assert len(found.examples) == 8


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("sequence-classification", "majority"),
        ("image-classification", "majority"),
        ("multi-label-classification", "majority"),
        ("regression", "mean"),
    ],
)
def test_where_an_answer_needs_no_learning_the_baseline_is_what_a_dry_run_tells(
    tiny: Tiny, tmp_path: Path, task: Task, kind: str
) -> None:
    config = tiny.config(task)
    found = compared(config, tmp_path)
    assert found.baseline is not None
    assert found.baseline["kind"] == kind
    assert about(rows_of(read_sources(config), config), config)[-1].endswith(f" {found.baseline[config.metric]:.4g}")
    # The head of the base model is random: what it says means nothing.
    assert {row["base_model"] for row in found.examples} == {None}
    with_labels = task in ("sequence-classification", "image-classification")
    assert all(("probability" in row) is with_labels for row in found.examples)
    assert all(0.5 <= row.get("probability", 0.5) <= 1 for row in found.examples)  # of two labels


def test_of_words_the_baseline_is_the_most_frequent_tag(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("token-classification", metric="eval_accuracy")
    rows = rows_of(read_sources(config), config)
    train, validation = ([tag for row in part for tag in row.tags] for part in (rows.train, rows.validation))  # type: ignore[attr-defined]
    usual = max(set(train), key=train.count)
    found = compared(config, tmp_path)
    assert found.baseline == {"kind": "majority", "eval_accuracy": validation.count(usual) / len(validation)}


def test_rows_that_are_others_now_are_compared_with_nothing(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm")
    run_fit(config, tmp_path)
    folder = TrialFolder(tmp_path)
    adapter = folder.best_adapter()
    assert adapter is not None
    with pytest.raises(MachineError, match="validation_data"):
        compare(config, folder, adapter, {"validation_data": "sha256:other"}, measured=True)
