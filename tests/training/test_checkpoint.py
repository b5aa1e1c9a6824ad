"""Interruptions leave no trace: a trial that was killed, whenever, ends as one that was not."""

import json
import multiprocessing
import time
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_trials import METHODS, TASKS, Tiny, fit_in_process, reproducible, run_fit
from toy_methods import MEMORIES, remember
from transformers import PreTrainedModel

from bilora_ray import files
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.files import atomic_folder
from bilora_ray.measures import Task
from bilora_ray.training import checkpoint, loop
from bilora_ray.training import model as models
from bilora_ray.training.checkpoint import trainable
from bilora_ray.training.folder import STATE, TENSORS, TrialFolder
from bilora_ray.training.loop import Progress, Run, fit
from bilora_ray.training.result import adapter


class Killed(Exception):
    """Ends a trial where a test wants it to."""


def interrupted(config: TrialConfig, path: Path, evaluation: int) -> None:
    """Train until `report` is called for the `evaluation`-th time."""
    reports = []

    def report(metrics: dict[str, float]) -> bool:
        reports.append(metrics)
        if len(reports) == evaluation:
            raise Killed
        return True

    with pytest.raises(Killed):
        fit(config, TrialFolder(path), report)


def tensors_of(path: Path) -> dict[str, dict[str, Any]]:
    """Every tensor in a trial's folder, by file."""
    return {str(file.relative_to(path)): load_file(file) for file in sorted(path.rglob("*.safetensors"))}


def assert_same_end(path: Path, progress: Progress, reference: Path, expected: Progress) -> None:
    """The history, the best step, the best adapter, and all that the last checkpoint holds are the same."""
    assert reproducible(progress.history) == reproducible(expected.history)
    assert (progress.best_step, progress.best_value) == (expected.best_step, expected.best_value)
    ours, theirs = tensors_of(path), tensors_of(reference)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2
    for file, tensors in theirs.items():
        assert ours[file].keys() == tensors.keys()
        assert [name for name in tensors if not torch.equal(ours[file][name], tensors[name])] == []


def demanding(tiny: Tiny, task: Task, method: str, **settings: Any) -> TrialConfig:
    """A trial with all that a resume has to restore: dropout, accumulation, a schedule, three epochs."""
    defaults: dict[str, Any] = {
        "method": method,
        "lora_dropout": 0.3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "warmup_ratio": 0.3,
        "weight_decay": 0.1,
        "max_steps": 10,
        "eval_steps": 3,
    }
    return tiny.config(task, **defaults | settings)


