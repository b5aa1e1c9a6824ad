"""A base model that would learn or score something wrong in silence is refused in one line, at a dry run too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from tiny_trials import Tiny, evaluate_adapter, run_fit, write_rows
from transformers import AutoConfig, AutoTokenizer

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.recipe import RECIPE, evaluation_config
from bilora_ray.release.export import export_merged
from bilora_ray.training.evaluate import load_adapted
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import fit
from bilora_ray.training.model import load_base, load_tokenizer
from bilora_ray.training.probe.passes import check_passes, reading
from bilora_ray.training.rehearsal import rehearse

CLASSES: Task = "sequence-classification"


def line_of(config: TrialConfig, folder: Path) -> str:
    """What a trial of `config` is refused with, which a dry run must say in the same words."""
    with pytest.raises(UserError) as now:
        rehearse(config)
    with pytest.raises(UserError) as later:
        fit(config, TrialFolder(folder), lambda _: True)
    assert str(now.value) == str(later.value)
    return str(now.value)


def settings(tiny: Tiny, task: Task, base: Path, **changes: Any) -> TrialConfig:
    return tiny.config(task, model_name_or_path=str(base), max_length=48, max_steps=2, eval_steps=2, **changes)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlnet"])
def test_an_encoder_is_no_causal_lm(family: str, tiny: Tiny, tmp_path: Path) -> None:
    shape = {} if family == "xlnet" else {"is_decoder": False}
    base = build("causal-lm", family, tiny, tmp_path / "base", **shape)
    assert line_of(settings(tiny, "causal-lm", base), tmp_path / "trial") == (
        f"model_name_or_path: '{base}' sees the tokens that it is to predict, as an encoder does; causal-lm needs a "
        "decoder (a BERT is one with is_decoder: true in its config.json)"
    )


@pytest.mark.parametrize("family", ["fnet", "convbert", "xlnet"])
def test_a_model_that_reads_padding_gets_one_row_a_batch(family: str, tiny: Tiny, tmp_path: Path) -> None:
    base = build("sequence-classification", family, tiny, tmp_path / "base")
    config = settings(tiny, "sequence-classification", base)
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    assert line_of(config, tmp_path / "trial") == (
        f"per_device_train_batch_size: '{base}' reads a row in another way beside a longer one; needs "
        f"{' and '.join(sizes)} of 1"
    )
    assert line_of(config.model_copy(update={"per_device_train_batch_size": 1}), tmp_path / "trial").startswith(
        "per_device_eval_batch_size: "
    )
    together = config.model_copy(update={**sizes, "tokens_per_pass": 40})
    assert line_of(together, tmp_path / "trial").endswith("_eval_batch_size of 1, and no tokens_per_pass")
    rehearse(config.model_copy(update=sizes))


def heads_of(config: TrialConfig, count: int) -> Iterator[Callable[[], None]]:
    """A look at the base model of `config` with one of `count` heads that started at random."""
    tokenizer = load_tokenizer(config)
    model, _ = load_base(config, tokenizer, ("bad", "good") if config.task == CLASSES else None)
    for seed in range(count):
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.get_submodule("classifier").get_parameter("weight"), std=0.02)
        yield lambda: check_passes(model, config, tokenizer)


@pytest.mark.parametrize("task", [CLASSES, "regression"])
def test_what_bf16_rounds_is_no_other_way_to_read(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    base = build(CLASSES, "bert", tiny, tmp_path / "base", hidden_size=64, num_hidden_layers=12)
    for look in heads_of(settings(tiny, task, base, precision="bf16"), 60):
        look()


@pytest.mark.parametrize("task", [CLASSES, "regression"])
def test_no_head_hides_that_padding_is_read(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    base = build(CLASSES, "fnet", tiny, tmp_path / "base")
    for look in heads_of(settings(tiny, task, base), 40):
        with pytest.raises(UserError, match="reads a row in another way beside a longer one"):
            look()


def test_a_dry_run_finds_in_fp32_what_bf16_would_hide(tiny: Tiny, tmp_path: Path) -> None:
    base = build(CLASSES, "convbert", tiny, tmp_path / "base")
    with pytest.raises(UserError, match="reads a row in another way beside a longer one"):
        rehearse(settings(tiny, "regression", base, precision="bf16"))


def with_settings(adapter: Path, **changes: Any) -> Path:
    """`adapter`, as if it was trained with other settings."""
    recipe = json.loads((adapter / RECIPE).read_text())
    (adapter / RECIPE).write_text(json.dumps({**recipe, "settings": recipe["settings"] | changes}))
    return adapter


def test_an_old_adapter_of_a_model_that_reads_padding_is_measured_and_merged(tiny: Tiny, tmp_path: Path) -> None:
    base = build(CLASSES, "fnet", tiny, tmp_path / "base")
    one = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    run_fit(settings(tiny, CLASSES, base, target_modules=("dense",), **one), tmp_path / "trial")
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    assert adapter is not None
    with_settings(adapter, per_device_train_batch_size=8, per_device_eval_batch_size=32)
    with pytest.raises(UserError) as error:
        load_adapted(adapter, evaluation_config(adapter, {}))
    assert str(error.value) == (
        f"per_device_eval_batch_size: '{base}' reads a row in another way beside a longer one; needs "
        "per_device_eval_batch_size of 1"
    )
    load_adapted(adapter, evaluation_config(adapter, {"per_device_eval_batch_size": 1}))
    assert export_merged(adapter, tmp_path / "merged", {}) == []


def test_an_evaluation_does_not_ask_what_a_model_could_learn(tiny: Tiny, tmp_path: Path) -> None:
    base = build("causal-lm", "bert", tiny, tmp_path / "base", is_decoder=False)
    load_adapted(None, settings(tiny, "causal-lm", base))


def test_what_a_device_says_at_a_row_is_not_the_models_fault(tiny: Tiny) -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    with pytest.raises(RuntimeError) as caught, reading(tiny.config("causal-lm")):
        raise error
    assert caught.value is error


def test_a_model_that_does_not_leave_padding_out_writes_alone(tiny: Tiny, tmp_path: Path) -> None:
    base = build("causal-lm", "rwkv", tiny, tmp_path / "base")
    config = settings(tiny, "causal-lm", base, predict_with_generate=True, max_new_tokens=4)
    assert line_of(config, tmp_path / "trial") == (
        f"per_device_generation_batch_size: '{base}' goes on in another way beside a longer prompt; "
        "predict_with_generate needs per_device_generation_batch_size of 1"
    )
    one = ({"per_device_generation_batch_size": 1}, {"per_device_eval_batch_size": 1})
    for allowed in (*one, {"predict_with_generate": False}):
        rehearse(config.model_copy(update=allowed))


def test_what_a_models_own_code_raises_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    base = build("sequence-classification", "nystromformer", tiny, tmp_path / "base")
    line = line_of(settings(tiny, "sequence-classification", base), tmp_path / "trial")
    assert line.startswith(f"model_name_or_path: '{base}' cannot read a row (shape '[-1, 4, 4, 16, 8]' is invalid")


def with_tokens(base: Path, *tokens: str, **special: str) -> int:
    """Add `tokens` to the tokenizer of `base`, whose embeddings stay as they are; how many those are."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = len(tokenizer)
    tokenizer.add_tokens(list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(base)
    return before


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm", "sequence-classification"])
@pytest.mark.parametrize("where", ["rows", "padding", "nowhere"])
def test_a_token_needs_an_embedding(where: str, task: Task, tiny: Tiny, tmp_path: Path) -> None:
    family = {"causal-lm": "llama", "seq2seq-lm": "bart", "sequence-classification": "bert"}[task]
    base = build(task, family, tiny, tmp_path / "base")
    known = with_tokens(base, "<x>", **({"pad_token": "<padding>"} if where == "padding" else {}))
    row = {"prompt": "red", "completion": "green", "text": "red", "label": "bad"}
    used = {key: f"{text} <x>" if where == "rows" and key != "label" else text for key, text in row.items()}
    data = str(write_rows(tmp_path / "rows.jsonl", [row, used, {**row, "label": "good"}]))
    config = settings(tiny, task, base, train_data=data, validation_data=data)
    if where == "nowhere":
        rehearse(config)
        run_fit(config, tmp_path / "trial")
        return
    token = {"rows": (known, "<x>"), "padding": (known + 1, "<padding>")}[where]
    assert line_of(config, tmp_path / "trial") == (
        f"model_name_or_path: the tokenizer of {base} makes token {token[0]} ('{token[1]}'), and the model has "
        f"embeddings of {known}; save it with model.resize_token_embeddings(len(tokenizer)) in a folder, and name that"
    )


def test_a_number_is_no_token(tiny: Tiny, tmp_path: Path) -> None:
    base = build(CLASSES, "bert", tiny, tmp_path / "base")
    with_tokens(base, "<x>")
    data = str(write_rows(tmp_path / "rows.jsonl", [{"text": "red", "label": label} for label in (5e4, 1.5, 2)]))
    rehearse(settings(tiny, "regression", base, train_data=data, validation_data=data))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
def test_a_classifier_reads_a_row_at_its_own_last_token(family: str, tiny: Tiny, tmp_path: Path) -> None:
    task: Task = "sequence-classification"
    base = build(task, family, tiny, tmp_path / "base", pad_token_id=7)
    assert AutoConfig.from_pretrained(base).pad_token_id == 7 != AutoTokenizer.from_pretrained(base).pad_token_id
    run_fit(settings(tiny, task, base), tmp_path / "trial")
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    found = [
        evaluate_adapter(adapter, settings(tiny, task, base, per_device_eval_batch_size=size)) for size in (1, 7, 30)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)
