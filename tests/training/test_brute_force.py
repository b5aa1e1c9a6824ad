"""What an evaluation measures of texts, against a loop over the rows: one at a time, without padding, in float64."""

from __future__ import annotations

import copy
import math
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_trials import Tiny

from bilora_ray.config import TrialConfig
from bilora_ray.measures import Task
from bilora_ray.training.distributed.workers import Workers
from bilora_ray.training.evaluate import evaluate, load_adapted
from bilora_ray.training.tasks.base import Example

TEXT_TASKS: tuple[Task, ...] = ("causal-lm", "seq2seq-lm")
NEW_TOKENS = 6


@dataclass(frozen=True)
class Together(Workers):
    """One of some workers in threads: what each gathers is in `values`, by rank."""

    values: Any = None
    barrier: Any = None

    def gather(self, value: Any) -> list[Any]:
        """Each worker's `value`, by rank."""
        self.barrier.wait(60)
        self.values[self.rank] = value
        self.barrier.wait(60)
        return list(self.values)


@dataclass(frozen=True)
class Measured:
    """A base model, its examples, and what a loop finds of them."""

    model: Any
    tokenizer: Any
    config: TrialConfig
    examples: Sequence[Example]
    metrics: dict[str, float]

    def evaluated(self, size: int, model: Any = None, workers: Workers | None = None) -> dict[str, float]:
        """What an evaluation finds in batches of so many."""
        config = self.config.model_copy(update={"per_device_eval_batch_size": size})
        return evaluate(model or self.model, self.examples, config, self.tokenizer, workers or Workers())


def measured(config: TrialConfig) -> Measured:
    """Of a base model, with references and, where that changes nothing else, tokens that it writes every second of."""
    model, data, _ = load_adapted(None, config)
    exact = copy.deepcopy(model).double().eval()
    causal = config.task == "causal-lm"
    examples, losses, hits = [], [], []
    for number, example in enumerate(data.validation):
        with torch.no_grad():
            example = half_right(exact, example) if causal else example
            losses_of_row, hits_of_row = by_token(exact, example, causal)
            text = written(exact, example, data.tokenizer, causal)
        losses += losses_of_row
        hits += hits_of_row
        examples.append(replace(example, reference=text if number % 2 else f"{text} or not"))
    loss = sum(losses) / len(losses)
    found = {
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss),
        "eval_token_accuracy": sum(hits) / len(hits),
        "eval_exact_match": (len(examples) // 2) / len(examples),
    }
    return Measured(model, data.tokenizer, config, examples, found)


def half_right(model: Any, example: Example) -> Example:
    """`example` with the likeliest token in every second place that is learned."""
    likeliest = model(input_ids=torch.tensor([example.input_ids.tolist()])).logits[0].argmax(-1).tolist()
    labels = list(example.labels)
    for place in [place for place, label in enumerate(labels) if label != -100][::2]:
        labels[place] = likeliest[place - 1]
    return replace(example, labels=array("i", labels))


def by_token(model: Any, example: Example, causal: bool) -> tuple[list[float], list[bool]]:
    """The loss at each token that is learned, and whether it is the likeliest."""
    ids, labels = torch.tensor([example.input_ids.tolist()]), torch.tensor([example.labels.tolist()])
    logits = (model(input_ids=ids) if causal else model(input_ids=ids, labels=labels)).logits[0]
    pairs = zip(logits[:-1], labels[0, 1:], strict=True) if causal else zip(logits, labels[0], strict=True)
    learned = [(row.log_softmax(-1), int(label)) for row, label in pairs if label != -100]
    return [-float(row[label]) for row, label in learned], [int(row.argmax()) == label for row, label in learned]


def written(model: Any, example: Example, tokenizer: Any, causal: bool) -> str:
    """What the model writes token by token, each the likeliest."""
    prompt = torch.tensor([list(example.prompt_ids or ())])
    tokens = prompt if causal else torch.tensor([[model.config.decoder_start_token_id]])
    start = tokens.shape[1]
    for _ in range(NEW_TOKENS):
        logits = (model(input_ids=tokens) if causal else model(input_ids=prompt, decoder_input_ids=tokens)).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        if int(tokens[0, -1]) == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(tokens[0, start:], skip_special_tokens=True))


@pytest.fixture(scope="module", params=TEXT_TASKS)
def base(request: pytest.FixtureRequest, tiny: Tiny) -> Measured:
    """Of each task's tiny base model."""
    return measured(tiny.config(request.param, predict_with_generate=True, max_new_tokens=NEW_TOKENS, max_length=40))


@pytest.mark.parametrize("size", [1, 3, 30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_metrics_of_batches_are_those_of_single_rows(size: int, side: str, base: Measured) -> None:
    base.tokenizer.padding_side = side  # of which nothing here may depend
    metrics = base.evaluated(size)
    assert metrics == pytest.approx(base.metrics, rel=1e-5)
    assert metrics["eval_exact_match"] == base.metrics["eval_exact_match"]
    assert 0 < metrics["eval_token_accuracy"] < 1


@pytest.mark.parametrize(("count", "size"), [(2, 3), (2, 30), (3, 4)])
def test_workers_share_the_batches_and_find_the_same(count: int, size: int, base: Measured) -> None:
    values, barrier = [None] * count, threading.Barrier(count)
    found: dict[int, dict[str, float]] = {}

    def work(rank: int) -> None:
        workers = Together(planned=count, rank=rank, world_size=count, values=values, barrier=barrier)
        found[rank] = base.evaluated(size, copy.deepcopy(base.model), workers)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    alone = base.evaluated(size)
    assert [found[rank] for rank in range(count)] == [alone] * count


COMMON = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
OLD = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
# Positions that are learned, rotary, of a slope, or none; keys that are shared; a state in their place.
CAUSAL: dict[str, dict[str, Any]] = {
    "BloomForCausalLM": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "FalconForCausalLM": {**COMMON, "alibi": True},
    "Gemma2ForCausalLM": {**COMMON, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    "GPT2LMHeadModel": OLD,
    "GPTJForCausalLM": {**OLD, "rotary_dim": 4},
    "GPTNeoXForCausalLM": COMMON,
    "LlamaForCausalLM": COMMON,
    "MambaForCausalLM": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "MistralForCausalLM": {**COMMON, "num_key_value_heads": 1, "sliding_window": 4},
    "OPTForCausalLM": {**COMMON, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "PhiForCausalLM": COMMON,
    "Qwen2ForCausalLM": {**COMMON, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_familys_metrics_are_the_same_at_every_batch_size(name: str, tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.model("causal-lm"))
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=len(tokenizer), initializer_range=0.5, **ids, **CAUSAL[name]))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"predict_with_generate": True, "max_new_tokens": NEW_TOKENS, "max_length": 40, "max_eval_samples": 7}
    found = measured(tiny.config("causal-lm", model_name_or_path=str(tmp_path), **settings))
    for size in (1, 3, 30):
        assert found.evaluated(size) == pytest.approx(found.metrics, rel=1e-4), size