@pytest.mark.parametrize(("task", "method"), [("causal-lm", "lora"), *((task, "bilora") for task in TASKS)])
def test_a_resumed_trial_ends_as_an_uninterrupted_one(task: Task, method: str, tiny: Tiny, tmp_path: Path) -> None:
    config = demanding(tiny, task, method)
    whole, expected = run_fit(config, tmp_path / "whole")
    assert [report["step"] for report in whole] == [3, 6, 9, 10]
    # Causal models are interrupted after every evaluation, the others after one: their state is the same kind.
    for evaluation in (1, 2, 3, 4) if task == "causal-lm" else (2,):
        path = tmp_path / f"after-{evaluation}"
        interrupted(config, path, evaluation)
        torch.rand(evaluation)  # the process that goes on is in another state
        reports, progress = run_fit(config, path)
        assert reproducible(reports) == reproducible(whole)
        assert progress.resumed_at == [(3, 6, 9, 10)[evaluation - 1]]
        assert_same_end(path, progress, tmp_path / "whole", expected)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("esam", {}),
        ("flat-lora", {}),
        ("rwp", {}),
        ("rwp", {"rwp_space": "lora"}),
        ("looksam", {"looksam_every": 2}),
        ("nbar", {}),
        ("full", {}),
        ("full", {"precision": "bf16"}),
    ],
)
def test_a_resumed_rival_ends_as_an_uninterrupted_one(
    method: str, own: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    config = demanding(tiny, "causal-lm", method, max_steps=7, rho=0.3, **own)
    _, expected = run_fit(config, tmp_path / "whole")
    path = tmp_path / "resumed"
    interrupted(config, path, 1)
    torch.rand(3)
    _, progress = run_fit(config, path)
    assert progress.resumed_at == [3]
    assert_same_end(path, progress, tmp_path / "whole", expected)


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_resumed_method_remembers_what_it_had(
    kind: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "build_optimizer", models.build_optimizer)  # put back after the test
    remember(kind)
    config = demanding(tiny, "causal-lm", "lora", max_steps=6, eval_steps=3)
    _, expected = run_fit(config, tmp_path / "whole")
    path = tmp_path / "resumed"
    interrupted(config, path, 1)
    _, progress = run_fit(config, path)
    assert progress.resumed_at == [3]
    assert_same_end(path, progress, tmp_path / "whole", expected)
    assert TrialFolder(path).state()["optimizer"] == TrialFolder(tmp_path / "whole").state()["optimizer"]


def test_a_checkpoint_without_groups_as_0_1_0_wrote_it_goes_on_exactly(tiny: Tiny, tmp_path: Path) -> None:
    config = demanding(tiny, "causal-lm", "bilora")
    _, expected = run_fit(config, tmp_path / "whole")
    path = tmp_path / "older"
    interrupted(config, path, 2)
    file = TrialFolder(path).checkpoint_at(6) / STATE
    state = json.loads(file.read_text())
    del state["optimizer"]
    file.write_text(json.dumps(state))
    _, progress = run_fit(config, path)
    assert progress.resumed_at == [6]
    assert_same_end(path, progress, tmp_path / "whole", expected)


def test_what_a_checkpoint_cannot_keep_is_refused_at_once(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(tiny.config("causal-lm", max_steps=2), TrialFolder(tmp_path))
    run.train_step()
    run.optimizer.param_groups[1]["memory"] = {"past": object()}
    with pytest.raises(TypeError, match=r"^method\.param_groups\.1\.memory\.past is a object: "):
        run.evaluate()
    run.optimizer.param_groups[1]["memory"] = {3: 0.5}  # JSON would give back another key
    with pytest.raises(TypeError, match=r"^method\.param_groups\.1\.memory is a dict: "):
        run.evaluate()
    del run.optimizer.param_groups[1]["memory"]
    run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "max_grad_norm": None})
    with pytest.raises(ValueError, match="not trainable ones of the model"):
        run.evaluate()
    assert run.folder.latest() is None


def test_a_trial_may_be_interrupted_again_and_again(tiny: Tiny, tmp_path: Path) -> None:
    config = demanding(tiny, "causal-lm", "bilora")
    _, expected = run_fit(config, tmp_path / "whole")
    for evaluation in (1, 2, 3):  # the earlier evaluations are told again, so each attempt adds one
        interrupted(config, tmp_path / "often", evaluation)
    reports, progress = run_fit(config, tmp_path / "often")
    assert progress.resumed_at == [3, 6, 9]
    assert [report["step"] for report in reports] == [3, 6, 9, 10]
    assert_same_end(tmp_path / "often", progress, tmp_path / "whole", expected)


