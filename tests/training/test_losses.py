"""The training loss is the mean cross-entropy of what a row teaches, in float32, whatever the base would make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import TASKS, Tiny, reproducible, run_fit
from torch.nn import functional

from bilora_ray.measures import Task
from bilora_ray.release.export import export_merged
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run


def base_that_says(tiny: Tiny, task: Task, folder: Path, **changes: Any) -> str:
    """The task's model without dropout, with `changes` in its config."""
    copy = shutil.copytree(tiny.model(task), folder / "model")
    config = json.loads((copy / "config.json").read_text())
    rates = {key: 0.0 for key in config if "dropout" in key and isinstance(config[key], float)}
    (copy / "config.json").write_text(json.dumps(config | rates | changes))
    return str(copy)


def mean_by_hand(run: Run) -> float:
    """The loss over all training rows in float64, of the logits that the model gives to each alone."""
    total, count = 0.0, 0
    for example in run.data.train:
        batch = run.task.collate([example], run.data.tokenizer)
        with torch.no_grad():
            logits = run.model(**batch if run.config.task == "seq2seq-lm" else {**batch, "labels": None}).logits
        labels = batch["labels"]
        if run.config.task == "regression":
            total, count = total + float((logits.double()[0, 0] - example.labels[0]) ** 2), count + 1
            continue
        if run.config.task == "multi-label-classification":
            has = torch.tensor([[float(label in example.labels) for label in range(logits.shape[-1])]]).double()
            total += float(functional.binary_cross_entropy_with_logits(logits.double(), has))
            count += 1
            continue
        if run.config.task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        scores, labels = logits.double().log_softmax(-1).flatten(0, -2), labels.flatten()
        total -= sum(float(scores[row, label]) for row, label in enumerate(labels.tolist()) if label != -100)
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("task", TASKS)
def test_in_bf16_the_loss_is_computed_and_weighted_in_float32(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    model = base_that_says(tiny, task, tmp_path)
    # A row a pass: nothing is padded, and each pass has a weight of its own.
    passes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 44}
    config = tiny.config(task, model_name_or_path=model, precision="bf16", method="lora", max_steps=1, **passes)
    run = Run(config, TrialFolder(tmp_path / "trial"))
    expected = mean_by_hand(run)
    run.train_step()
    assert run.window.train_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_what_a_base_was_trained_for_does_not_matter(problem: str, tiny: Tiny, tmp_path: Path) -> None:
    name: Task = "sequence-classification"
    settings: dict[str, Any] = {"max_steps": 2, "eval_steps": 1}
    plain = base_that_says(tiny, name, tmp_path / "plain")
    other = base_that_says(tiny, name, tmp_path / "other", problem_type=problem)
    expected, _ = run_fit(tiny.config(name, model_name_or_path=plain, **settings), tmp_path / "a")
    reports, _ = run_fit(tiny.config(name, model_name_or_path=other, **settings), tmp_path / "b")
    assert reproducible(reports) == reproducible(expected)
    adapter = TrialFolder(tmp_path / "b").best_adapter()
    assert adapter is not None
    export_merged(adapter, tmp_path / "merged", {})
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["problem_type"] == "single_label_classification"
