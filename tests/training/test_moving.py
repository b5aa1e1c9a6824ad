"""What a trial does between its evaluations is told, step by step, and noted for whoever watches."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_trials import Tiny

from bilora_ray.records import Moving
from bilora_ray.runners import task
from bilora_ray.training.folder import TrialFolder


def test_from_the_data_to_the_last_evaluation_each_step_is_told(tiny: Tiny, tmp_path: Path) -> None:
    from bilora_ray.training.loop import fit

    told: list[Moving] = []
    fit(tiny.config("causal-lm", max_steps=5, eval_steps=2), TrialFolder(tmp_path), lambda _: True, tell=told.append)
    assert [moving.what for moving in told[:2]] == ["reading the data", "loading the base model"]
    assert [(moving.what[:4], moving.step, moving.next_evaluation) for moving in told[2:]] == [
        ("trai", 1, 2),
        ("trai", 2, 4),
        ("eval", 2, 4),
        ("trai", 3, 4),
        ("trai", 4, 5),
        ("eval", 4, 5),
        ("trai", 5, 5),
        ("eval", 5, 5),
    ]
    assert {moving.max_steps for moving in told[2:]} == {5}
    assert all(moving.seconds_left is not None and moving.seconds_left >= 0 for moving in told[2:])


def test_a_trial_notes_its_steps_now_and_then_and_whoever_watches_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = TrialFolder(tmp_path)
    assert folder.moving() is None
    tell = task.moving(folder)
    tell(Moving("loading the base model"))
    tell(Moving("training", 1, 90, 30, 0.5))
    tell(Moving("training", 2, 90, 30, 0.5))  # too soon after the first
    assert folder.moving() == Moving("training", 1, 90, 30, 0.5)
    monkeypatch.setattr(task, "TELL_S", 0.0)
    tell(Moving("training", 3, 90, 30, 0.5))
    assert folder.moving() == Moving("training", 3, 90, 30, 0.5)
    (tmp_path / "moving.json").write_text('{"what": "trai')
    assert folder.moving() is None  # read while it was written
    folder.discard_tensors()
    assert list(tmp_path.iterdir()) == []
    tmp_path.rmdir()
    tell(Moving("training", 4, 90, 30, 0.5))  # the storage is away: that is another's to say
    assert not tmp_path.exists()
