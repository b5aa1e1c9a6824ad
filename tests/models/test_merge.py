"""What is merged computes what the adapter did, or is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from tiny_trials import Tiny, evaluate_adapter, run_fit
from transformers import AutoModelForCausalLM

from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.recipe import evaluation_config
from bilora_ray.release import export
from bilora_ray.release.export import export_merged
from bilora_ray.training.folder import TrialFolder


def adapter_of(task: Task, family: str, tiny: Tiny, folder: Path, targets: tuple[str, ...], **more: Any) -> Path:
    """An adapter on `targets` of a base whose output layer is tied to its embeddings."""
    base = build(task, family, tiny, folder / "base", tie_word_embeddings=True)
    shape = {"target_modules": targets, "max_length": 48, "max_steps": 2, "eval_steps": 2}
    run_fit(tiny.config(task, model_name_or_path=str(base), **shape, **more), folder / "trial")
    adapter = TrialFolder(folder / "trial").best_adapter()
    assert adapter is not None
    return adapter


@pytest.mark.parametrize(
    ("task", "family", "targets"),
    [
        ("causal-lm", "llama", ("q_proj", "lm_head")),
        ("causal-lm", "gpt2", ("c_attn", "lm_head")),
        ("causal-lm", "bert", ("query", "decoder")),
        ("seq2seq-lm", "bart", ("q_proj", "lm_head")),
        ("seq2seq-lm", "t5", ("q", "lm_head")),
    ],
)
def test_a_tied_output_layer_is_merged_apart_from_the_embeddings(
    task: Task, family: str, targets: tuple[str, ...], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(task, family, tiny, tmp_path, targets)
    assert export_merged(adapter, tmp_path / "merged", {}) == []
    monkeypatch.chdir(tiny.folder)
    expected = evaluate_adapter(adapter, evaluation_config(adapter, {}))
    measured = evaluate_adapter(None, evaluation_config(tmp_path / "merged", {}))
    assert measured == pytest.approx(expected, rel=1e-4)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_stays_tied_is_written_once(tiny: Tiny, tmp_path: Path) -> None:
    adapter = adapter_of("causal-lm", "llama", tiny, tmp_path, ("q_proj",))
    export_merged(adapter, tmp_path / "merged", {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_merged_model_that_is_another_one_is_not_written(tiny: Tiny, tmp_path: Path) -> None:
    # Untied, this one no longer scales what its output layer reads.
    adapter = adapter_of("seq2seq-lm", "switch_transformers", tiny, tmp_path, ("q", "lm_head"))
    with pytest.raises(UserError) as error:
        export_merged(adapter, tmp_path / "merged", {})
    assert str(error.value).startswith(f"{adapter}: cannot be merged: read again, the merged model's logits are ")
    assert str(error.value).endswith("; export it without --merge, or train without lm_head among target_modules")
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_weights_that_do_not_come_back_are_found(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of("causal-lm", "llama", tiny, tmp_path, ("q_proj", "v_proj"))
    write = export._write_merged

    def torn(*arguments: Any) -> tuple[torch.Tensor, list[str]]:
        logits, tied = write(*arguments)
        return logits * 1.01, tied

    monkeypatch.setattr(export, "_write_merged", torn)
    with pytest.raises(UserError, match="logits are 1% off those of the base model with the adapter"):
        export_merged(adapter, tmp_path / "merged", {})
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("seed", [0, 3])
def test_a_number_of_which_little_is_left_is_merged_too(seed: int, tiny: Tiny, tmp_path: Path) -> None:
    base = build("sequence-classification", "bert", tiny, tmp_path / "base", hidden_size=64)
    config = tiny.config("regression", model_name_or_path=str(base), max_length=48, precision="bf16", seed=seed)
    run_fit(config.model_copy(update={"max_steps": 2, "learning_rate": 1e-3}), tmp_path / "trial")
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    assert adapter is not None
    (note,) = export_merged(adapter, tmp_path / "merged", {})
    assert float(note.rpartition(" ")[2].removesuffix("%")) < 10


def test_what_rounding_takes_is_told(tiny: Tiny, tmp_path: Path) -> None:
    adapter = adapter_of("causal-lm", "llama", tiny, tmp_path, ("q_proj",), precision="bf16")
    (note,) = export_merged(adapter, tmp_path / "merged", {})
    start, _, share = note.rpartition(" ")
    assert start == "precision: the sum is rounded to bf16, which moves the logits by"
    assert 0 < float(share.removesuffix("%")) < 10
