"""Memory that runs out: the trial goes on from the same step in smaller passes, which are remembered."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tiny_trials import METHODS, Tiny, reproducible, run_fit
from torch import Tensor
from transformers import GenerationMixin

from bilora_ray.config import TrialConfig
from bilora_ray.errors import OutOfMemory
from bilora_ray.measures import Task
from bilora_ray.training import evaluate as evaluation
from bilora_ray.training.compute import gradients, memory
from bilora_ray.training.compute.cutting import Proven
from bilora_ray.training.compute.memory import Room, Shortage, failure, in_parts, is_out_of_memory
from bilora_ray.training.distributed.parallel import Network
from bilora_ray.training.distributed.workers import ALONE, Workers
from bilora_ray.training.folder import TENSORS, TrialFolder
from bilora_ray.training.loop import Run, fit
from bilora_ray.training.model import base

ON_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 512.00 MiB is "
    "free. Process 1 has 78 GiB memory in use."
)


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError(ON_A_GPU)


def too_large() -> None:
    """What torch's allocator for CPUs really refuses."""
    torch.empty(2**55)


def numbers_too_large() -> None:
    numpy.empty(2**55)


@pytest.fixture
def short_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """Lets a training pass with more than so many positions fail from a step on; the positions of those that did."""

    def short(most: int, step: int = 1, fail: Callable[[], None] = on_a_gpu) -> list[int]:
        failed: list[int] = []
        steps: list[int] = []
        call, train_step = Network.__call__, Run.train_step

        def guarded(network: Network, **batch: Tensor) -> Any:
            read = batch["input_ids"].numel()
            if steps[-1] >= step and read > most:
                failed.append(read)
                fail()
            return call(network, **batch)

        def counted(run: Run) -> None:
            steps.append(run.progress.step + 1)
            train_step(run)

        monkeypatch.setattr(Network, "__call__", guarded)
        monkeypatch.setattr(Run, "train_step", counted)
        return failed

    return short


def adapters(folder: Path) -> dict[str, Tensor]:
    newest = TrialFolder(folder).latest()
    assert newest is not None
    return {name: value for name, value in load_file(newest / TENSORS).items() if name.startswith("model.")}


