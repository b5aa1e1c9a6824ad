"""Where the time and the memory of some steps go, and what is suggested."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import Tiny
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from bilora_ray.config import TrialConfig
from bilora_ray.errors import OutOfMemory
from bilora_ray.measures import Task
from bilora_ray.training.data.batches import train_batch
from bilora_ray.training.distributed.parallel import Network
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loading import load_data
from bilora_ray.training.loop import Run
from bilora_ray.training.probe import profile as profiling
from bilora_ray.training.probe import roofline
from bilora_ray.training.probe.advice import GIB, Seen, doubled, rarer, suggestions
from bilora_ray.training.probe.profile import WARM_UP, Profile, profile
from bilora_ray.training.tasks import TASKS

STEPS = 2


def looked_at(config: TrialConfig) -> Profile:
    found = profile(config, STEPS)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert min(found.shares.values()) >= 0
    for part in ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint"):
        assert found.shares[part] > 0, part
    assert found.step_seconds * found.trial_steps <= found.trial_seconds
    assert all(size > 0 for size in found.memory.values())
    kinds = ("base_weights", "adapters", "gradients", "optimizer_state", "kept_for_backward")
    assert found.memory["peak"] >= sum(found.memory[kind] for kind in kinds[:2])
    assert found.operations > 0
    assert found.utilisation == pytest.approx(found.operations / found.step_seconds / found.device_rate)
    return found


@pytest.mark.parametrize("method", ["lora", "bilora"])
def test_what_is_counted_is_what_the_steps_read(method: str, tiny: Tiny) -> None:
    config = tiny.config(
        "causal-lm", method=method, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=8
    )
    found = looked_at(config)
    data = load_data(config)
    rows = [row for step in range(STEPS) for row in train_batch(len(data.train), 4, config.seed, 0, WARM_UP + step)]
    tokens = sum(data.train[row].length for row in rows)
    assert found.tokens_per_second * found.step_seconds * STEPS == pytest.approx(tokens)
    assert (found.padding, found.passes, found.step_rows) == (0, 4, 4)
    assert (found.trial_steps, found.evaluations, found.notes) == (8, 4, ())
    assert found.shares["generation"] == 0


def test_of_a_method_whose_steps_differ_whole_cycles_are_looked_at(tiny: Tiny) -> None:
    one = {"per_device_train_batch_size": 4, "max_steps": 8}
    plain = looked_at(tiny.config("causal-lm", method="lora", **one))
    for every in (1, 4):
        found = looked_at(tiny.config("causal-lm", method="looksam", looksam_every=every, **one))
        assert (found.steps, found.passes) == (max(STEPS, every), 1 + 1 / every)
        # Its rows are not all of one length.
        assert found.operations == pytest.approx((1 + 1 / every) * plain.operations, rel=0.2)


def test_workers_share_a_step_and_an_evaluation(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: float(next(ticks)))
    config = tiny.config("causal-lm", per_device_train_batch_size=2, num_train_epochs=4, max_steps=None, eval_steps=4)
    rows = len(load_data(config).train)
    alone, two = profile(config, STEPS), profile(config, STEPS, workers=2, sharded=True)
    assert (alone.step_rows, two.step_rows, two.workers) == (2, 4, 2)
    assert alone.trial_steps == 4 * math.ceil(rows / 2)
    assert two.trial_steps == 4 * math.ceil(rows / 4)
    assert two.evaluations == math.ceil(two.trial_steps / 4)
    assert two.passes == alone.passes
    of_one = {p.workers: p.shares["evaluation"] * p.trial_seconds / p.evaluations for p in (alone, two)}
    assert of_one[2] == pytest.approx(of_one[1] / 2)
    assert ["worker" in note or "all of the model" in note for note in two.notes] == [True, True]


def test_padding_is_told(tiny: Tiny) -> None:
    found = looked_at(tiny.config("causal-lm", per_device_train_batch_size=8))
    assert 0.02 < found.padding < 0.9
    assert found.tokens_per_second == pytest.approx(found.positions_per_second * (1 - found.padding))


def test_memory_is_that_of_the_tensors(tiny: Tiny) -> None:
    small, large = (looked_at(tiny.config("causal-lm", method="lora", rank=rank)) for rank in (2, 8))
    assert large.memory["base_weights"] == small.memory["base_weights"]
    assert large.memory["adapters"] == 4 * small.memory["adapters"]
    assert large.memory["gradients"] == large.memory["adapters"]
    # Two moments, and AdamW's counts.
    assert large.memory["optimizer_state"] == pytest.approx(2 * large.memory["adapters"], rel=0.05)
    recomputed = looked_at(tiny.config("causal-lm", method="lora", rank=8, gradient_checkpointing=True))
    assert recomputed.memory["kept_for_backward"] < large.memory["kept_for_backward"]
    assert recomputed.operations == pytest.approx(large.operations, rel=0.1)


@pytest.mark.parametrize("task", ["seq2seq-lm", "sequence-classification", "image-classification"])
def test_every_kind_of_task_has_a_profile(task: Task, tiny: Tiny) -> None:
    judged: dict[str, Any] = {"predict_with_generate": True, "max_new_tokens": 4} if task == "seq2seq-lm" else {}
    before = TASKS[task], torch.Tensor.backward
    found = looked_at(tiny.config(task, **judged))
    assert (found.shares["generation"] > 0) is bool(judged)
    assert ["upper bound" in note for note in found.notes] == [True] * bool(judged)
    assert (TASKS[task], torch.Tensor.backward) == before


# Images are all alike, of one position each here: of texts, short ones may be together in fewer passes.
CUT_BY_ROWS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
CUT_BY_POSITIONS = {"per_device_train_batch_size": 8, "tokens_per_pass": 2}


@pytest.mark.parametrize(
    ("cut", "others"),
    [
        (CUT_BY_ROWS, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        (CUT_BY_POSITIONS, {"tokens_per_pass": 4}),
    ],
)
def test_what_is_suggested_is_what_is_measured(
    cut: dict[str, Any], others: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny.config("image-classification", **cut)
    assert doubled(config) == others
    watch = profiling.Watch()
    with profiling.watching(watch, config.task):
        run = Run(config, TrialFolder(tmp_path))
        passes = []
        for settings in (config, TrialConfig(**config.model_dump() | others), config):
            assert settings.step_rows(1) == 8
            profiling.cut_by(run, settings)
            watch.forget()
            watch.step(run)
            passes.append(watch.passes)
    assert passes == [4, 2, 4]


def passes_doubled(config: TrialConfig, path: Path) -> float | None:
    """A trial's steps with larger passes, of which nothing stays, as a share of those that it has."""
    watch = profiling.Watch()
    with profiling.watching(watch, config.task):
        run = Run(config, TrialFolder(path / "trial"))
        watch.step(run)
        passes = watch.passes
        found = profiling._with_doubled_passes(run, watch, {"kept_for_backward": 0, "free": GIB}, 1.0)
        watch.forget()
        watch.step(run)
        assert (watch.passes, run.room.proven.training) == (passes, None)
    return found


