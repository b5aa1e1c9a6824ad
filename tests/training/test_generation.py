"""How texts are written for an evaluation: how many at once, and that it changes none of them."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny_trials import Tiny, run_fit
from transformers import BartConfig, GPT2Config, LlamaConfig, MambaConfig, PretrainedConfig, T5Config

from bilora_ray.config import Task, TrialConfig
from bilora_ray.training.compute import generation
from bilora_ray.training.compute.generation import MOST_ROWS, rows_at_once
from bilora_ray.training.distributed.workers import ALONE, Workers
from bilora_ray.training.evaluate import load_adapted, predict
from bilora_ray.training.folder import TrialFolder

GIB = 2**30
# Llama 3.1 8B: a token's keys and values are 2 x 32 layers x 8 heads x 128 x 2 bytes.
LLAMA = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


class Shape:
    """As much of a model as says how many texts it writes at once."""

    device = torch.device("cpu")

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        self.config, self.dtype = config, dtype


def config(**settings: Any) -> TrialConfig:
    return TrialConfig(model_name_or_path="m", train_data="d", task="causal-lm", predict_with_generate=True, **settings)


def rows(
    shape: PretrainedConfig, monkeypatch: pytest.MonkeyPatch, room: int, count: int = 10_000, **settings: Any
) -> int:
    """How many texts of 256 tokens are written at once, of prompts of 256 tokens at the most."""
    monkeypatch.setattr(generation, "_room", lambda model: room)
    return rows_at_once(Shape(shape), [256] * count, 256, config(**settings), ALONE)


def test_what_is_asked_for_is_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(LLAMA, monkeypatch, 60 * GIB, per_device_generation_batch_size=7) == 7
    assert rows(LLAMA, monkeypatch, 60 * GIB, per_device_generation_batch_size=1) == 1
    # What writes in another way beside a longer prompt has one row in all passes.
    assert rows(LLAMA, monkeypatch, 60 * GIB, per_device_eval_batch_size=1) == 1
    assert rows(LLAMA, monkeypatch, 60 * GIB, per_device_eval_batch_size=1, per_device_generation_batch_size=3) == 3


def test_there_are_as_many_texts_as_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # 512 tokens x 128 KiB are 64 MiB; the prompt's pass needs 256 x 116 KiB beside them.
    assert rows(LLAMA, monkeypatch, 60 * GIB) == MOST_ROWS
    assert rows(LLAMA, monkeypatch, 14 * GIB) == 128
    assert rows(LLAMA, monkeypatch, 13 * GIB) == rows(LLAMA, monkeypatch, 15 * GIB) == 128
    assert rows(LLAMA, monkeypatch, 0) == rows(LLAMA, monkeypatch, GIB) == 32
    # Never fewer than the rows of an evaluation, never more than there are.
    assert rows(LLAMA, monkeypatch, GIB, per_device_eval_batch_size=300) == 300
    assert rows(LLAMA, monkeypatch, 60 * GIB, count=100) == 100


@pytest.mark.parametrize("shape", [T5Config(), BartConfig(), GPT2Config()], ids=lambda shape: shape.model_type)
def test_other_families_name_their_shape_too(shape: PretrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(shape, monkeypatch, 60 * GIB) == MOST_ROWS
    assert rows(shape, monkeypatch, 0) == 32


def test_a_family_without_keys_and_values_has_the_rows_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(MambaConfig(), monkeypatch, 60 * GIB, per_device_eval_batch_size=20) == 20


def test_each_worker_has_the_same_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_room", lambda model: 60 * GIB)
    workers = Workers(planned=4)
    monkeypatch.setattr(Workers, "gather", lambda self, value: [value, 14 * GIB])
    assert rows_at_once(Shape(LLAMA), [256] * 10_000, 256, config(), workers) == 128
    assert rows_at_once(Shape(LLAMA), [256] * 402, 256, config(), workers) == 101


def written(trial: TrialConfig, adapter: Path, **settings: Any) -> list[str]:
    """What an adapter writes after each validation row."""
    asked = trial.model_copy(update=settings)
    model, data, _ = load_adapted(adapter, asked)
    return [row.prediction for row in predict(model, data, asked, len(data.validation))]


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_no_text_depends_on_how_many_are_written_at_once(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    trial = tiny.config(task, predict_with_generate=True, max_new_tokens=8, max_steps=4, learning_rate=1e-2)
    run_fit(trial, tmp_path)
    adapter = cast(Path, TrialFolder(tmp_path).best_adapter())
    alone = written(trial, adapter, per_device_generation_batch_size=1)
    assert len(set(alone)) > 1
    for rows in (3, 7, None):
        assert written(trial, adapter, per_device_generation_batch_size=rows) == alone
