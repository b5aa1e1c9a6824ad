"""What a study keeps of its winner beside what needs no training: once, whatever is killed; absent where unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from bilora_ray.checking import before
from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError
from bilora_ray.records import Untrained
from bilora_ray.report.found import read
from bilora_ray.runners.untrained import BesideBase
from bilora_ray.search import run
from bilora_ray.search.session import told_of
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control.finalists import begin, finals_of
from bilora_ray.search.study.control.untrained import Asked, keep, to_compare
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study, open_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.search.study.view import COMPARED, StudyView

BASELINE = {"kind": "base-model", "eval_loss": 2.5}
OPTIONS: tuple[tuple[str, ...], ...] = ((), ("--json",))
EXAMPLES = [{"prompt": "1 + 1 =", "expected": " 2", "adapter": " 2", "base_model": " größer"}]


def space(*more: str) -> Space:
    study = {"name": "s", "num_trials": 4, "scheduler": "none", "sampler": "random"}
    trial = {"model_name_or_path": "org/model", "task": "causal-lm", "train_data": "org/data"}
    trial["rho"] = "{low: 0.1, high: 0.9}"
    given = {**{f"study.{key}": value for key, value in study.items()}, **{f"trial.{k}": v for k, v in trial.items()}}
    given |= dict(text.split("=", maxsplit=1) for text in more)
    found = load_space(None, [f"{key}={value}" for key, value in given.items()])
    # As a start has it, which says what earlier versions had not.
    newer = {key: TrialConfig.model_fields[key].default for key in before(TrialConfig)}
    return replace(found, fixed={**newer, **found.fixed})


def curve(config: TrialConfig) -> list[Metrics]:
    """The better the smaller the radius."""
    return [{"step": s, "max_steps": 2, "eval_loss": config.rho, "train_runtime": float(s)} for s in (1, 2)]


def searched(layout: Layout, space: Space, begun: SearchStudy | None = None) -> SearchStudy:
    study = begun or open_study(space, layout, {})
    simulate(study, curve, workers=2, keep=True)
    study.release()
    for record in study.records():
        assert record.adapter is not None
        record.adapter.mkdir(parents=True, exist_ok=True)
    return study


def asked_of(study: StudyView) -> Asked:
    found = to_compare(study)
    assert found is not None
    return found


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def test_a_study_keeps_its_baseline_and_its_examples_and_is_asked_once(layout: Layout) -> None:
    study = searched(layout, space())
    asked = asked_of(study)
    assert asked.measured
    assert asked.winner.number == min(study.records(), key=lambda record: record.value or 0.0).number
    keep(asked, BASELINE, EXAMPLES)
    found = load_study(layout, "s")
    assert found.baseline() == BASELINE
    assert found.examples() == EXAMPLES
    assert to_compare(open_study(space(), layout, {})) is None


def test_who_was_killed_before_the_end_of_it_is_asked_again(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    study = searched(layout, space())
    with monkeypatch.context() as patch:

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("optuna.Study.set_user_attr", killed)
        with pytest.raises(KeyboardInterrupt):
            keep(asked_of(study), BASELINE, EXAMPLES)
    assert load_study(layout, "s").baseline() is None
    assert asked_of(load_study(layout, "s")).measured
    assert [file.name for file in layout.study("s").glob("*example*")] == ["examples.json"]


def test_a_longer_search_with_another_winner_has_other_examples_and_the_same_baseline(layout: Layout) -> None:
    study = searched(layout, space())
    keep(asked_of(study), BASELINE, EXAMPLES)
    longer = searched(layout, space(), open_study(space("study.num_trials=12"), layout, {}))
    asked = asked_of(longer)
    assert asked.winner.number > 3
    assert not asked.measured
    assert longer.examples() == []  # what the one before has made of them is nothing of the new one's
    keep(asked, None, [])
    assert longer.study.user_attrs[COMPARED]["trial"] == asked.winner.number
    assert load_study(layout, "s").baseline() == BASELINE


def test_a_winner_with_another_base_model_is_measured_beside_its_own(layout: Layout) -> None:
    bases = "trial.model_name_or_path={choice: [org/one, org/two, org/three, org/four, org/five]}"
    study = searched(layout, space(bases))
    keep(asked_of(study), BASELINE, EXAMPLES)
    assert told(layout) == {"show": True, "JSON": BASELINE, "MLflow": True, "page": BASELINE}
    longer = searched(layout, space(), open_study(space(bases, "study.num_trials=12"), layout, {}))
    asked = asked_of(longer)
    old, new = (longer.config(number).model_name_or_path for number in (_best_of(study, 4), asked.winner.number))
    assert asked.measured is (old != new)
    assert old != new, "the case is not met: take another seed"
    origins = {number: longer.origin(longer.record(number)) for number in (_best_of(study, 4), asked.winner.number)}
    assert ["baseline" in origin for origin in origins.values()] == [True, False]
    # Beside the best of now nothing is told of another base model.
    assert told(layout) == {"show": False, "JSON": None, "MLflow": False, "page": {}}


def told(layout: Layout) -> dict[str, Any]:
    """Whether the study tells a baseline, by who tells it."""
    shown = {option: CliRunner().invoke(main, ["show", "s", *storage(layout), *option]).stdout for option in OPTIONS}
    found = load_study(layout, "s")
    return {
        "show": "the base model alone 2.5" in shown[()],
        "JSON": json.loads(shown[("--json",)])["baseline"],
        "MLflow": any("To compare with" in line for line in told_of(found)),
        "page": read(found).baseline,
    }


def storage(layout: Layout) -> list[str]:
    return ["--storage-path", str(layout.storage_path)]


def test_a_setting_that_is_new_since_the_comparison_leaves_the_baseline_what_it_was(layout: Layout) -> None:
    study = searched(layout, space())
    keep(asked_of(study), BASELINE, EXAMPLES)
    compared = study.study.user_attrs[COMPARED]
    older = {key: value for key, value in compared["settings"].items() if key != "system_prompt"}
    study.study.set_user_attr(COMPARED, {**compared, "settings": older})
    assert load_study(layout, "s").baseline_of_best() == BASELINE
    assert to_compare(study) is None  # nothing is measured anew for it


def _best_of(study: SearchStudy, first: int) -> int:
    return min(study.records()[:first], key=lambda record: record.value or 0.0).number


def test_with_finalists_the_winner_of_those_is_compared(layout: Layout) -> None:
    study = searched(layout, space("study.finalists=2"))
    assert to_compare(study) is None
    begun = begin(study, {})
    assert begun is not None
    trained = searched(layout, begun[0])
    asked, finals = asked_of(trained), finals_of(study)
    assert finals is not None
    assert finals.winner is not None
    assert asked.adapter == finals.winner.adapter
    keep(asked, BASELINE, EXAMPLES)
    assert load_study(layout, "s").examples() == EXAMPLES
    assert to_compare(trained) is None
    assert told(layout) == {"show": True, "JSON": BASELINE, "MLflow": True, "page": BASELINE}
    # The finalists' own study says nothing beside it, but on the card of what is taken.
    assert trained.baseline() is None
    assert trained.origin(finals.winner)["baseline"] == BASELINE


def test_where_no_trial_is_complete_or_its_adapter_is_gone_nothing_is_asked(layout: Layout) -> None:
    study = open_study(space(), layout, {})
    assert to_compare(study) is None
    simulate(study, curve, keep=True)  # writes no adapters
    assert to_compare(study) is None


class Failing:
    def compare(self, *_: object) -> Untrained:
        raise MachineError("no room")


def test_a_comparison_that_fails_costs_a_note_and_the_next_resume_tries_again(layout: Layout) -> None:
    study, said = searched(layout, space()), list[str]()
    run._beside_base(study, cast(BesideBase, Failing()), said.append)
    assert said == ["Note: the winner is not compared with its base model (no room); --resume tries again"]
    assert to_compare(study) is not None


def test_show_tells_the_baseline_beside_the_best_and_of_an_old_study_nothing(layout: Layout) -> None:
    study = searched(layout, space())

    def shown(*more: str) -> str:
        found = CliRunner().invoke(main, ["show", "s", "--storage-path", str(layout.storage_path), *more])
        assert found.exit_code == 0, found.output
        return found.stdout

    assert "alone" not in shown()
    assert json.loads(shown("--json"))["baseline"] is None
    keep(asked_of(study), BASELINE, EXAMPLES)
    best = study.best()
    assert best is not None
    assert f"Best: trial {best.number}, eval_loss {best.value:.6g}; the base model alone 2.5\n" in shown()
    assert json.loads(shown("--json"))["baseline"] == BASELINE
    study.study.set_user_attr("baseline", {"kind": "base-model", "eval_exact_match": 0.5})
    assert "alone" not in shown()  # it is of another metric
    keep(
        asked_of(study) if to_compare(study) else Asked(study, study, best, best.adapter or Path(), True), {}, EXAMPLES
    )
    assert "alone" not in shown()  # of another metric nothing is guessed
