"""Whole trials on a GPU: what is fast, or goes on after a mishap, comes to the numbers of what is plain."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_trials import METHODS, long_rows, quickstart, random_llama
from tiny_trials import evaluate_adapter, reproducible, run_fit

from bilora_ray.config import TrialConfig
from bilora_ray.training.compute.compiled import why_not
from bilora_ray.training.compute.varlen import VARLEN, missing
from bilora_ray.training.evaluate import evaluate, load_adapted
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run, fit
from bilora_ray.training.probe.profile import profile

pytestmark = pytest.mark.gpu


def losses(config: TrialConfig, path: Path) -> list[float]:
    """The losses of training and of evaluation that a trial reports."""
    return [report[key] for report in run_fit(config, path)[0] for key in ("train_loss", "eval_loss")]


@pytest.mark.parametrize("model", ["quickstart", "random"])
@pytest.mark.parametrize("method", METHODS)
def test_bf16_learns_as_fp32_does(method: str, model: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": method}
    if model == "random":
        settings["model_name_or_path"] = random_llama(tmp_path / "model", hidden_size=256, layers=2)
    fp32 = losses(quickstart(precision="fp32", **settings), tmp_path / "fp32")
    bf16 = losses(quickstart(precision="bf16", **settings), tmp_path / "bf16")
    assert fp32[-1] < 0.9 * fp32[1]
    assert bf16 == pytest.approx(fp32, rel=0.05)


@pytest.mark.usefixtures("cuda")
def test_auto_is_bf16_where_the_gpu_has_it(tmp_path: Path) -> None:
    run = Run(quickstart(precision="auto"), TrialFolder(tmp_path))
    frozen = {parameter.dtype for parameter in run.model.parameters() if not parameter.requires_grad}
    trained = {parameter.dtype for parameter in run.model.parameters() if parameter.requires_grad}
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    assert (frozen, trained) == ({expected}, {torch.float32})


@pytest.mark.usefixtures("in_one_order")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_trial_that_was_stopped_goes_on_to_the_bit(method: str, precision: str, tmp_path: Path) -> None:
    config = quickstart(method=method, precision=precision, lora_dropout=0.1)
    uninterrupted, _ = run_fit(config, tmp_path / "whole")
    stopped = fit(config, TrialFolder(tmp_path / "parts"), lambda metrics: metrics["step"] < 4)
    assert stopped.step == 4
    resumed, progress = run_fit(config, tmp_path / "parts")
    assert progress.resumed_at == [4]
    assert reproducible(resumed) == reproducible(uninterrupted)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_loss(method: str, tmp_path: Path) -> None:
    plain = losses(quickstart(method=method, lora_dropout=0.1), tmp_path / "plain")
    recomputed = quickstart(method=method, lora_dropout=0.1, gradient_checkpointing=True)
    assert losses(recomputed, tmp_path / "recomputed") == pytest.approx(plain, rel=1e-4)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("method", METHODS)
def test_padding_free_rows_have_the_losses_of_padded_ones(method: str, tmp_path: Path) -> None:
    if lacks := missing(VARLEN, torch.bfloat16):
        pytest.skip(f"{VARLEN} needs {lacks}")
    padded = losses(quickstart(method=method, precision="bf16"), tmp_path / "padded")
    config = quickstart(method=method, precision="bf16", attn_implementation="varlen")
    assert losses(config, tmp_path / "free") == pytest.approx(padded, rel=0.05)
    assert profile(config, steps=1).padding == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_4_bit_base_learns(method: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = quickstart(method=method, precision="bf16", quantization="nf4")
    found = losses(config, tmp_path)
    assert found[-1] < 0.8 * found[1]


@pytest.mark.usefixtures("cuda", "exact")
@pytest.mark.parametrize("method", METHODS)
def test_a_pass_that_does_not_fit_is_made_smaller(method: str, tmp_path: Path) -> None:
    rows = long_rows(tmp_path / "rows.jsonl", count=72)
    asked = quickstart(
        method=method,
        model_name_or_path=random_llama(tmp_path / "model", hidden_size=256, layers=4),
        train_data=rows,
        validation_data=None,
        max_length=512,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=4,
        max_steps=3,
        eval_steps=3,
    )
    smaller = asked.model_copy(update={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4})
    expected, fits = _measured(smaller, tmp_path / "smaller")
    _, wanted = _measured(asked, tmp_path / "asked")
    assert fits < 0.7 * wanted
    limit = (fits + wanted) / 2 / torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        found = losses(asked, tmp_path / "limited")
        assert torch.cuda.max_memory_reserved() < wanted
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found == pytest.approx(expected, rel=1e-4)


def _measured(config: TrialConfig, path: Path) -> tuple[list[float], int]:
    """The losses of a trial, and the most bytes that the allocator had for it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return losses(config, path), torch.cuda.max_memory_reserved()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_no_number_but_a_loss(method: str, tmp_path: Path) -> None:
    run = Run(quickstart(method=method, precision="bf16"), TrialFolder(tmp_path))
    for _ in range(3):
        run.train_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                run.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if "synchronizing" in str(warning.message)]
    places = [f"{Path(warning.filename).name}, line {warning.lineno}" for warning in found]
    assert len(places) <= 3, places


@pytest.mark.usefixtures("exact")
def test_what_is_written_is_what_a_cpu_writes(tmp_path: Path) -> None:
    judged = {"predict_with_generate": True, "max_new_tokens": 16, "answer_pattern": r"#### (-?\d+)"}
    config = quickstart(max_steps=24, eval_steps=24, **judged)
    run_fit(config, tmp_path)
    adapter = TrialFolder(tmp_path).best_adapter()
    on_gpu = evaluate_adapter(adapter, config)
    model, data, _ = load_adapted(adapter, config)
    on_cpu = evaluate(model.to("cpu"), data.validation, config, data.tokenizer)
    assert on_gpu["eval_exact_match"] == on_cpu["eval_exact_match"] > 0
    assert on_gpu["eval_loss"] == pytest.approx(on_cpu["eval_loss"], rel=1e-3)


def test_a_profile_tells_of_the_device(device: str, tmp_path: Path) -> None:
    found = profile(quickstart(precision="auto"), steps=2)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.memory["peak"] > found.memory["base_weights"] > 0
    assert found.memory["kept_for_backward"] > 0
    assert 0 < found.utilisation < 1
    # A T4 has no bf16, and 8 TFLOP/s in fp32.
    assert found.device_rate > (1e12 if device == "cuda" else 0)


# The last one: a slow host compiles for more than a minute.
@pytest.mark.usefixtures("cuda")
def test_compiled_blocks_learn_as_eager_ones(tmp_path: Path) -> None:
    if reason := why_not("cuda"):
        pytest.skip(f"this machine cannot compile: {reason}")
    eager = losses(quickstart(precision="auto"), tmp_path / "eager")
    compiled, _ = run_fit(quickstart(precision="auto", torch_compile=True), tmp_path / "compiled")
    assert [report["compiled"] for report in compiled] == [1.0] * 3
    found = [report[key] for report in compiled for key in ("train_loss", "eval_loss")]
    assert found == pytest.approx(eager, rel=0.05)
