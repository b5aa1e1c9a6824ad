"""What a study keeps on the disk: the best adapters, within a limit, whoever is killed when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_trials import next_trial

from bilora_ray.cli.main import main
from bilora_ray.config import TrialConfig
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.control import disk
from bilora_ray.search.study.control.finalists import begin, choose
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.looks import one_look
from bilora_ray.search.study.studies import load_study, open_study, steered_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.search.study.view import REMOVED
from bilora_ray.training.folder import TrialFolder

SPACE = (
    *("study.name=s", "study.scheduler=none", "study.sampler=random", "model_name_or_path=org/model"),
    *("task=causal-lm", "train_data=org/data", "rho={low: 0.1, high: 0.9}"),
)
ADAPTER = 10_000


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.chdir(tmp_path)
    return Layout(tmp_path / "runs")


def opened(layout: Layout, trials: int, *study: str) -> SearchStudy:
    return open_study(load_space(None, [*SPACE, f"study.num_trials={trials}", *study]), layout, {})


def run(study: SearchStudy, losses: Sequence[float]) -> None:
    """A trial of one evaluation for each of `losses`, with an adapter as large as all others."""
    for loss in losses:
        number = next_trial(study)
        assert number is not None
        end(study, number, loss)


def end(study: SearchStudy, number: int, loss: float) -> None:
    write(study.folder(number), loss)
    study.report(number, {"step": 1, "max_steps": 1, "eval_loss": loss})


def write(folder: TrialFolder, loss: float) -> None:
    folder.make()
    checkpoint = folder.checkpoint_at(1)
    checkpoint.mkdir()
    history = [{"step": 1, "max_steps": 1, "eval_loss": loss}]
    (checkpoint / "state.json").write_text(json.dumps({"step": 1, "best_step": 1, "history": history}))
    folder.adapter_at(1).mkdir()
    (folder.adapter_at(1) / "adapter_model.safetensors").write_bytes(bytes(ADAPTER))


def kept(study: SearchStudy) -> list[int]:
    """The trials whose adapter is there, as any process sees them."""
    records = load_study(study.layout, "s").records()
    there = [record.number for record in records if study.folder(record.number).adapter_at(1).is_dir()]
    assert [record.number for record in records if record.adapter] == there
    return there


def test_the_best_adapters_are_kept_and_the_others_removed_as_they_fall_behind(layout: Layout) -> None:
    study = opened(layout, 6, "study.keep_adapters=2")
    seen = []
    for loss in (0.5, 0.4, 0.6, 0.3, 0.2, 0.9):
        run(study, [loss])
        seen.append(kept(study))
    assert seen == [[0], [0, 1], [0, 1], [1, 3], [3, 4], [3, 4]]
    assert study.record(0).removed == "keep_adapters"
    assert study.record(0).value == 0.5
    assert len(list(study.layout.trials("s").rglob("*.safetensors"))) == 2
    assert disk.used(study.folder(0).adapters) == 0


def test_without_settings_all_is_kept(layout: Layout) -> None:
    study = opened(layout, 3)
    run(study, [0.1, 0.2, 0.3])
    assert kept(study) == [0, 1, 2]


def test_of_a_study_that_is_too_large_the_worst_go_first_and_the_best_and_finalists_stay(layout: Layout) -> None:
    study = opened(layout, 5)
    run(study, [0.1, 0.4, 0.2, 0.3])
    study.release()
    taken = disk.used_by(study)
    assert taken > 4 * ADAPTER
    # One more fits if one goes.
    study = opened(layout, 5, f"study.max_disk_gb={(taken + ADAPTER / 2) / disk.GB}")
    run(study, [0.25])
    assert kept(study) == [0, 2, 3, 4]
    study.release()
    choose(judged := opened(layout, 5, "study.finalists=2"))
    judged.release()
    opened(layout, 5, "study.finalists=2", f"study.max_disk_gb={ADAPTER / 2 / disk.GB}").release()
    assert kept(study) == [0, 2]


def test_no_run_of_a_finalist_loses_its_adapter_and_none_begins_where_the_disk_is_full(layout: Layout) -> None:
    asked = ("study.finalists=2", "study.keep_adapters=1", f"study.max_disk_gb={ADAPTER * 2 / disk.GB}")
    study = opened(layout, 2, *asked)
    run(study, [0.2, 0.1])
    study.release()
    begun = begin(study, {})
    assert begun is not None
    finals = open_study(begun[0], layout, {})
    run(finals, [0.3, 0.1])
    assert finals.next_trials() == []
    assert "study 's-finalists': takes" in str(finals.full)
    assert [record.removed for record in finals.records()] == [None, None]
    assert all(record.adapter for record in finals.records())
    finals.release()


def test_what_cannot_be_made_smaller_begins_no_trial_until_it_may_be_larger(layout: Layout) -> None:
    small = f"study.max_disk_gb={ADAPTER / 2 / disk.GB}"
    study = opened(layout, 3, small)
    assert [next_trial(study), next_trial(study)] == [0, 1]
    end(study, 0, 0.1)
    assert study.next_trials() == []
    assert "max_disk_gb is 5e-06; what is left is to stay" in str(study.full)
    assert study.in_hand() == [1]  # which runs on, to its end
    end(study, 1, 0.2)
    study.release()
    assert kept(study) == [0]
    assert len(study.records()) == 2
    larger = opened(layout, 3, "study.max_disk_gb=1")
    run(larger, [0.05])
    assert larger.finished()
    assert larger.full is None
    assert kept(larger) == [0, 2]


def test_a_trial_that_runs_keeps_its_adapter(layout: Layout) -> None:
    study = opened(layout, 3, "study.keep_adapters=1", f"study.max_disk_gb={ADAPTER / 2 / disk.GB}")
    assert study.next_trials() == [0]
    assert study.next_trials() == [1]
    for number, loss in ((0, 0.9), (1, 0.1)):
        write(study.folder(number), loss)
    study.report(1, {"step": 1, "max_steps": 2, "eval_loss": 0.1})
    study.report(0, {"step": 1, "max_steps": 1, "eval_loss": 0.9})
    assert kept(study) == [0, 1]
    study.report(1, {"step": 2, "max_steps": 2, "eval_loss": 0.1})
    assert kept(study) == [1]


def test_what_another_process_has_removed_meanwhile_stays_told(layout: Layout) -> None:
    study = opened(layout, 2, "study.keep_adapters=1")
    run(study, [0.2])
    number = next_trial(study)
    assert number is not None
    other = steered_study(layout, "s").study
    with one_look(study.study):
        assert REMOVED not in study.study.user_attrs
        other.set_user_attr(REMOVED, {"max_disk_gb": [7]})
        end(study, number, 0.1)
    assert other.user_attrs[REMOVED] == {"max_disk_gb": [7], "keep_adapters": [0]}


class Killed(BaseException):
    """As by kill -9."""


@pytest.mark.parametrize("where", ["set_user_attr", "rename", "rmtree"])
def test_who_is_killed_leaves_an_adapter_whole_or_gone_and_the_next_ends_it(
    layout: Layout, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = opened(layout, 3, "study.keep_adapters=1")
    run(study, [0.2])

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        if where == "set_user_attr":
            patched.setattr(study.study, "set_user_attr", kill)
        elif where == "rename":
            patched.setattr(Path, "rename", kill)
        else:
            patched.setattr("bilora_ray.training.folder.shutil.rmtree", kill)
        if where == "rmtree":  # it is what frees the scratch folder of the trial, too
            patched.setattr(TrialFolder, "discard_tensors", lambda folder: None)
        with pytest.raises(Killed):
            run(study, [0.1])
    study.release()
    loser = study.folder(0)
    assert loser.adapter_at(1).is_dir() is (where != "rmtree")
    whole = loser.adapter_at(1) / "adapter_model.safetensors"
    assert where == "rmtree" or whole.stat().st_size == ADAPTER
    again = opened(layout, 3, "study.keep_adapters=1")
    assert kept(again) == [1]
    assert disk.used(loser.adapters) == 0
    assert again.record(0).removed == "keep_adapters"


def test_whose_adapter_was_removed_is_told_so(layout: Layout) -> None:
    study = opened(layout, 2, "study.keep_adapters=1")
    run(study, [0.2, 0.1])
    study.release()
    result = CliRunner().invoke(main, ["export", "s", "--trial", "0", "--output", "out"])
    assert result.exit_code == 2
    again = "`bilora-ray train --study s --trial 0 --name NEW` trains it again"
    assert result.stderr == f"Error: study 's': the adapter of trial 0 was removed by study.keep_adapters; {again}\n"
    shown = CliRunner().invoke(main, ["show", "s"]).stdout
    assert "GB, 1 adapter, 1 more were removed\n" in shown
    told = json.loads(CliRunner().invoke(main, ["show", "s", "--json"]).stdout)
    assert told["disk"] == {"bytes": disk.used_by(study), "adapters_removed": 1}
    assert [trial["adapter_removed"] for trial in told["trials"]] == ["keep_adapters", None]


def test_a_stopped_trials_half_done_files_go_once_nobody_writes(layout: Layout) -> None:
    study = opened(layout, 1)
    (number,) = study.next_trials()
    folder = study.folder(number)
    write(folder, 0.3)
    for half in (folder.checkpoints / ".step-00000002.77", folder.adapters / ".step-00000002.77"):
        half.mkdir()
    study.fail(number, "diverged", by_settings=True)
    study.settle()
    assert sorted(path.name for path in folder.path.rglob("step-*")) == ["step-00000001"] * 2
    assert not list(folder.path.rglob(".step-*"))
    study.release()


def test_in_a_search_with_early_stops_as_many_stay_as_are_to(layout: Layout) -> None:
    def curve(config: TrialConfig) -> list[Metrics]:
        return [
            {"step": s, "max_steps": 9, "eval_loss": config.rho / s, "train_runtime": s * 1.0} for s in range(1, 10)
        ]

    study = opened(layout, 9, "study.scheduler=asha", "study.keep_adapters=2")
    simulate(study, curve, workers=3, keep=True)
    found = study.objective.ranked(study.records())
    study.release()
    assert [record.removed for record in found] == [None] * 2 + ["keep_adapters"] * 7
