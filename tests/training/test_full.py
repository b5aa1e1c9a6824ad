"""Full fine-tuning as a trial: what it leaves is a model that transformers loads, and computes what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_trials import TASKS, Tiny, reproducible, run_fit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.recipe import evaluation_config, is_whole, read_recipe
from bilora_ray.training.compute import bases
from bilora_ray.training.evaluate import evaluate, load_adapted
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run, fit
from bilora_ray.training.probe.cost import cost
from bilora_ray.training.rehearsal import least_adapter_mb, rehearse


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    bases._kept.clear()
    yield
    bases._kept.clear()


def whole(tiny: Tiny, task: Task = "causal-lm", **settings: Any) -> TrialConfig:
    return tiny.config(task, **{"method": "full", "learning_rate": 1e-3, "max_steps": 4} | settings)


def left_in(path: Path) -> Path:
    """What the trial has left."""
    left = TrialFolder(path).best_adapter()
    assert left is not None
    return left


def measured(left: Path) -> dict[str, float]:
    """What was left, evaluated as `bilora-ray evaluate` does it."""
    config = evaluation_config(left, {})
    model, data, _ = load_adapted(left, config)
    config = config.model_copy(update={"label_names": data.label_names, "format": data.format})
    return evaluate(model, data.validation, config, data.tokenizer)


def tied(tiny: Tiny, folder: Path) -> str:
    """The causal model with an output layer that is its embeddings."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model("causal-lm"))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.model("causal-lm")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_what_is_left_measures_what_was_measured(task: Task, precision: str, tiny: Tiny, tmp_path: Path) -> None:
    told, progress = run_fit(whole(tiny, task, precision=precision), tmp_path)
    best = next(report for report in told if report["step"] == progress.best_step)
    found = measured(left_in(tmp_path))
    assert {key: best[key] for key in found} == found
    weights = load_file(left_in(tmp_path) / "model.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) / 1e6 == best["adapter_mb"]
    assert told[-1]["eval_loss"] < told[0]["eval_loss"]


def test_it_is_a_model_that_transformers_loads_alone(tiny: Tiny, tmp_path: Path) -> None:
    run_fit(whole(tiny), tmp_path)
    left = left_in(tmp_path)
    model, loading = AutoModelForCausalLM.from_pretrained(left, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = AutoModelForCausalLM.from_pretrained(tiny.model("causal-lm"))
    pairs = zip(model.named_parameters(), base.parameters(), strict=True)
    assert [name for (name, one), other in pairs if torch.equal(one, other)] == []
    assert len(AutoTokenizer.from_pretrained(left)) == len(AutoTokenizer.from_pretrained(tiny.model("causal-lm")))
    assert is_whole(left)
    assert read_recipe(left)["settings"]["method"] == "full"


def test_a_tied_weight_is_written_once_and_stays_tied(tiny: Tiny, tmp_path: Path) -> None:
    config = whole(tiny, model_name_or_path=tied(tiny, tmp_path / "tied"))
    told, _ = run_fit(config, tmp_path / "trial")
    left = left_in(tmp_path / "trial")
    assert "lm_head.weight" not in load_file(left / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(left)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert measured(left)["eval_loss"] == told[-1]["eval_loss"]


def test_a_kept_base_is_taken_and_is_not_given_back(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    read: list[str] = []
    from_pretrained = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def counted(kind: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(str(name))
        return from_pretrained(kind, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    lora = tiny.config("causal-lm", method="lora", max_steps=2)
    reports: dict[str, list[Any]] = {}

    def trained(name: str, config: TrialConfig, keep: bool = True) -> list[Any]:
        found = reports.setdefault(name, [])
        fit(config, TrialFolder(tmp_path / name), lambda told: found.append(told) is None, keep_base=keep)
        return reproducible(found)

    first = trained("lora", lora)
    full = trained("full", whole(tiny))
    assert len(read) == 1  # the kept base was taken
    assert bases._kept == []
    assert trained("after", lora) == first  # and loaded anew
    assert len(read) == 2
    assert trained("alone", whole(tiny), keep=False) == full


def test_recomputed_activations_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    plain, _ = run_fit(whole(tiny), tmp_path / "plain")
    recomputed, _ = run_fit(whole(tiny, gradient_checkpointing=True), tmp_path / "recomputed")
    assert reproducible(recomputed) == reproducible(plain)


def test_sharpness_is_measured_and_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    for task in ("causal-lm", "sequence-classification"):
        plain, _ = run_fit(whole(tiny, task), tmp_path / f"{task}-plain")
        seen, _ = run_fit(whole(tiny, task, sharpness_radius=0.05), tmp_path / f"{task}-seen")
        found = [report.pop("sharpness") for report in seen]
        assert reproducible(seen) == reproducible(plain)
        assert all(0 < rise < 10 for rise in found)
        left = left_in(tmp_path / f"{task}-seen")
        assert measured(left)["sharpness"] == pytest.approx(found[-1], rel=1e-6)
        ours, theirs = (
            load_file(left_in(tmp_path / f"{task}-{kind}") / "model.safetensors") for kind in ("seen", "plain")
        )
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_sharpness_beside_full_is_of_the_weights_that_lora_would_adapt(tiny: Tiny, tmp_path: Path) -> None:
    """Of a training that hardly moves, the two measure the base model."""
    still: dict[str, Any] = {"learning_rate": 1e-12, "max_steps": 1, "eval_steps": 1, "sharpness_radius": 0.05}
    rises = [
        run_fit(tiny.config("causal-lm", method=method, **still), tmp_path / method)[0][0]["sharpness"]
        for method in ("lora", "full")
    ]
    assert rises[1] == pytest.approx(rises[0], rel=1e-4)


def test_a_generation_config_that_would_be_refused_is_kept_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny.model("causal-lm"))
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny.model("causal-lm")).save_pretrained(base)
    told = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}  # as Llama 2's
    (base / "generation_config.json").write_text(json.dumps(told))
    run_fit(whole(tiny, model_name_or_path=str(base)), tmp_path / "trial")
    written = json.loads((left_in(tmp_path / "trial") / "generation_config.json").read_text())
    assert {key: written[key] for key in ("temperature", "top_p")} == {"temperature": 0.9, "top_p": 0.6}


def test_a_checkpoint_holds_all_that_is_trained_and_masters_where_there_are(tiny: Tiny, tmp_path: Path) -> None:
    run = Run(whole(tiny, precision="bf16"), TrialFolder(tmp_path))
    run.train_step()
    run.evaluate()
    newest = run.folder.latest()
    assert newest is not None
    tensors = load_file(newest / "tensors.safetensors")
    for name, parameter in run.model.named_parameters():
        assert tensors[f"model.{name}"].dtype == parameter.dtype == torch.bfloat16
        assert tensors[f"optimizer.{name}.master"].dtype == torch.float32


def test_its_recipe_names_what_is_missing_of_a_model(tiny: Tiny, tmp_path: Path) -> None:
    run_fit(whole(tiny), tmp_path)
    left = left_in(tmp_path)
    with pytest.raises(UserError, match="is a whole model, so model_name_or_path says nothing"):
        evaluation_config(left, {"model_name_or_path": "other"})
    (left / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\*.safetensors is missing of the model that was trained"):
        read_recipe(left)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_dry_run_and_an_estimate_know_it(precision: str, tiny: Tiny, tmp_path: Path) -> None:
    config = whole(tiny, precision=precision)
    rehearse(config)
    told, _ = run_fit(config, tmp_path)
    assert least_adapter_mb(config, None) == told[0]["adapter_mb"]
    taken = cost(config)
    assert taken.adapter == (left_in(tmp_path) / "model.safetensors").stat().st_size
    assert taken.step > 0
