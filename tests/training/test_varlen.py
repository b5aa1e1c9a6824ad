"""Rows one after another are learned and measured as padded ones are, by an attention that keeps them apart."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, build
from tiny_trials import METHODS, Tiny, reproducible, run_fit
from torch import Tensor
from transformers import AutoModelForCausalLM

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.compute import varlen
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run
from bilora_ray.training.rehearsal import rehearse
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Example
from tests.models.test_targets import REFUSED, made
from tests.models.test_targets import made_up as rows_of
from tests.training.test_workers import check_alike, fit_together, settings_of, together

# One hands its layers nothing of where rows end, and one's positions begin behind the padding's id.
ALWAYS_PADDED = {"nemotron", "roberta"}
SIDES = ("input_ids", "labels")


def by_mask(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """As `varlen.kernel` by its definition, with a mask of all positions by all."""
    lengths = ends.diff()
    assert int(lengths.max()) == longest
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(len(row))
    seen = (row[:, None] == row) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "kernel", by_mask)
    monkeypatch.setattr(varlen, "missing", lambda *_: None)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral", "mixtral"])
def test_the_loss_and_its_gradient_are_those_of_padded_rows(family: str, tiny: Tiny, tmp_path: Path) -> None:
    base = build("causal-lm", family, tiny, tmp_path / "base")
    chosen = {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"), "max_length": 48}
    losses, gradients = [], []
    for name in ("sdpa", "varlen"):
        config = tiny.config("causal-lm", model_name_or_path=str(base), attn_implementation=name, **chosen)
        run = Run(config, TrialFolder(tmp_path / name))
        assert varlen.flattens(run.network) is (name == "varlen")
        with torch.no_grad():
            for parameter in run.optimizer.param_groups[0]["params"]:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
        run.model.train()
        losses.append(run.gradients.of(run._next_rows()))
        weights = run.model.named_parameters()
        gradients.append({key: weight.grad.clone() for key, weight in weights if weight.grad is not None})
        rows = [len(batch["input_ids"]) for batch in (run.gradients.batch(run._next_rows()),)]
        assert rows == ([1] if name == "varlen" else [config.per_device_train_batch_size])
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    padded, flat = gradients
    assert padded.keys() == flat.keys()
    for key, gradient in padded.items():
        assert (flat[key] - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(DECODERS) - set(REFUSED)))
def test_each_family_reads_rows_one_after_another_as_padded_ones_or_does_not(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = made(tiny, "causal-lm", family, tmp_path)
    padded = rows_of("causal-lm", model)
    lengths = padded["attention_mask"].sum(1).tolist()
    sides = ([part[:length].tolist() for part, length in zip(padded[key], lengths, strict=True)] for key in SIDES)
    rows = [Example(array("i", ids), array("i", labels)) for ids, labels in zip(*sides, strict=True)]
    expected = TASKS["causal-lm"].loss(model, padded).item()
    if not (model._supports_sdpa and model._supports_attention_backend):
        return  # the settings are refused
    varlen.register()
    model.set_attn_implementation("varlen")
    assert varlen.flattens(model) is (family not in ALWAYS_PADDED)
    if family not in ALWAYS_PADDED:
        assert TASKS["causal-lm"].loss(model, varlen.flattened(rows)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_is_that_of_padded_rows_and_goes_on_as_it_was(method: str, tiny: Tiny, tmp_path: Path) -> None:
    shared = {"method": method, "predict_with_generate": True, "max_steps": 6, "max_new_tokens": 8, "seed": 3}
    shared |= {"gradient_checkpointing": method == "bilora", "lora_dropout": 0.2}
    padded, _ = run_fit(
        tiny.config("causal-lm", attn_implementation="sdpa", **{**shared, "lora_dropout": 0.0}), tmp_path / "padded"
    )
    plain, _ = run_fit(
        tiny.config("causal-lm", attn_implementation="varlen", **{**shared, "lora_dropout": 0.0}), tmp_path / "plain"
    )
    for expected, found in zip(reproducible(padded), reproducible(plain), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    config = tiny.config("causal-lm", attn_implementation="varlen", **shared)
    whole, _ = run_fit(config, tmp_path / "whole")
    run = Run(config, TrialFolder(tmp_path / "parts"))
    for _ in range(2):
        run.train_step()
    run.evaluate()
    run.train_step()  # and is killed
    parts, _ = run_fit(config, tmp_path / "parts")
    assert reproducible(parts) == reproducible(whole)


def fit_flat(settings: dict[str, Any], path: str) -> Any:
    """Two workers' reports."""
    varlen.kernel, varlen.missing = by_mask, lambda *_: None  # type: ignore[assignment]
    return fit_together(settings, path, 2, False)


@pytest.mark.slow
def test_two_workers_are_one(tiny: Tiny, tmp_path: Path) -> None:
    shared = {"attn_implementation": "varlen", "max_steps": 4}
    one, _ = run_fit(tiny.config("causal-lm", per_device_train_batch_size=6, **shared), tmp_path / "one")
    two = together(2, fit_flat, settings_of(tiny, "causal-lm", rows=3, **shared), str(tmp_path / "two"))
    check_alike(one, two[0], tmp_path / "one", tmp_path / "two")


