"""How texts are written for an evaluation: how many at once, how much is known, and that neither changes one."""

from array import array
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from families import DECODERS, build
from tiny_trials import Tiny, run_fit
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    T5Config,
)

from bilora_ray.config import TrialConfig
from bilora_ray.measures import Task
from bilora_ray.training.compute import generation
from bilora_ray.training.compute.generation import MOST_ROWS, Read, begun, ends, rows_at_once
from bilora_ray.training.distributed.workers import ALONE, Workers
from bilora_ray.training.evaluate import _losses, load_adapted, predict
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loading import load_data
from bilora_ray.training.loop import Run
from bilora_ray.training.tasks import TASKS, text
from bilora_ray.training.tasks.base import padded

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


def test_no_text_gets_past_where_the_longest_prompts_ends() -> None:
    """Rows of which other lengths are known share a batch; a model with learned positions has none behind them."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=49, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(shape).eval()
    greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=[49])
    prompts = [array("i", range(1, 1 + length)) for length in (24, 4)]

    def wrote(*beginnings: list[int]) -> list[list[int]]:
        def collate(rows: Any) -> dict[str, torch.Tensor]:
            return padded(rows, 0, left=True)

        return generation.write(model, prompts, beginnings, greedy, collate, config(), ALONE, continues=True)

    whole = wrote([], [])
    assert wrote(whole[0][:6], whole[1][:1]) == whole
    assert wrote(whole[0][:1], whole[1][:6]) == whole


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


WAYS: dict[str, dict[str, Any]] = {
    "prompts": {},
    # Of a prompt that is cut for what is written, a pass reads more: it tells nothing.
    "cut prompts": {"max_length": 20, "max_new_tokens": 12},
    "chats": {"kind": "chats", "answer_pattern": None, "max_steps": 30},
    "an encoder": {"task": "seq2seq-lm", "max_steps": 60, "learning_rate": 3e-2},
}


def learned(tiny: Tiny, folder: Path, kind: str = "colours", task: Task = "causal-lm", **settings: Any) -> Run:
    """A trial that has come so far that some of its texts are right, and not all."""
    data = {f"{split}_data": str(tiny.folder / f"{kind}-{split}.jsonl") for split in ("train", "validation")}
    asked = {"predict_with_generate": True, "max_new_tokens": 12, "answer_pattern": r"#\s*(\w+)", "eval_steps": 100}
    length = {"max_steps": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    run = Run(tiny.config(task, **{**data, **asked, **length, "max_eval_samples": 12, **settings}), TrialFolder(folder))
    for _ in range(run.max_steps):
        run.train_step()
    run.model.eval()
    return run


@torch.no_grad()
def ids(run: Run, read: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], int]:
    """What the model of `run` writes after each prompt, to its end; and how many tokens it read and wrote for that."""
    found: list[list[list[int]]] = []
    passes: list[int] = []
    write, generate = text.write, run.model.generate

    def counted(**given: Any) -> torch.Tensor:
        written: torch.Tensor = generate(**given)
        passes.append(written.numel())
        return written

    with monkeypatch.context() as patch:
        patch.setattr(text, "write", lambda *given, **named: found.append(write(*given, **named)) or found[0])
        patch.setattr(run.model, "generate", counted)
        task, config = TASKS[run.config.task], run.config
        task.generated(run.model, run.data.validation, config, run.data.tokenizer, ALONE, read)
    stops = {*ends(run.model, run.data.tokenizer, config), run.data.tokenizer.pad_token_id}
    return [list(takewhile(lambda token: token not in stops, tokens)) for tokens in found[0]], sum(passes)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_pass_over_the_completions_has_read_is_what_is_written(
    way: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = learned(tiny, tmp_path, **WAYS[way])
    with torch.no_grad():
        metrics, read = _losses(run.model, run.data.validation, run.config, run.data.tokenizer, ALONE)
    assert read is not None
    assert 0 < metrics["eval_token_accuracy"] < 1
    (known, few), (whole, many) = ids(run, read, monkeypatch), ids(run, None, monkeypatch)
    assert known == whole
    assert few == many if way == "cut prompts" else few < many


@pytest.mark.parametrize(
    ("target", "read", "written"),
    [
        ([5, 6, 2], [5, 6, 2], [5, 6, 2]),
        ([5, 6, 2], [5, 7, 2], [5, 7]),
        ([5, 6, 2], [2, 6, 2], [2]),
        # An end amid what is learned, and what has no end before there are enough tokens.
        ([5, 2, 6, 2], [5, 2, 6, 2], [5, 2]),
        ([5, 6, 7, 8, 9, 2], [5, 6, 7, 8, 9, 2], [5, 6, 7, 8]),
        ([5], [5], [5]),
    ],
)
def test_a_text_is_known_up_to_where_it_parts_from_its_reference(
    target: list[int], read: list[int], written: list[int]
) -> None:
    assert begun(target, read, GenerationConfig(max_new_tokens=4, eos_token_id=[2])) == written


def test_what_must_be_written_is() -> None:
    forced = GenerationConfig(max_new_tokens=4, eos_token_id=[2], forced_bos_token_id=9)
    assert begun([9, 5, 2], [7, 5, 2], forced) == [9, 5, 2]
    assert begun([8, 5, 2], [8, 5, 2], forced) == [9]
    banned = GenerationConfig(max_new_tokens=4, eos_token_id=[2], bad_words_ids=[[7]])
    assert begun([5, 2], [5, 2], banned) == []


def test_a_model_that_reads_ahead_or_writes_alone_is_taken_at_no_word(tiny: Tiny, tmp_path: Path) -> None:
    shape = BertConfig(
        vocab_size=512,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        is_decoder=True,
        initializer_range=0.3,
    )
    trial, read = tiny.config("causal-lm", predict_with_generate=True, max_new_tokens=4), []
    for decoder, changes in ((True, {}), (False, {}), (True, {"per_device_eval_batch_size": 1})):
        config = trial.model_copy(update=changes)
        shape.is_decoder = decoder
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape).eval()
        data = load_data(config)
        with torch.no_grad():
            read.append(_losses(model, data.validation, config, data.tokenizer, ALONE)[1])
    assert [tokens is not None for tokens in read] == [True, False, False]


# Sliding windows do not keep all positions, some have an attention of their own, and some no keys and values.
KEEPS = ("llama", "gpt2", "opt", "phi", "mixtral", "bert")
KEEPS_NOT = ("gemma2", "bloom", "gptj", "mpt", "mamba")


@pytest.mark.parametrize(
    "family",
    [
        family if family in ("llama", "gpt2", "bloom", "gemma2") else pytest.param(family, marks=pytest.mark.slow)
        for family in sorted({*DECODERS} - {"recurrent_gemma", "roberta", "rwkv", "xlnet"})
    ],
)
@torch.no_grad()
def test_texts_go_on_from_what_a_pass_has_kept(
    family: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt is read once, and neither a loss nor a text is another one for it."""
    base = build("causal-lm", family, tiny, tmp_path)
    asked = {"predict_with_generate": True, "max_new_tokens": 8, "max_length": 48, "per_device_eval_batch_size": 5}
    trial = tiny.config("causal-lm", model_name_or_path=str(base), **asked)
    model, data, _ = load_adapted(None, trial)
    model.eval()
    model.generation_config.use_cache = None  # as most files have it: they do not say

    def read() -> tuple[dict[str, float], list[Read]]:
        metrics, found = _losses(model, data.validation, trial, data.tokenizer, ALONE)
        assert found is not None
        return metrics, found

    def positions(found: list[Read]) -> tuple[list[list[int]], int]:
        counted: list[int] = []
        hook = model.register_forward_pre_hook(
            lambda _, given, named: counted.append(named["input_ids"].numel()), with_kwargs=True
        )
        texts, _ = ids(cast(Run, SimpleNamespace(model=model, config=trial, data=data)), found, monkeypatch)
        hook.remove()
        return texts, sum(counted)

    metrics, found = read()
    (texts, few), (known, many) = positions(found), positions([Read(row.tokens) for row in found])
    assert texts == known
    kept = any(row.states for row in found)
    assert few < many if kept else few == many
    if family in KEEPS + KEEPS_NOT:
        assert kept == (family in KEEPS)
    monkeypatch.setattr(generation, "CPU_BYTES", 0)
    plain, found = read()
    assert plain == metrics
    assert not any(row.states for row in found)


@torch.no_grad()
def test_no_more_is_kept_than_has_room(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"predict_with_generate": True, "max_new_tokens": 8, "per_device_eval_batch_size": 2}
    trial = tiny.config("causal-lm", **asked)
    model, data, _ = load_adapted(None, trial)

    def kept(workers: Workers = ALONE) -> int:
        _, found = _losses(model.eval(), data.validation, trial, data.tokenizer, workers)
        return sum(tensor.nbytes for row in found or () for layer in row.states or () for tensor in layer)

    whole = kept()
    assert whole > 0
    monkeypatch.setattr(generation, "CPU_BYTES", whole // 2)
    assert 0 < kept() <= whole // 2
    assert kept(Workers(planned=2)) == 0