def check_alike(ours: list[dict[str, float]], theirs: list[dict[str, float]], folder: Path, other: Path) -> None:
    for mine, one in zip(reproducible(ours), reproducible(theirs), strict=True):
        assert {key: value for key, value in mine.items() if key in one} == pytest.approx(one, rel=1e-6, abs=1e-6)
    found, wanted = adapters(folder), adapters(other)
    assert all((found[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm() for name in wanted)


@pytest.mark.parametrize("fail", [on_a_gpu, too_large, numbers_too_large])
def test_a_step_that_has_no_room_is_done_again_in_smaller_passes(
    fail: Callable[[], None], tiny: Tiny, tmp_path: Path, short_of: Any
) -> None:
    config = tiny.config("causal-lm", learning_rate=1e-3)
    small, _ = run_fit(config.model_copy(update={"tokens_per_pass": 60}), tmp_path / "small" / "0")
    failed = short_of(90, step=4, fail=fail)
    ours, _ = run_fit(config, tmp_path / "ours" / "0")
    assert failed
    check_alike(ours, small, tmp_path / "ours" / "0", tmp_path / "small" / "0")
    # The first evaluation was before; then the size that had room is told.
    limits = [report.get("training_limit") for report in ours]
    assert limits[0] is None
    assert None not in limits[1:]
    assert max(limits[1:]) <= 90


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_that_of_a_run_that_began_with_the_smaller_pass(
    method: str, tiny: Tiny, tmp_path: Path, short_of: Any
) -> None:
    config = tiny.config("causal-lm", method=method, gradient_accumulation_steps=2)
    failed = short_of(90)
    ours, _ = run_fit(config, tmp_path / "ours" / "0")
    limit = int(ours[-1]["training_limit"])
    begun = len(failed)
    assert begun
    small, _ = run_fit(config.model_copy(update={"tokens_per_pass": limit}), tmp_path / "small" / "0")
    assert len(failed) == begun
    check_alike(ours, small, tmp_path / "ours" / "0", tmp_path / "small" / "0")


def test_what_had_room_is_kept_when_a_trial_goes_on_and_for_the_trials_after_it(
    tiny: Tiny, tmp_path: Path, short_of: Any
) -> None:
    config = tiny.config("causal-lm", lora_dropout=0.2)
    failed = short_of(90, step=3)
    whole, _ = run_fit(config, tmp_path / "whole" / "0")
    count = len(failed)
    assert count
    told = fit(config, TrialFolder(tmp_path / "parts" / "0"), lambda metrics: metrics["step"] != 4).history
    (tmp_path / "parts" / "passes.json").unlink()
    assert len(failed) == 2 * count
    ours, progress = run_fit(config, tmp_path / "parts" / "0")
    assert progress.resumed_at == [4]
    assert len(told) == 2
    assert reproducible(ours) == reproducible(whole)
    assert len(failed) == 2 * count
    # Another trial of like shape begins with it, and one of another shape doesn't.
    run_fit(config.model_copy(update={"learning_rate": 1e-4, "seed": 1}), tmp_path / "whole" / "1")
    assert len(failed) == 2 * count
    run_fit(config.model_copy(update={"rank": 2}), tmp_path / "whole" / "2")
    assert len(failed) > 2 * count
    assert len(json.loads((tmp_path / "whole" / "passes.json").read_text())) == 2


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"a": {"b": 1}}', '{"a": {"training": "x"}}', None])
def test_a_file_that_is_not_as_it_should_be_says_nothing(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "passes.json"
    if content is not None:
        file.write_text(content)
    assert memory._read(file) == {}


def test_no_pass_is_larger_than_asked(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", tokens_per_pass=100)
    run = Run(config, TrialFolder(tmp_path / "0"))
    run.room.learn("training", 10**6)
    before = [len(part) for part, _ in run.gradients._passes(run._next_rows())]
    again = Run(config, TrialFolder(tmp_path / "1"))
    assert again.room.proven == Proven(training=10**6)
    assert [len(part) for part, _ in again.gradients._passes(again._next_rows())] == before


def test_nothing_of_a_pass_that_had_no_room_is_held(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_of: Any
) -> None:
    held: list[weakref.ref[Tensor]] = []

    def fail() -> None:
        held.append(weakref.ref(torch.ones(3)))
        large = torch.ones(3, requires_grad=True) * 2
        held.append(weakref.ref(large))
        on_a_gpu()

    released: list[bool] = []
    monkeypatch.setattr(gradients, "release", lambda: released.append(all(one() is None for one in held)))
    short_of(90, fail=fail)
    Run(tiny.config("causal-lm"), TrialFolder(tmp_path / "trial")).train_step()
    assert released
    assert all(released)


def test_one_row_that_has_no_room_ends_the_trial_with_the_numbers(tiny: Tiny, tmp_path: Path, short_of: Any) -> None:
    short_of(0, step=2)
    with pytest.raises(OutOfMemory) as caught:
        run_fit(tiny.config("causal-lm"), tmp_path / "0")
    assert str(caught.value) == (
        "out of memory in a training pass of one row: 2.50 GiB more were needed, 0.50 GiB of 79.10 GiB were free; "
        "gradient_checkpointing: true, quantization: nf4, precision: bf16 or a smaller max_length would help"
    )
    assert caught.value.by_settings
    # Who keeps the error keeps no model with it.
    frames = [frame.tb_frame.f_locals for frame in traceback_of(caught.value)]
    assert not [value for local in frames for value in local.values() if isinstance(value, Run)]


def test_one_row_that_has_room_after_all_is_no_failure(tiny: Tiny, tmp_path: Path, short_of: Any) -> None:
    shape: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "lora_dropout": 0.2}
    config = tiny.config("causal-lm", max_steps=4, **shape)
    wanted, _ = run_fit(config, tmp_path / "wanted" / "0")
    fails = iter([on_a_gpu])
    short_of(0, step=3, fail=lambda: next(fails, lambda: None)())
    found, _ = run_fit(config, tmp_path / "found" / "0")
    assert next(fails, None) is None
    assert reproducible(found) == reproducible(wanted)

    def double(rows: Sequence[int]) -> list[int]:
        next(again, lambda: None)()
        return [2 * row for row in rows]

    computed = in_parts(Room(config, ALONE), "evaluation", double, len)
    again = iter([on_a_gpu])
    assert computed([3]) == [6]
    again = iter([on_a_gpu] * 2)
    with pytest.raises(OutOfMemory):
        computed([3])


def traceback_of(error: BaseException) -> Iterator[Any]:
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.tb_next


def test_a_model_that_has_no_room_is_told_in_a_line(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "load_base", lambda *_: too_large())
    with pytest.raises(OutOfMemory, match=r"^out of memory while the model was loaded: 134217728.00 GiB more w"):
        run_fit(tiny.config("causal-lm"), tmp_path / "0")


def test_an_update_that_has_no_room_is_told_in_a_line(tiny: Tiny, tmp_path: Path, short_of: Any) -> None:
    config = tiny.config("causal-lm", gradient_checkpointing=True, precision="bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda *_: on_a_gpu())
        with pytest.raises(OutOfMemory) as caught:
            run_fit(config, tmp_path / "0")
    end = "quantization: nf4 or a smaller max_length would help"
    assert str(caught.value).startswith("out of memory after step 0: 2.50 GiB more were needed")
    assert str(caught.value).endswith(end)


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm", "token-classification"])
def test_an_evaluation_goes_on_in_smaller_passes(
    task: Task, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(task, max_steps=2)
    place, most, sizes, failed = evaluation.on_device, 10**6, [0], [0]

    def guarded(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        sizes.append(batch["input_ids"].numel() + (batch["labels"].numel() if task == "seq2seq-lm" else 0))
        if sizes[-1] > most:
            failed.append(1)
            on_a_gpu()
        return place(batch, model)

    monkeypatch.setattr(evaluation, "on_device", guarded)
    wanted, _ = run_fit(config, tmp_path / "wanted" / "0")
    most = max(sizes) // 2
    found, _ = run_fit(config, tmp_path / "found" / "0")
    assert found[0].pop("evaluation_limit") == most
    assert reproducible(found)[0] == pytest.approx(reproducible(wanted)[0], rel=1e-6)
    count = len(failed)
    assert count
    run_fit(config.model_copy(update={"seed": 3}), tmp_path / "found" / "1")
    assert len(failed) == count


def test_texts_are_written_fewer_at_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("causal-lm", max_steps=2, predict_with_generate=True, max_new_tokens=6)
    wanted, _ = run_fit(config, tmp_path / "wanted" / "0")
    write, failed = GenerationMixin.generate, []

    def guarded(model: Any, **inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 4:
            failed.append(len(inputs["input_ids"]))
            on_a_gpu()
        return write(model, **inputs)

    monkeypatch.setattr(GenerationMixin, "generate", guarded)
    found, _ = run_fit(config, tmp_path / "found" / "0")
    assert failed
    assert found[0].pop("generation_limit") <= 4
    assert reproducible(found) == reproducible(wanted)


@pytest.mark.parametrize(
    ("changes", "workers", "part"),
    [
        ({"max_new_tokens": 9}, ALONE, 1.0),
        ({"lora_dropout": 0.1}, ALONE, 1.0),
        ({"primary": "dora"}, ALONE, 1.0),  # which keeps the weight that it has composed
        ({"torch_compile": True}, ALONE, 1.0),
        ({}, Workers(sharded=True), 1.0),
        ({}, ALONE, 0.5),
    ],
)
def test_what_had_room_is_told_to_trials_with_as_much_room_only(
    changes: dict[str, Any], workers: Workers, part: float, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, file = tiny.config("causal-lm"), tmp_path / "passes.json"
    fraction = 1.0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(name="a GPU", total_memory=2**35)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: fraction)
    Room(config, ALONE, file).learn("training", 60)
    assert Room(config.model_copy(update={"seed": 1}), ALONE, file).proven.training == 60
    fraction = part
    assert Room(config.model_copy(update=changes), workers, file).proven.training is None


def test_what_says_that_there_was_no_memory() -> None:
    for fail in (on_a_gpu, too_large, numbers_too_large):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            fail()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_numbers_are_those_of_the_error_or_of_the_system() -> None:
    found = Shortage.of(torch.OutOfMemoryError(ON_A_GPU))
    assert (found.needed, found.free) == (5 * 2**29, 2**29)
    with pytest.raises(RuntimeError) as caught:
        too_large()
    found = Shortage.of(caught.value)
    assert found.needed == 2**57
    assert found.free is not None
    assert found.total is not None
    assert 0 < found.free < found.total
    assert "an unknown amount of" in str(Shortage(None, None, 2**30))


def test_what_helps_is_what_is_not_done_yet(tiny: Tiny) -> None:
    images = tiny.config("image-classification", precision="bf16")
    line = str(failure(memory.ONE_ROW["evaluation"], Shortage(None, 0, 2**30), images))
    assert line.endswith("one row: 0.00 GiB of 1.00 GiB were free; quantization: nf4 would help")
    done: TrialConfig = images.model_copy(update={"quantization": "nf4"})
    assert "help" not in str(failure(memory.ONE_ROW["evaluation"], Shortage(None, 0, 2**30), done))


def test_what_is_learned_is_told_in_words() -> None:
    learned = Proven(training=512, generation=8)
    assert learned.metrics() == {"training_limit": 512, "generation_limit": 8}
    assert Proven.told_by({"eval_loss": 1.0, **learned.metrics()}) == learned
    assert list(learned.in_words()) == [
        "training passes of at most 512 positions: larger ones ran out of memory",
        "generation of at most 8 texts at once: more ran out of memory",
    ]
    assert list(Proven(evaluation=70).in_words()) == [
        "evaluation passes of at most 70 positions: larger ones ran out of memory"
    ]
    assert Proven.least([learned, Proven(), Proven(training=100, evaluation=9)]) == Proven(100, 9, 8)
    assert Proven.least([]) == Proven()