def test_passes_that_had_no_room_were_not_doubled(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("image-classification", **CUT_BY_ROWS)
    found = passes_doubled(config, tmp_path / "room")
    assert found is not None
    assert found > 0
    call = Network.__call__

    def guarded(network: Network, **batch: torch.Tensor) -> Any:
        if len(batch["pixel_values"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return call(network, **batch)

    monkeypatch.setattr(Network, "__call__", guarded)
    assert passes_doubled(config, tmp_path / "none") is None


def test_larger_passes_are_timed_on_the_same_rows(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, next_rows = [], Run._next_rows

    def listed(run: Run) -> list[Any]:
        rows = next_rows(run)
        read.append([id(row) for row in rows])
        return rows

    monkeypatch.setattr(Run, "_next_rows", listed)
    assert passes_doubled(tiny.config("causal-lm", max_steps=40, **CUT_BY_ROWS), tmp_path) is not None
    both = read[1:-1]
    assert both[: len(both) // 2] == both[len(both) // 2 :]


def test_passes_that_are_one_already_are_not_larger(tiny: Tiny, tmp_path: Path) -> None:
    assert passes_doubled(tiny.config("image-classification", tokens_per_pass=100), tmp_path) is None


def test_passes_that_no_setting_doubles_are_not_measured(tiny: Tiny, tmp_path: Path) -> None:
    odd = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert passes_doubled(tiny.config("image-classification", **odd), tmp_path) is None


def test_memory_that_runs_out_is_told_as_of_a_trial(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(_: Run) -> None:
        torch.empty(2**55)

    monkeypatch.setattr(Run, "train_step", too_large)
    with pytest.raises(OutOfMemory, match=r"^out of memory after step 0: .* were free; .* would help$"):
        profile(tiny.config("causal-lm"), STEPS)


# Suggestions

CONFIG = TrialConfig(
    model_name_or_path="m", task="causal-lm", train_data="d.jsonl", precision="fp32", gradient_checkpointing=True
)


def seen(config: TrialConfig = CONFIG, **others: Any) -> Seen:
    parts = {"data": 1.0, "forward": 30.0, "backward": 50.0, "optimizer": 4.0, "other": 1.0}
    facts: dict[str, Any] = {
        "config": config,
        "sharded": False,
        "device": "cuda",
        "seconds": {**parts, "evaluation": 8.0, "generation": 4.0, "checkpoint": 2.0},
        "passes": 1.0,
        "padding": 0.0,
        "operations": 40.0,
        "rate": 1.0,
        "rate_of_bf16": None,
        "memory": {"free": 10 * GIB},
        "with_doubled_passes": None,
        "kept_if_not_recomputed": None,
        "could_flatten": False,
        "could_compile": False,
        "rows_to_evaluate": 100,
        "evaluations": 10,
        "evaluations_if_rarer": 5,
    }
    return Seen(**facts | others)


def suggested(found: Seen) -> dict[str, tuple[Any, float]]:
    return {one.setting: (one.value, pytest.approx(one.speedup)) for one in suggestions(found)}


def test_bf16_speeds_up_products_and_halves_the_bytes_of_the_rest() -> None:
    # Of 80 seconds 40 are products, which take 10, and 40 are not, which take 20.
    assert suggested(seen(rate_of_bf16=4.0))["precision"] == ("bf16", 100 / 50)
    assert "precision" not in suggested(seen())


@pytest.mark.parametrize(
    ("precision", "of_machine", "device", "is_told"),
    [
        ("fp32", "bf16", "cuda", True),
        ("bf16", "bf16", "cuda", False),
        ("bf16", "fp32", "cuda", False),
        ("fp32", "fp32", "cuda", False),
        ("fp32", "bf16", "cpu", False),
    ],
)
def test_bf16_is_for_gpus_that_have_it_and_trials_that_are_not_in_it(
    precision: str, of_machine: str, device: str, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "of_machine", lambda: of_machine)
    monkeypatch.setattr(profiling, "matmul_rate", lambda *_: 1.0)
    config = CONFIG.model_copy(update={"precision": precision})
    assert (profiling._rate_of_bf16(config, torch.device(device)) == 1.0) is is_told


@pytest.mark.parametrize(("settings", "could"), [({}, True), ({"attention_dropout": 0.1}, False)])
def test_no_padding_is_for_models_that_can_do_without(
    settings: dict[str, Any], could: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tiny.config("causal-lm"), TrialFolder(tmp_path))
    assert not profiling._could_flatten(run)
    monkeypatch.setattr(profiling, "missing", lambda *_: None)
    run.base.model.config.update(settings)
    assert profiling._could_flatten(run) is could


def test_checkpointing_is_worth_a_forward_pass_where_memory_is_free() -> None:
    assert suggested(seen(kept_if_not_recomputed=7 * GIB))["gradient_checkpointing"] == (False, 100 / 70)
    assert "gradient_checkpointing" not in suggested(seen(kept_if_not_recomputed=9 * GIB))


def test_larger_passes_are_suggested_as_they_were_measured() -> None:
    config = CONFIG.model_copy(update={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8})
    found = seen(config, passes=8.0, with_doubled_passes=66.0)
    assert suggested(found)["per_device_train_batch_size"] == (8, 100 / 80)
    assert "gradient_accumulation_steps: 4" in suggestions(found)[0].reason
    budget = seen(CONFIG.model_copy(update={"tokens_per_pass": 512}), passes=8.0, with_doubled_passes=66.0)
    assert suggested(budget)["tokens_per_pass"] == (1024, 100 / 80)
    assert "per_device_train_batch_size" not in suggested(seen(config, passes=8.0, with_doubled_passes=91.0))


def test_padding_is_to_be_saved_where_a_kernel_needs_none() -> None:
    assert suggested(seen(padding=0.25, could_flatten=True))["attn_implementation"] == ("varlen", 100 / 80)
    assert "attn_implementation" not in suggested(seen(padding=0.25))


def test_compiling_takes_its_time_once() -> None:
    parts = {"data": 0.0, "forward": 400.0, "backward": 750.0, "optimizer": 40.0, "other": 10.0}
    seconds = {**parts, "evaluation": 0.0, "generation": 0.0, "checkpoint": 0.0}
    assert suggested(seen(seconds=seconds, could_compile=True)) == {"torch_compile": (True, 1200 / 1120)}
    assert "120 s" in suggestions(seen(seconds=seconds, could_compile=True))[0].reason
    half = {part: second / 2 for part, second in seconds.items()}
    assert suggestions(seen(seconds=half, could_compile=True)) == ()
    assert suggestions(seen(seconds=seconds, could_compile=True, sharded=True)) == ()
    assert suggestions(seen(seconds=seconds)) == ()


@pytest.mark.parametrize(("every", "rarely"), [(0.1, 0.2), (0.25, 0.5), (0.49, 0.98), (0.5, None), (4.0, 8), (1.0, 2)])
def test_evaluations_are_half_as_often(every: float, rarely: float | None) -> None:
    found = rarer(CONFIG.model_copy(update={"eval_steps": every}))
    assert repr(found) == repr(rarely)


def test_rarer_evaluations_are_suggested_where_they_are_fewer() -> None:
    # Of the 14 seconds of 3 evaluations, 2 save a third.
    fewer = seen(evaluations=3, evaluations_if_rarer=2)
    assert suggested(fewer)["eval_steps"] == (0.2, 100 / (100 - 14 / 3))
    assert "fewer checkpoints" in suggestions(fewer)[0].reason
    for after in (3, 1, None):
        assert suggestions(seen(evaluations=3, evaluations_if_rarer=after)) == ()


def test_no_more_than_three_are_told_and_the_best_first() -> None:
    found = suggestions(seen(rate_of_bf16=4.0, kept_if_not_recomputed=GIB))
    speedups = [one.speedup for one in found]
    assert len(found) == 3
    assert speedups == sorted(speedups, reverse=True)
    assert min(speedups) >= 1.02


def test_operations_are_those_of_torchs_count_and_of_products_in_place() -> None:
    left, right, sum_ = torch.ones(3, 4), torch.ones(4, 5), torch.zeros(3, 5)
    assert roofline.operations(lambda: sum_.addmm_(left, right)) == roofline.operations(lambda: left @ right) == 120
    shape = (2, 8, 16, 64)
    assert roofline._attention(shape, shape, shape) == sdpa_flop_count(shape, shape, shape)
    assert roofline._attention_back(shape, shape, shape, shape) == sdpa_backward_flop_count(shape, shape, shape, shape)
    fewer = (2, 2, 16, 64)
    assert roofline._attention(shape, fewer, fewer) == roofline._attention(shape, shape, shape)
