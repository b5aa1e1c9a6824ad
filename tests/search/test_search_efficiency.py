"""The benchmark of searches counts what they cost, and shows the rival the same trials."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search_efficiency import (
    MEASURED,
    RIVAL,
    RIVALS,
    WAYS,
    Search,
    Table,
    Told,
    followed,
    ours,
    read_table,
    rivals,
    search,
)
from bilora_ray.search.simulated import moments
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import open_study

STEPS, RADII, RATES = (20, 40, 60), (0.01, 0.1, 1.0), (1e-4, 1e-3, 1e-2)


def planted(rate: float, rho: float | None, rank: int, step: int) -> float:
    """A loss that is linear in the logarithms, and falls with the steps."""
    return 1 + abs(math.log10(rate) + 3) + (0.0 if rho is None else 0.1 * math.log10(rho)) + 1 / rank + 10 / step


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "table.csv"
    trials = [("lora", rank, "", "", rate) for rank, rate in itertools.product((4, 8), RATES)]
    trials += [("bilora", *rest) for rest in itertools.product((4, 8), (2,), RADII, RATES)]
    columns = ["method", "rank", "auxiliary_rank", "rho", "learning_rate", "step", *MEASURED]
    with path.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(columns)
        for method, rank, auxiliary, rho, rate in trials:
            for number, step in enumerate(STEPS, 1):
                if (method, rank, rate) == ("lora", 8, 1e-2) and number == 3:
                    continue  # it diverged
                loss = planted(rate, rho or None, rank, step)
                seconds = number * (2.0 if method == "bilora" else 1.0)
                writer.writerow([method, rank, auxiliary, rho, rate, step, loss, 1 / loss, seconds])
    return path


@pytest.fixture(scope="module")
def table(file: Path) -> Table:
    return read_table(file)


def test_a_trial_between_the_points_of_the_grid_is_read_off(table: Table) -> None:
    settings = {"method": "bilora", "rank": 8, "auxiliary_rank": 2, "rho": 0.03, "learning_rate": 4e-4}
    told = table.curve(settings)
    assert [one["step"] for one in told] == [20, 40, 60]
    assert [one["eval_loss"] for one in told] == pytest.approx([planted(4e-4, 0.03, 8, step) for step in STEPS])
    assert [one["train_runtime"] for one in told] == pytest.approx([2, 4, 6])
    at_the_end = table.curve({**settings, "rho": 1.0, "learning_rate": 1e-2})
    assert at_the_end[0]["eval_loss"] == pytest.approx(planted(1e-2, 1.0, 8, 20))
    assert table.best("eval_loss") == pytest.approx(planted(1e-3, 0.01, 8, 60))
    assert table.best("eval_exact_match") == pytest.approx(1 / planted(1e-3, 0.01, 8, 60))


def test_plain_lora_has_no_radius_and_a_diverged_trial_the_worst_end(table: Table) -> None:
    told = table.curve({"method": "lora", "rank": 8, "learning_rate": 1e-2})
    assert [one["train_runtime"] for one in told] == pytest.approx([1, 2, 3])
    assert told[-1]["eval_loss"] == pytest.approx(max(grid[..., 0].max() for grid in table.curves.values()))


def test_a_table_that_lacks_a_trial_is_refused(file: Path, tmp_path: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("bilora,8,2,0.1,0.001,")]
    (tmp_path / "part.csv").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match=r"has no trial \('bilora', '8', '2', 0.1, 0.001\)"):
        read_table(tmp_path / "part.csv")


def test_seconds_are_counted_as_they_pass_and_the_budget_ends_a_search() -> None:
    def evaluations() -> list[Told]:
        return [
            Told(0, 2.0, {"eval_loss": 3.0}, False),
            Told(1, 2.0, {"eval_loss": 0.5}, False),  # never ends, so it does not count
            Told(0, 2.0, {"eval_loss": 4.0}, True),  # the best of its evaluations is what is kept of it
            Told(2, 1.0, {"eval_loss": 2.0}, True),
            Told(3, 1.0, {"eval_loss": 1.0}, True),
        ]

    assert followed(iter(evaluations()), "eval_loss", 7.5) == Search([6.0, 7.0], [3.0, 2.0], 3)
    whole = followed(iter(evaluations()), "eval_loss", 100)
    assert (whole.seconds, whole.values, whole.trials) == ([6.0, 7.0, 8.0], [3.0, 2.0, 1.0], 4)
    assert math.isnan(whole.value_at(5.9))
    assert whole.value_at(7.5) == 2.0
    assert (whole.reaches(2.5, greater=False), whole.reaches(0.1, greater=False)) == (7.0, math.inf)


@pytest.mark.parametrize("judge", ["eval_loss", "eval_exact_match"])
def test_the_rival_sees_the_same_numbers(table: Table, judge: str, tmp_path: Path) -> None:
    """Each of its evaluations is one of the table's, at the price of the table, for both, and nothing is told twice."""
    for told in (
        list(rivals(table, judge, RIVAL, 0, 12)),
        list(ours(table, judge, (), 0, 12, tmp_path)),
    ):
        steps: dict[int, list[float]] = {}
        for one in told:
            steps.setdefault(one.trial, []).append(one.metrics["step"])
            assert one.seconds == pytest.approx(one.metrics["train_runtime"] / len(steps[one.trial]))
            assert one.complete == (one.metrics["step"] == STEPS[-1])
        assert sorted(steps) == list(range(12))
        assert all(tuple(seen) == STEPS[: len(seen)] for seen in steps.values())
        assert any(len(seen) < len(STEPS) for seen in steps.values())


def test_memory_decides_as_the_study_database_does(table: Table, tmp_path: Path) -> None:
    in_memory = [(one.trial, one.metrics, one.complete) for one in ours(table, "eval_loss", (), 7, 9, tmp_path / "a")]
    searched = ("method={choice: [lora, bilora]}", "rank={choice: [4, 8]}", "auxiliary_rank={choice: [2]}")
    searched += ("rho={low: 0.01, high: 1.0, log: true}", "learning_rate={low: 1e-4, high: 1e-2, log: true}")
    task = ("model_name_or_path=org/model", "task=causal-lm", "train_data=org/data", "validation_data=org/validation")
    study = ("study.name=s", "study.num_trials=9", "study.seed=7", "max_steps=60")
    opened = open_study(load_space(None, [*task, *searched, *study]), Layout(tmp_path / "b"), {})
    found = list(moments(opened, lambda config: table.curve(config.model_dump()), 4))
    opened.release()
    assert in_memory == [(one.number, one.metrics, one.status.value == "complete") for one in found]


def test_every_way_that_there_is_can_be_searched(file: Path) -> None:
    # The quickstart's point is none of this table.
    for way in (way for way in (*WAYS, *RIVALS) if not way.endswith("file")):
        found = search(file, "eval_loss", way, seed=0, trials=4)
        assert np.all(np.diff(found.values) < 0), way
        assert found.trials, way
