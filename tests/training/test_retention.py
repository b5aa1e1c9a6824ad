"""What an adapter has made its base model forget: as computed by hand, and refused where it cannot be known."""

from __future__ import annotations

import gc
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import Tiny, run_fit, write_rows

from bilora_ray.config import TEST_SETTINGS, TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.runners.scoring import score
from bilora_ray.training import model as models
from bilora_ray.training.evaluate import evaluate, load_adapted
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.probe.retention import forgetting, forgetting_whole
from bilora_ray.training.rows import read_retained

TEXTS = ("the sky is blue and the grass is green", "a cat", "", "one two three four five six seven eight nine ten")


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS]))


@pytest.fixture
def trained(tiny: Tiny, tmp_path: Path) -> tuple[TrialConfig, Path]:
    config = tiny.config("causal-lm", learning_rate=5e-2, max_steps=12)
    run_fit(config, tmp_path / "trial")
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    assert adapter is not None
    return config, adapter


def by_hand(model: Any, tokenizer: Any, max_length: int) -> float:
    """The mean over all tokens that follow another of minus the log of the probability that they had, text by text."""
    losses = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"][:max_length]
        if text and len(ids) > 1:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            losses += [-logits[place, token].item() for place, token in enumerate(ids[1:])]
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("max_length", [64, 5])
def test_forgetting_is_what_a_loop_over_tokens_says(
    trained: tuple[TrialConfig, Path], texts: str, max_length: int
) -> None:
    config, adapter = trained
    config = config.model_copy(update={"retention_data": texts})
    model, data, _ = load_adapted(adapter, config)
    model.eval()
    config = config.model_copy(update={"max_length": max_length})
    found = forgetting(model, config, data.tokenizer)
    after = by_hand(model, data.tokenizer, max_length)
    with model.disable_adapter():
        before = by_hand(model, data.tokenizer, max_length)
    assert found == pytest.approx({"forgetting": after - before, "retention_loss": after}, rel=1e-5)
    assert abs(after - before) > 1e-3  # it has learned something else
    # The adapter is there again.
    assert evaluate(model, data.validation, config, data.tokenizer) == evaluate(
        load_adapted(adapter, config)[0], data.validation, config, data.tokenizer
    )


def test_what_is_written_and_how_flat_it_is_are_not_asked(trained: tuple[TrialConfig, Path], texts: str) -> None:
    config, adapter = trained
    model, data, _ = load_adapted(adapter, config)
    config = config.model_copy(update={"retention_data": texts})
    more = {"predict_with_generate": True, "metric": "eval_exact_match", "sharpness_radius": 0.1}
    assert forgetting(model, config.model_copy(update=more), data.tokenizer) == forgetting(
        model, config, data.tokenizer
    )


def test_without_texts_or_an_adapter_there_is_nothing(trained: tuple[TrialConfig, Path], texts: str) -> None:
    config, adapter = trained
    model, data, _ = load_adapted(adapter, config)
    assert forgetting(model, config, data.tokenizer) == {}
    base, _, _ = load_adapted(None, config)
    assert forgetting(base, config.model_copy(update={"retention_data": texts}), data.tokenizer) == {}


def test_an_adapter_that_is_scored_tells_it(trained: tuple[TrialConfig, Path], tiny: Tiny, texts: str) -> None:
    config, adapter = trained
    test = {"test_data": str(tiny.folder / "texts-validation.jsonl")}
    plain = score(str(adapter), {**config.model_dump(), **test})
    found = score(str(adapter), {**config.model_dump(), **test, "retention_data": texts})
    assert found.keys() - plain.keys() == {"forgetting", "retention_loss"}
    assert plain.items() <= found.items()
    assert found["retention_loss"] > 0
    assert "retention_data" in TEST_SETTINGS