def test_a_finished_trial_only_tells_again(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("causal-lm", max_steps=4)
    first, _ = run_fit(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again, progress = run_fit(config, tmp_path)
    assert again == first
    assert progress.step == 4
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("method", METHODS)
def test_a_kill_between_the_best_adapter_and_its_checkpoint_leaves_no_trace(
    method: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = demanding(tiny, "causal-lm", method)
    _, expected = run_fit(config, tmp_path / "whole")
    for evaluation, written in ((1, None), (2, 3)):
        path = tmp_path / f"during-{evaluation}"
        with monkeypatch.context() as patch:
            patch.setattr(loop, "save_checkpoint", killed_at(evaluation, loop.save_checkpoint))
            with pytest.raises(Killed):
                run_fit(config, path)
        adapters = sorted(entry.name for entry in (path / "adapters").iterdir())
        assert adapters[-1] == f"step-{3 * evaluation:08d}"
        folder = TrialFolder(path)
        assert folder.state().get("step") == written
        assert folder.best_adapter() == (None if written is None else folder.adapter_at(written))
        assert written is None or folder.adapter_at(written).is_dir()
        _, progress = run_fit(config, path)
        assert_same_end(path, progress, tmp_path / "whole", expected)


def killed_at(count: int, save: Any) -> Any:
    """`save`, which raises at call `count` instead."""
    calls = []

    def killed(*args: Any) -> None:
        calls.append(1)
        if len(calls) == count:
            raise Killed
        save(*args)

    return killed


@pytest.mark.slow
def test_sigkill_at_random_moments_leaves_no_trace(tiny: Tiny, tmp_path: Path) -> None:
    config = demanding(tiny, "causal-lm", "bilora", max_steps=30, eval_steps=1)
    _, expected = run_fit(config, tmp_path / "whole")
    path, random = tmp_path / "killed", Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bilora_ray.training.loop", "transformers.models.llama.modeling_llama"])
    kills = 0
    for _ in range(3):
        seen = TrialFolder(path).latest()
        process = context.Process(target=fit_in_process, args=(config.model_dump(), str(path)))
        process.start()
        deadline = time.monotonic() + 60
        while TrialFolder(path).latest() == seen and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.15))
        process.kill()
        process.join()
        kills += process.exitcode == -9
    assert kills > 0
    _, progress = run_fit(config, path)
    assert progress.resumed_at
    assert_same_end(path, progress, tmp_path / "whole", expected)
    assert [entry.name for entry in (path / "checkpoints").iterdir()] == ["step-00000030"]
    assert len(list((path / "adapters").iterdir())) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_holds_what_is_trained_and_nothing_of_the_base(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(task, max_steps=2)
    run_fit(config, tmp_path / "fit")
    run = Run(config, TrialFolder(tmp_path / "other"))
    names = trainable(run.model)
    newest = TrialFolder(tmp_path / "fit").latest()
    assert newest is not None
    tensors = load_file(newest / TENSORS)
    moments = {f"optimizer.{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")}
    random = {"random.0.cpu"} | ({"random.0.cuda"} if torch.cuda.is_available() else set())
    assert tensors.keys() == {f"model.{name}" for name in names} | moments | random
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    size = sum(3 * 4 * parameter.numel() + 4 for parameter in names.values())
    size += sum(tensors[name].numel() for name in random)
    header = 200 * len(tensors)
    assert size < (newest / TENSORS).stat().st_size < size + header


def test_only_safetensors_json_and_markdown_are_written(tiny: Tiny, tmp_path: Path) -> None:
    run_fit(tiny.config("sequence-classification"), tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}


def test_older_checkpoints_are_removed(tiny: Tiny, tmp_path: Path) -> None:
    kept = []

    def report(_: dict[str, float]) -> bool:
        kept.append([path.name for path in (tmp_path / "checkpoints").iterdir()])
        return True

    fit(tiny.config("causal-lm", max_steps=6), TrialFolder(tmp_path), report)
    assert kept == [["step-00000002"], ["step-00000004"], ["step-00000006"]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"method": "lora"}, {"method": "bilora"}),
        ({"rank": 1}, {"rank": 4}),
        ({"learning_rate": 0.01}, {"learning_rate": 0.001}),
    ],
)
def test_a_folder_of_a_trial_with_other_settings_is_refused(
    first: dict[str, Any], second: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    interrupted(tiny.config("causal-lm", **first), tmp_path, 1)
    with pytest.raises(UserError) as error:
        run_fit(tiny.config("causal-lm", **second), tmp_path)
    assert str(error.value) == f"{tmp_path}: holds a trial with other settings; move it away"


def without_stored(setting: str, path: Path) -> None:
    """Let the checkpoint be of a version that did not know `setting`."""
    newest = TrialFolder(path).latest()
    assert newest is not None
    state = json.loads((newest / STATE).read_text())
    del state["settings"][setting]
    (newest / STATE).write_text(json.dumps(state))


@pytest.mark.parametrize("setting", ["auxiliary_rank", "answer_pattern", "column_names", "eval_steps"])
def test_a_setting_that_is_new_since_a_checkpoint_had_its_default_there(
    setting: str, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny.config("causal-lm", max_steps=4, eval_steps=TrialConfig.model_fields["eval_steps"].default)
    assert getattr(config, setting) == TrialConfig.model_fields[setting].default
    interrupted(config, tmp_path, 2)
    without_stored(setting, tmp_path)
    assert run_fit(config, tmp_path)[1].resumed_at == [2]


def test_a_setting_that_is_new_since_a_checkpoint_and_is_not_its_default_is_another(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", auxiliary_rank=3)
    interrupted(config, tmp_path, 1)
    without_stored("auxiliary_rank", tmp_path)
    with pytest.raises(UserError, match="holds a trial with other settings"):
        run_fit(config, tmp_path)


@pytest.mark.parametrize(("module", "call"), [(checkpoint, "save_file"), (files, "_sync")])
def test_a_checkpoint_is_whole_or_absent(
    module: ModuleType, call: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = demanding(tiny, "causal-lm", "bilora")
    _, expected = run_fit(config, tmp_path / "whole")
    path = tmp_path / "torn"
    interrupted(config, path, 1)
    before = tensors_of(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, call, full)
        with pytest.raises(OSError, match="No space left on device"):
            run_fit(config, path)
    assert [entry.name for entry in (path / "checkpoints").iterdir()] == ["step-00000003"]
    after = tensors_of(path)
    assert all(torch.equal(after[file][name], tensor) for file in before for name, tensor in before[file].items())
    _, progress = run_fit(config, path)
    assert_same_end(path, progress, tmp_path / "whole", expected)


@pytest.mark.parametrize(
    ("method", "of", "writes"), [("bilora", adapter, "export_primary"), ("full", PreTrainedModel, "save_pretrained")]
)
def test_a_storage_that_goes_away_amid_an_export_is_not_made_anew(
    method: str, of: Any, writes: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "storage"
    storage.mkdir()
    export = getattr(of, writes)

    def goes_away(*arguments: Any, **named: Any) -> None:
        storage.rename(tmp_path / "away")
        export(*arguments, **named)

    monkeypatch.setattr(of, writes, goes_away)
    with pytest.raises(FileNotFoundError):
        run_fit(demanding(tiny, "causal-lm", method), storage / "trial")
    assert not storage.exists()


def test_what_a_killed_process_left_half_written_is_not_read_and_goes(tiny: Tiny, tmp_path: Path) -> None:
    config = demanding(tiny, "causal-lm", "bilora")
    _, expected = run_fit(config, tmp_path / "whole")
    path = tmp_path / "torn"
    interrupted(config, path, 1)
    for parent, name in (("checkpoints", ".step-00000006.4711"), ("adapters", ".step-00000006.4711")):
        torn = path / parent / name
        torn.mkdir()
        (torn / TENSORS).write_bytes(b"\x00" * 100)
        (torn / STATE).write_text('{"step": 6, "best')
    assert TrialFolder(path).state()["step"] == 3
    _, progress = run_fit(config, path)
    assert_same_end(path, progress, tmp_path / "whole", expected)
    assert not list(path.rglob(".*"))


def test_an_atomic_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made"
    with atomic_folder(path) as unfinished:
        (unfinished / "a").write_text("1")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["a"]
    with pytest.raises(FileNotFoundError), atomic_folder(path) as unfinished:
        (unfinished / "b" / "c").write_text("2")
    assert [file.name for file in tmp_path.rglob("*")] == ["made", "a"]
    with atomic_folder(path) as unfinished:
        (unfinished / "c").write_text("3")
    assert [file.name for file in tmp_path.rglob("*")] == ["made", "c"]


def test_an_atomic_folder_makes_nothing_above_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "away" / "made"):
        raise AssertionError("a folder was made in the place of one that is away")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_without_tensors_keeps_its_state_and_starts_again(tiny: Tiny, tmp_path: Path) -> None:
    config = demanding(tiny, "causal-lm", "bilora")
    _, expected = run_fit(config, tmp_path / "whole")
    path = tmp_path / "discarded"
    interrupted(config, path, 2)
    folder = TrialFolder(path)
    state, best = folder.state(), folder.best_adapter()
    folder.discard_tensors()
    assert not list((path / "checkpoints").rglob("*.safetensors"))
    assert folder.state() == state
    assert reproducible(state["history"]) == reproducible(expected.history[:2])
    assert folder.best_adapter() == best
    assert best is not None
    assert best.is_dir()
    _, progress = run_fit(config, path)
    assert progress.resumed_at == []
    assert_same_end(path, progress, tmp_path / "whole", expected)


def test_the_state_of_a_checkpoint_is_plain_json(tiny: Tiny, tmp_path: Path) -> None:
    reports, progress = run_fit(tiny.config("causal-lm"), tmp_path)
    newest = TrialFolder(tmp_path).latest()
    assert newest is not None
    state = json.loads((newest / STATE).read_text())
    assert state["history"] == reports
    assert (state["step"], state["best_step"]) == (8, progress.best_step)
    assert state["best_value"] == min(report["eval_loss"] for report in reports)


def test_a_trial_that_began_before_there_was_a_setting_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", max_steps=4, eval_steps=2)
    folder = TrialFolder(tmp_path)
    whole, _ = run_fit(config, tmp_path)
    for file in folder.checkpoints.glob(f"*/{STATE}"):
        state = json.loads(file.read_text())
        for setting in ("train_revision", "validation_revision"):
            del state["settings"][setting]
        file.write_text(json.dumps(state))
    again, progress = run_fit(config, tmp_path)
    assert reproducible(again) == reproducible(whole)
    assert progress.resumed_at == [4]