def test_rows_are_one_after_another(tiny: Tiny) -> None:
    rows = [
        Example(array("i", ids), array("i", labels)) for ids, labels in (((5, 6, 7), (5, -100, 7)), ((8, 9), (8, 9)))
    ]
    batch = varlen.flattened(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["targets"].tolist() == [7, 9]
    assert batch["target_positions"].tolist() == [1, 3]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert TASKS["causal-lm"].target_count(rows) == 2


def test_with_a_cache_rows_would_see_each_other(tiny: Tiny) -> None:
    """The trap that `use_cache` is: transformers keeps rows apart by their positions, but only without a cache."""
    base = AutoModelForCausalLM.from_pretrained(tiny.model("causal-lm")).eval()
    ids = torch.randint(5, 200, (2, 9))
    told = {"input_ids": ids.flatten()[None], "position_ids": torch.arange(9).repeat(2)[None]}
    expected = base(input_ids=ids).logits.flatten(0, 1)
    with torch.no_grad():
        apart, mixed = (base(**told, use_cache=cached).logits[0] for cached in (False, True))
    assert (apart - expected).norm() <= 1e-5 * expected.norm()
    assert (mixed - expected).norm() > 0.1 * expected.norm()
    assert varlen.inputs_of(varlen.flattened(made_up()))["use_cache"] is False


def newer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`varlen_attn` as torch 2.13 has it."""
    assert (window_size[1], enable_gqa, scale is None) == (0, query.shape[1] != key.shape[1], False)
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    return by_mask(query, key, value, cu_seq_q, max_q, scale or 0.0, window_size[0] + 1 or None)


def older(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    """`varlen_attn` as torch 2.10 has it."""
    assert is_causal
    assert query.shape == key.shape == value.shape
    return by_mask(query, key, value, cu_seq_q, max_q, query.shape[-1] ** -0.5, None)


@pytest.mark.parametrize(("compute", "window"), [(newer, None), (newer, 3), (newer, 50), (older, None), (older, 50)])
def test_torchs_kernel_is_called_as_each_torch_has_it(
    compute: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", compute)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(12, heads, 8, generator=generator) for heads in (4, 2, 2))
    ends = torch.tensor([0, 7, 12], dtype=torch.int32)
    found = varlen.kernel(query, key, value, ends, 7, 0.2, window)
    expected = by_mask(query, key, value, ends, 7, 0.2, window)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 0.01 * expected.norm()


def made_up() -> list[Example]:
    return [Example(array("i", range(5, end)), array("i", range(5, end))) for end in (12, 20)]


def test_a_layer_that_is_not_told_where_rows_end_gets_padded_ones(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = varlen.attend

    def forgetful(*states: Any, **told: Any) -> Any:
        return attend(*states, **{key: value for key, value in told.items() if key not in varlen.ENDS})

    monkeypatch.setattr(varlen, "attend", forgetful)
    varlen.register()
    base = AutoModelForCausalLM.from_pretrained(tiny.model("causal-lm"), attn_implementation="varlen")
    assert varlen.may_flatten(base, "varlen")
    assert not varlen.flattens(base)
    monkeypatch.undo()
    varlen.register()


@pytest.mark.parametrize(
    ("family", "line"),
    [
        ("gpt2", "rows are padded; by varlen, GPT2LMHeadModel cannot read them one after another"),  # has dropout
        ("mamba", "MambaForCausalLM cannot compute its attention by varlen"),
        ("bloom", "BloomForCausalLM cannot compute its attention by varlen"),
        ("gpt_oss", "GptOssForCausalLM cannot compute its attention by varlen"),
    ],
)
def test_other_models_get_padded_rows_or_are_refused(family: str, line: str, tiny: Tiny, tmp_path: Path) -> None:
    base = build("causal-lm", family, tiny, tmp_path)
    chosen: dict[str, Any] = {"target_modules": "all-linear" if family != "mamba" else ("in_proj", "x_proj")}
    config = tiny.config(
        "causal-lm", model_name_or_path=str(base), attn_implementation="varlen", max_length=48, **chosen
    )
    if line.startswith("rows"):
        assert [note for note in rehearse(config).notes if "attn_implementation" in note] == [
            f"attn_implementation: {line}"
        ]
        return
    with pytest.raises(UserError) as error:
        rehearse(config)
    assert str(error.value) == f"attn_implementation: {line}"


@pytest.mark.parametrize(
    ("kernel", "needed"),
    [
        ("flash_attention_2", "the package flash-attn: pip install flash-attn"),
        ("flash_attention_3", "the package kernels: pip install kernels"),
        ("kernels-community/flash-attn2", "the package kernels: pip install kernels"),
        ("varlen", "a GPU, and none can be seen here"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_this_machine_has_not_is_said_in_one_line(
    kernel: str, needed: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    config = tiny.config("causal-lm", attn_implementation=kernel)
    with pytest.raises(UserError) as error:
        rehearse(config)
    assert str(error.value) == f"attn_implementation: {kernel} needs {needed}"
    rehearse(config, here=False)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("flash_attn_2", "did you mean 'flash_attention_2'?"),
        ("varlenn", "did you mean 'varlen'?"),
        ("someone/flash-attn2", "allowed: eager"),
        ("paged|sdpa", "allowed: eager, flash_attention_2, flash_attention_3, kernels-community/NAME, sdpa, varlen"),
    ],
)
def test_a_name_of_no_kernel(given: str, hint: str, tiny: Tiny) -> None:
    settings = tiny.config("causal-lm").model_dump()
    with pytest.raises(ValueError, match="is no attention kernel") as error:
        TrialConfig(**{**settings, "attn_implementation": given})
    assert hint in str(error.value)
    for name in ("eager", "kernels-community/flash-attn3", "kernels-community/vllm-flash-attn3@v1:attn", None):
        assert TrialConfig(**{**settings, "attn_implementation": name}).attn_implementation == name
