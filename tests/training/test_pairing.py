"""Trainings of several methods on one seed share all that the seed decides: what is compared is the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import Tiny

from bilora_ray.config import TrialConfig
from bilora_ray.method import primary_parameters
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run

METHODS = ("lora", "bilora", "lora-sam", "looksam", "esam", "nbar", "obar", "flat-lora", "rwp")


def begun(config: TrialConfig, folder: Path) -> dict[str, Any]:
    """What the seed has decided before the first step: weights, rows, their order, and what dropout draws next."""
    run = Run(config, TrialFolder(folder))
    first = {name: parameter.detach().clone() for name, parameter in primary_parameters(run.model).items()}
    rows = [[example.input_ids for example in run._rows_of(step)] for step in range(4)]
    held_out = [example.input_ids for example in run.data.validation]
    drawn = torch.rand(8)
    run.base.end()
    return {"weights": first, "rows": rows, "held_out": held_out, "drawn": drawn.tolist()}


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_seed_gives_all_methods_the_same(method: str, tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seed": 11, "split_seed": 5, "lora_dropout": 0.1, "validation_data": None}
    lora = begun(tiny.config("causal-lm", **settings, method="lora", variant="a"), tmp_path / "lora")
    other = begun(tiny.config("causal-lm", **settings, method=method, variant="b"), tmp_path / method)
    assert lora["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(value, other["weights"][name]) for name, value in lora["weights"].items())
    for decided in ("rows", "held_out", "drawn"):
        assert lora[decided] == other[decided], decided


def test_another_seed_changes_all_but_the_held_out_rows(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"split_seed": 5, "lora_dropout": 0.1, "validation_data": None, "method": "lora"}
    one, two = (begun(tiny.config("causal-lm", **settings, seed=seed), tmp_path / str(seed)) for seed in (1, 2))
    assert one["held_out"] == two["held_out"]
    assert one["rows"] != two["rows"]
    assert one["drawn"] != two["drawn"]
    assert any(not torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())
