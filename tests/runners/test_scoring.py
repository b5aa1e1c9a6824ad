"""What adapters and models are worth on the test rows, and how flat they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import Tiny, run_fit

from bilora_ray.runners.scoring import Scorer
from bilora_ray.search.comparing.file import load_comparison
from bilora_ray.search.comparing.run import _targets
from bilora_ray.training.folder import TrialFolder

RADIUS = 0.05
FILE = """
comparison: {name: c, baseline: full}
trial: {model_name_or_path: org/model, task: causal-lm, train_data: org/data, test_data: org/test,
        target_modules: [q_proj, v_proj], learning_rate: {low: 1.0e-4, high: 1.0e-2}}
methods: {lora: {}, full: {}}
"""


@pytest.fixture
def scorer() -> Scorer:
    return Scorer(torch.get_num_threads(), 0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_is_as_flat_as_its_own_evaluation_says(method: Any, tiny: Tiny, tmp_path: Path, scorer: Scorer) -> None:
    config = tiny.config("causal-lm", method=method, learning_rate=1e-3, max_steps=2, eval_steps=2)
    config = config.model_copy(update={"test_data": config.validation_data})
    (told,), _ = run_fit(config.model_copy(update={"sharpness_radius": RADIUS}), tmp_path)
    found = scorer.score(str(TrialFolder(tmp_path).best_adapter()), config.model_dump(), RADIUS)
    assert found["sharpness"] == pytest.approx(told["sharpness"], rel=1e-4)
    assert found["eval_loss"] == pytest.approx(told["eval_loss"], rel=1e-6)


def test_it_is_told_how_flat_it_is_where_that_is_asked_for_and_nowhere_else(
    tiny: Tiny, tmp_path: Path, scorer: Scorer
) -> None:
    config = tiny.config("causal-lm", max_steps=1, eval_steps=1)
    run_fit(config, tmp_path)
    told = {**config.model_dump(), "test_data": config.validation_data, "sharpness_radius": RADIUS}
    assert "sharpness" not in scorer.score(str(TrialFolder(tmp_path).best_adapter()), told, None)


def test_a_whole_model_is_as_flat_in_the_same_weights_as_an_adapter(tiny: Tiny, tmp_path: Path, scorer: Scorer) -> None:
    """Of trainings that hardly move, both measure the base model."""
    still: dict[str, Any] = {"learning_rate": 1e-12, "max_steps": 1, "eval_steps": 1}
    lora = tiny.config("causal-lm", method="lora", target_modules=["q_proj", "v_proj"], **still)
    full = tiny.config("causal-lm", method="full", **still)
    found = []
    for config in (lora, full):
        run_fit(config, tmp_path / config.method)
        left = TrialFolder(tmp_path / config.method).best_adapter()
        told = {**config.model_dump(), "test_data": config.validation_data, "target_modules": lora.target_modules}
        found.append(scorer.score(str(left), told, RADIUS)["sharpness"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_those_weights_are_those_of_an_entry_with_an_adapter(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(FILE, encoding="utf-8")
    assert _targets(load_comparison(file)) == {"target_modules": ("q_proj", "v_proj")}
