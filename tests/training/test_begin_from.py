"""A trial that goes on from another's checkpoint: as that one would have, or with the settings that may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_trials import METHODS, Tiny, reproducible, run_fit

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.settings import AMID, FACTS, applies
from bilora_ray.training.folder import CHANGED, TENSORS, TrialFolder
from bilora_ray.training.loop import Run, fit

# Of each setting that may change amid a training, a value that is not the trial's.
OTHERS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "auxiliary_learning_rate": 3e-3,
    "rho": 0.4,
    "weight_decay": 0.3,
    "max_grad_norm": 0.5,
    "lora_dropout": 0.5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.5,
    "clip": "none",
    "ascent": "half-step",
    "looksam_every": 2,
    "looksam_alpha": 0.3,
    "esam_beta": 0.7,
    "esam_gamma": 0.7,
    "bar_alpha": 0.5,
    "rwp_space": "lora",
}


def parent(tiny: Tiny, method: str) -> TrialConfig:
    settings = {"lora_dropout": 0.3, "weight_decay": 0.1, "warmup_ratio": 0.3, "max_steps": 6, "eval_steps": 2}
    return tiny.config("causal-lm", method=method, per_device_train_batch_size=4, **settings)


def until_step_2(config: TrialConfig, path: Path) -> Path:
    """The checkpoint of a trial that was ended there."""
    fit(config, TrialFolder(path), lambda metrics: False)
    return TrialFolder(path).checkpoint_at(2)


def child(checkpoint: Path, path: Path, changed: dict[str, Any]) -> TrialFolder:
    folder = TrialFolder(path)
    folder.begin_from(checkpoint, changed)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_with_the_same_settings_it_is_its_parent_s_own_training(method: str, tiny: Tiny, tmp_path: Path) -> None:
    config = parent(tiny, method)
    whole, expected = run_fit(config, tmp_path / "whole")
    folder = child(until_step_2(config, tmp_path / "parent"), tmp_path / "child", {})
    torch.rand(3)  # the process that goes on is in another state
    told, progress = run_fit(config, folder.path)
    assert [report["step"] for report in told] == [4, 6]
    assert reproducible(told) == reproducible(whole[1:])
    assert (progress.step, progress.num_input_tokens_seen) == (6, expected.num_input_tokens_seen)
    ours, theirs = (load_file(one.checkpoint_at(6) / TENSORS) for one in (folder, TrialFolder(tmp_path / "whole")))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_it_counts_no_evaluation_of_its_parent_and_begins_with_its_seconds(tiny: Tiny, tmp_path: Path) -> None:
    config = parent(tiny, "lora")
    checkpoint = until_step_2(config, tmp_path / "parent")
    before = TrialFolder(tmp_path / "parent").state()
    folder = child(checkpoint, tmp_path / "child", {"learning_rate": 2e-3})
    state = folder.state()
    assert (state["history"], state["best_step"], state["step"]) == ([], None, 2)
    assert state["train_runtime"] == before["train_runtime"] > 0
    # What is read is not what is written: the parent's own checkpoint, its links or not, stays as it was.
    assert TrialFolder(tmp_path / "parent").state() == before
    TrialFolder(tmp_path / "parent").discard_tensors()
    assert (folder.checkpoint_at(2) / TENSORS).is_file()


def test_every_setting_that_may_change_does(tiny: Tiny, tmp_path: Path) -> None:
    assert OTHERS.keys() == AMID
    methods = {key: "bilora" if applies(key, "bilora") else FACTS[key].of[0] for key in OTHERS}
    parents = {method: parent(tiny, method) for method in set(methods.values())}
    checkpoints = {method: until_step_2(config, tmp_path / method) for method, config in parents.items()}
    for key, value in OTHERS.items():
        config, checkpoint = parents[methods[key]], checkpoints[methods[key]]
        changed = config.model_copy(update={key: value})
        run = Run(changed, child(checkpoint, tmp_path / key, {key: value}))
        run.resume()
        fresh = Run(changed, TrialFolder(tmp_path / f"{key}-fresh"))
        for _ in range(2):  # as many as the checkpoint's; without steps the optimizer has nothing to say
            fresh.schedule.step()
        for group, own in zip(run.optimizer.param_groups, fresh.optimizer.param_groups, strict=True):
            named = {"lr", "initial_lr", *AMID} & own.keys()
            assert {name: group[name] for name in named} == {name: own[name] for name in named}
        assert run.schedule.get_last_lr() == fresh.schedule.get_last_lr()
        run.train_step()
        fresh.schedule.step()
        assert run.schedule.get_last_lr() == fresh.schedule.get_last_lr()


def test_it_trains_with_what_changed_and_can_be_interrupted(tiny: Tiny, tmp_path: Path) -> None:
    config = parent(tiny, "bilora")
    checkpoint = until_step_2(config, tmp_path / "parent")
    changed = {"learning_rate": 2e-3, "rho": 0.2}
    other = config.model_copy(update=changed)
    told, _ = run_fit(other, child(checkpoint, tmp_path / "whole", changed).path)
    same, _ = run_fit(config, child(checkpoint, tmp_path / "same", {}).path)
    assert told[-1]["eval_loss"] != same[-1]["eval_loss"]
    assert told[0]["learning_rate"] == pytest.approx(same[0]["learning_rate"] / 5)
    folder = child(checkpoint, tmp_path / "interrupted", changed)
    fit(other, folder, lambda metrics: False)
    assert CHANGED not in folder.state()
    again, progress = run_fit(other, folder.path)
    assert reproducible(again) == reproducible(told)
    assert progress.resumed_at == [2, 4]


def test_what_may_not_change_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    config = parent(tiny, "lora")
    checkpoint = until_step_2(config, tmp_path / "parent")
    assert not FACTS["rank"].amid
    other = config.model_copy(update={"rank": 4})
    with pytest.raises(UserError, match=r"^rank: may not change amid a training; allowed: "):
        Run(other, child(checkpoint, tmp_path / "rank", {"rank": 4})).resume()
    other = config.model_copy(update={"learning_rate": 2e-3, "weight_decay": 0.3})
    with pytest.raises(UserError, match="holds a trial with other settings"):
        Run(other, child(checkpoint, tmp_path / "untold", {"learning_rate": 2e-3})).resume()