def test_a_model_that_was_trained_whole_is_compared_with_its_base(tiny: Tiny, tmp_path: Path, texts: str) -> None:
    config = tiny.config("causal-lm", method="full", learning_rate=1e-2, max_steps=12)
    run_fit(config, tmp_path / "trial")
    left = TrialFolder(tmp_path / "trial").best_adapter()
    assert left is not None
    told = {**config.model_dump(), "test_data": config.validation_data, "retention_data": texts}
    found = score(str(left), told)
    own = config.model_copy(update={"model_name_or_path": str(left)})
    after, before = [
        by_hand(model.eval(), data.tokenizer, config.max_length)
        for model, data, _ in (load_adapted(None, named) for named in (own, config))
    ]
    assert found["retention_loss"] == pytest.approx(after, rel=1e-5)
    assert found["forgetting"] == pytest.approx(after - before, rel=1e-5)
    assert abs(after - before) > 1e-3


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The models that are loaded from now on."""
    loaded, load = list[weakref.ref[Any]](), models.load_base

    def noted(*arguments: Any) -> Any:
        model, fresh = load(*arguments)
        loaded.append(weakref.ref(model))
        return model, fresh

    monkeypatch.setattr(models, "load_base", noted)
    monkeypatch.setattr("bilora_ray.training.probe.retention._of_base", {})
    return loaded


def untrained(config: TrialConfig) -> tuple[Any, TrialConfig, Any]:
    """What `forgetting_whole` takes, of a model that has learned nothing."""
    processor = models.load_processor(config)
    return models.load_base(config, processor, None)[0], config, processor


def test_the_base_of_whole_models_is_read_once(tiny: Tiny, texts: str, bases: list[weakref.ref[Any]]) -> None:
    config = tiny.config("causal-lm", method="full", retention_data=texts)
    others = {"seed": 3, "split_seed": 1, "per_device_eval_batch_size": 1, "learning_rate": 0.5}
    for update in ({}, others):
        told = forgetting_whole(*untrained(config.model_copy(update=update)))
        assert told["forgetting"] == pytest.approx(0, abs=1e-6)
    assert len(bases) == 3  # two that were measured, and one base


def test_texts_or_a_base_that_have_changed_are_read_anew(
    tiny: Tiny, tmp_path: Path, bases: list[weakref.ref[Any]]
) -> None:
    copy, named = tmp_path / "base", tmp_path / "named.jsonl"
    shutil.copytree(tiny.model("causal-lm"), copy)
    config = tiny.config("causal-lm", method="full", model_name_or_path=str(copy), retention_data=str(named))
    for text in TEXTS[:1], TEXTS[3:]:
        write_rows(named, [{"text": one} for one in text])
        assert forgetting_whole(*untrained(config))["forgetting"] == 0
    shorter = config.model_copy(update={"max_length": 5})
    assert forgetting_whole(*untrained(shorter))["forgetting"] == 0
    model, _, _ = untrained(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(copy)
    assert forgetting_whole(*untrained(config))["forgetting"] == 0


def test_a_base_is_gone_once_it_was_read(tiny: Tiny, texts: str, bases: list[weakref.ref[Any]]) -> None:
    config = tiny.config("causal-lm", method="full", retention_data=texts)
    gc.collect()
    gc.disable()
    try:
        forgetting_whole(*untrained(config))
        assert [base() for base in bases[1:]] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("task", "named", "line"),
    [
        ("causal-lm", "org/wiki", "retention_data: org/wiki is no file here"),
        ("seq2seq-lm", "texts.jsonl", "retention_data: seq2seq-lm goes on with no text; allowed with causal-lm"),
        ("sequence-classification", "texts.jsonl", "retention_data: sequence-classification goes on with no text"),
        ("causal-lm", "empty.jsonl", "empty.jsonl has no text in column 'text' \\(text_column\\)"),
        ("causal-lm", "other.jsonl", "other.jsonl, line 1: no column 'text' \\(text_column\\); did you mean 'texts'"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, tiny: Tiny, task: Task, named: str, line: str) -> None:
    write_rows(tmp_path / "empty.jsonl", [{"text": " "}])
    write_rows(tmp_path / "other.jsonl", [{"texts": "a b"}])
    path = named if "/" in named else str(tmp_path / named)
    with pytest.raises(UserError, match=line):
        read_retained(tiny.config(task, retention_data=path))


def test_texts_of_one_token_each_tell_nothing(trained: tuple[TrialConfig, Path], tmp_path: Path) -> None:
    config, adapter = trained
    model, data, _ = load_adapted(adapter, config)
    short = write_rows(tmp_path / "short.jsonl", [{"text": "sky"}])
    config = config.model_copy(update={"retention_data": str(short), "max_length": 1})
    with pytest.raises(UserError, match="has a token that follows another"):
        forgetting(model, config, data.tokenizer)
