"""Sharpness as what a study is searched by, and as a column beside that."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_trials import Tiny, run_fit

from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.records import Status
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study, open_study

TRIAL = (
    "model_name_or_path=org/model",
    "task=causal-lm",
    "train_data=org/data",
    "rho={low: 0.1, high: 0.9}",
    "study.name=s",
    "study.num_trials=12",
)
MEASURED = "sharpness_radius=0.1"


def space(*given: str) -> Space:
    return load_space(None, [*TRIAL, *given])


def curve(config: TrialConfig) -> list[Metrics]:
    """A larger radius is flatter, and worse."""
    return [
        {
            "step": step,
            "max_steps": 4,
            "eval_loss": config.rho + 1 / step,
            "sharpness": 1 - config.rho + step / 100,
            "train_runtime": 2.0 * step,
        }
        for step in range(1, 5)
    ]


def test_a_study_may_be_searched_for_flat_minima(tmp_path: Path) -> None:
    study = open_study(space(MEASURED, "metric=sharpness"), Layout(tmp_path), {})
    simulate(study, curve, keep=True)
    best = study.best()
    assert best is not None
    ended = [record for record in study.records() if record.status is Status.COMPLETE]
    assert best.value == min(record.value for record in ended if record.value is not None)


def test_it_may_be_one_of_several_objectives(tmp_path: Path) -> None:
    both = "study.objectives=[{metric: eval_loss}, {metric: sharpness, mode: min}]"
    study = open_study(space(MEASURED, both), Layout(tmp_path), {})
    simulate(study, curve, keep=True)
    assert len(study.front(study.records())) > 1  # what is better is sharper
    with pytest.raises(UserError, match="no evaluation tells 'sharpness'"):
        space(both)


def test_where_it_is_measured_it_stands_beside_the_metric(tmp_path: Path) -> None:
    simulate(open_study(space(MEASURED), Layout(tmp_path), {}), curve, keep=True)
    for record in load_study(Layout(tmp_path), "s").records():
        kept = min(record.history, key=lambda told: told["eval_loss"])
        assert record.values == {"eval_loss": kept["eval_loss"], "sharpness": kept["sharpness"]}


def test_a_search_for_quality_and_flatness_of_trials_that_are_trained_ends_with_a_front(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny.config("causal-lm", max_steps=4, sharpness_radius=0.1, adversary_steps=2)
    given = [f"{key}={value}" for key, value in config.model_dump(exclude_unset=True).items() if value is not None]
    searched = [
        "method={choice: [lora, bilora]}",
        "rho={low: 0.01, high: 0.2}",
        "learning_rate={low: 1e-3, high: 2e-2}",
    ]
    both = ["study.objectives=[{metric: eval_loss}, {metric: sharpness}]", "study.name=s", "study.num_trials=5"]
    study = open_study(load_space(None, [*given, *searched, *both, "study.scheduler=none"]), Layout(tmp_path), {})
    places = iter(range(5))
    simulate(study, lambda config: run_fit(config, tmp_path / "trained" / str(next(places)))[0], keep=True)
    records = study.records()
    front = {record.number for record in study.front(records)}
    for record in records:
        kept = min(record.history, key=lambda told: told["eval_loss"])
        assert record.values == {"eval_loss": kept["eval_loss"], "sharpness": kept["sharpness"]}
        assert all(("captured_sharpness" in told) is (record.settings["method"] == "bilora") for told in record.history)
        better = [one for one in records if all(one.values[name] < record.values[name] for name in record.values)]
        assert (record.number in front) is not bool(better)
    shown = CliRunner().invoke(main, ["show", "s", "--storage-path", str(tmp_path)], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    assert {"front", "eval_loss", "sharpness", "method"} <= set(shown.output.split())
    file = tmp_path / "page.html"
    page = CliRunner().invoke(main, ["report", "s", "--storage-path", str(tmp_path), "--output", str(file)])
    assert page.exit_code == 0, page.output
    assert all(f'id="{section}"' in file.read_text(encoding="utf-8") for section in ("front", "flatness"))
