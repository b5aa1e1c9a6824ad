"""A base that a process keeps for its next trial: no weights are read, and each number is that of a fresh process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_trials import METHODS, TASKS, Tiny, reproducible
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bilora_ray.config import TrialConfig
from bilora_ray.errors import OutOfMemory, UserError
from bilora_ray.measures import Task
from bilora_ray.settings import FACTS
from bilora_ray.training import loop
from bilora_ray.training import model as models
from bilora_ray.training.compute import bases
from bilora_ray.training.distributed.workers import ALONE, Workers
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loading import load_data
from bilora_ray.training.loop import Run, fit
from bilora_ray.training.probe.passes import check_passes

SHORT: dict[str, Any] = {"max_steps": 2, "eval_steps": 2, "rank": 2, "auxiliary_rank": 2}


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    bases._kept.clear()
    yield
    bases._kept.clear()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose weights were read."""
    read: list[str] = []
    whole = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(kind: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(str(name))
        return whole(kind, name, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    return read


def results(config: TrialConfig, path: Path, keep: bool = True, report: Any = None) -> Any:
    """What a trial reports, less clocks, and each tensor of its adapter."""
    reports: list[dict[str, float]] = []
    fit(config, TrialFolder(path), report or (lambda metrics: reports.append(metrics) is None), keep_base=keep)
    adapter = TrialFolder(path).best_adapter()
    assert adapter is not None
    weights = load_file(adapter / "adapter_model.safetensors")
    return reproducible(reports), {name: tensor.tolist() for name, tensor in weights.items()}


def loaded(config: TrialConfig) -> bases.Base:
    """What a trial with `config` would train on."""
    data = load_data(config)
    return models.take_base(config, data.tokenizer, data.label_names, ALONE, keep=True)


@pytest.mark.parametrize("task", TASKS)
def test_a_second_trial_loads_no_weights_and_computes_what_a_fresh_process_does(
    task: Task, tiny: Tiny, tmp_path: Path, loads: list[str]
) -> None:
    others = {"gradient_checkpointing": True, "lora_dropout": 0.2, "rank": 3, "learning_rate": 0.1}
    results(tiny.config(task, **SHORT | others), tmp_path / "first")
    configs = [tiny.config(task, **SHORT, method=method) for method in METHODS]
    second = [results(config, tmp_path / config.method) for config in configs]
    assert len(loads) == 1
    fresh = [results(config, tmp_path / f"fresh-{config.method}", keep=False) for config in configs]
    assert len(loads) == 3
    assert second == fresh


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification", "image-classification"])
@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"lora_dropout": 0.3}, {"gradient_checkpointing": True}])
def test_a_kept_base_rounds_draws_and_recomputes_as_a_fresh_one(
    task: Task, changes: dict[str, Any], tiny: Tiny, tmp_path: Path, loads: list[str]
) -> None:
    config = tiny.config(task, **SHORT | changes)
    results(config.model_copy(update={"gradient_checkpointing": False, "learning_rate": 0.1}), tmp_path / "first")
    second = results(config, tmp_path / "second")
    assert len(loads) == 1
    assert second == results(config, tmp_path / "fresh", keep=False)


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_what_is_generated_is_the_same_too(task: Task, tiny: Tiny, tmp_path: Path, loads: list[str]) -> None:
    config = tiny.config(task, **SHORT, predict_with_generate=True, max_new_tokens=4)
    results(tiny.config(task, **SHORT | {"learning_rate": 0.1}), tmp_path / "first")
    second = results(config, tmp_path / "second")
    assert len(loads) == 1
    assert second == results(config, tmp_path / "fresh", keep=False)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_kept(quantization: str, tiny: Tiny, tmp_path: Path, loads: list[str]) -> None:
    pytest.importorskip("bitsandbytes")
    shape = AutoConfig.from_pretrained(tiny.model("causal-lm"))
    shape.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny.model("causal-lm")).save_pretrained(tmp_path / "wide")
    config = tiny.config(
        "causal-lm", **SHORT, model_name_or_path=str(tmp_path / "wide"), quantization=quantization, method="bilora"
    )
    results(config.model_copy(update={"gradient_checkpointing": True}), tmp_path / "first")
    second = results(config, tmp_path / "second")
    assert len(loads) == 1
    assert second == results(config, tmp_path / "fresh", keep=False)


def test_a_head_that_starts_random_starts_as_the_seed_says(tiny: Tiny, tmp_path: Path, loads: list[str]) -> None:
    first, other = (tiny.config("sequence-classification", **SHORT, seed=seed, split_seed=0) for seed in (0, 1))
    results(first, tmp_path / "first")
    second = results(other, tmp_path / "second")
    assert len(loads) == 2
    assert second == results(other, tmp_path / "fresh", keep=False)


def test_where_nothing_starts_random_any_seed_has_the_same_base(tiny: Tiny, tmp_path: Path, loads: list[str]) -> None:
    results(tiny.config("causal-lm", **SHORT), tmp_path / "first")
    config = tiny.config("causal-lm", **SHORT, seed=1)
    second = results(config, tmp_path / "second")
    assert len(loads) == 1
    assert second == results(config, tmp_path / "fresh", keep=False)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"attn_implementation": "eager"}])
def test_another_base_is_loaded_and_the_one_before_is_dropped(changes: Any, tiny: Tiny, loads: list[str]) -> None:
    config = tiny.config("causal-lm")
    base = loaded(config)
    base.begin()
    base.end()
    assert loaded(config.model_copy(update=changes)) is not base
    assert (len(loads), bases._kept) == (2, [])


def test_another_head_is_loaded(tiny: Tiny, tmp_path: Path, loads: list[str]) -> None:
    for names in (("bad", "good"), ("good", "bad")):
        results(tiny.config("sequence-classification", **SHORT, label_names=names), tmp_path / names[0])
    assert len(loads) == 2


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_base_that_was_written_again_is_loaded_again(file: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.model("causal-lm"), tmp_path / "base")
    config = tiny.config("causal-lm", **SHORT, model_name_or_path=str(folder))
    first = results(config, tmp_path / "first")
    if file == "config.json":
        shape = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(shape | {"rms_norm_eps": 0.5}))
    else:
        weights = load_file(folder / file)
        weights["model.norm.weight"] *= 2
        save_file(weights, folder / file, {"format": "pt"})
    second = results(config, tmp_path / "second")
    assert second != first
    assert second == results(config, tmp_path / "fresh", keep=False)


def test_a_trial_that_tune_ends_gives_its_base_back(tiny: Tiny, tmp_path: Path, loads: list[str]) -> None:
    def ends(_: Any) -> bool:
        raise SystemExit(0)

    config = tiny.config("causal-lm", **SHORT | {"max_steps": 4})
    with pytest.raises(SystemExit):
        results(config, tmp_path / "first", report=ends)
    second = results(config, tmp_path / "second")
    assert len(loads) == 1
    assert second == results(config, tmp_path / "fresh", keep=False)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), UserError("x"), KeyboardInterrupt()])
def test_a_base_of_a_trial_that_failed_amid_a_step_is_loaded_again(
    error: BaseException, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    def fails(run: Run, *_: Any) -> Any:
        run.model.get_base_model().get_output_embeddings().weight.data.zero_()
        raise error

    config = tiny.config("causal-lm", **SHORT)
    with monkeypatch.context() as patched:
        patched.setattr(loop.Run, "train_step", fails)
        with pytest.raises((OutOfMemory, type(error))):
            results(config, tmp_path / "first")
    second = results(config, tmp_path / "second")
    assert len(loads) == 2
    assert second == results(config, tmp_path / "fresh", keep=False)


def test_only_who_asks_for_it_has_a_base_kept(tiny: Tiny, tmp_path: Path) -> None:
    results(tiny.config("causal-lm", **SHORT), tmp_path, keep=False)
    assert bases._kept == []


def test_a_base_that_workers_have_parts_of_is_not_kept(tiny: Tiny) -> None:
    config = tiny.config("causal-lm")
    data = load_data(config)
    base = models.take_base(config, data.tokenizer, None, Workers(planned=1, sharded=True), keep=True)
    base.begin()
    base.end()
    assert bases._kept == []


def test_a_base_with_code_of_its_own_is_not_kept(tiny: Tiny) -> None:
    key = bases.key_of(tiny.config("causal-lm", trust_remote_code=True), None, 0, models.device())
    assert key is None


def test_two_trials_at_one_time_have_a_base_each(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config("causal-lm", **SHORT)
    results(config, tmp_path / "first")
    runs = [Run(config, TrialFolder(tmp_path / name), keep_base=True) for name in "ab"]
    assert runs[0].base.model is not runs[1].base.model


def _frozen(base: PreTrainedModel) -> None:
    for parameter in base.parameters():
        parameter.requires_grad_(False)


def _computed_by_hand(base: PreTrainedModel) -> None:
    layer: Any = base.get_output_embeddings()
    layer.forward = lambda x: x


def _another_class(base: PreTrainedModel) -> None:
    layer: Any = base.get_output_embeddings()
    layer.__class__ = type("Swapped", (nn.Linear,), {})


def _untied(base: PreTrainedModel) -> None:
    layer: Any = base.get_output_embeddings()
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))


def _another_config(base: PreTrainedModel) -> None:
    base.config.pad_token_id, base.config.use_cache = 7, False
    assert base.generation_config is not None
    base.generation_config.max_new_tokens = 3


CHANGES: list[Callable[[PreTrainedModel], Any]] = [
    _frozen,
    _computed_by_hand,
    _another_class,
    _untied,
    _another_config,
    lambda base: base.train(),
    lambda base: base.gradient_checkpointing_enable(),
    lambda base: base.enable_input_require_grads(),
    lambda base: base.register_forward_hook(lambda *_: None, with_kwargs=True),
    lambda base: base.register_full_backward_hook(lambda *_: None),
    lambda base: base.register_buffer("cached", torch.ones(1)),
    lambda base: base.compile(backend="eager"),
]


def contents(model: PreTrainedModel) -> list[Any]:
    """All that `model` and its configs hold, to be compared."""

    def seen(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, seen(inner)) for key, inner in value.items()]
        return (id(value), value.requires_grad) if isinstance(value, torch.Tensor) else repr(value)

    configs = [model.config, model.generation_config]
    return [(id(one), type(one), seen(dict(vars(one)))) for one in (*model.modules(), *configs)]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_trial_changes_is_put_back(change: Callable[[PreTrainedModel], Any], tiny: Tiny) -> None:
    config = tiny.config("causal-lm")
    base = loaded(config)
    model = base.begin()
    before = contents(model)
    change(model)
    assert contents(model) != before
    base.end()
    assert loaded(config).model is model
    assert contents(model) == before


@pytest.mark.parametrize("is_buffer", [False, True])
def test_a_base_that_was_written_to_is_loaded_again(is_buffer: bool, tiny: Tiny, loads: list[str]) -> None:
    config = tiny.config("causal-lm")
    base = loaded(config)
    model = base.begin()
    with torch.no_grad():
        next(iter(model.buffers() if is_buffer else model.parameters())).add_(1)
    base.end()
    assert loaded(config) is not base
    assert len(loads) == 2


class Read(TrialConfig):
    """Settings that remember which of them were asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name in FACTS:
            asked.add(name)
        return super().__getattribute__(name)


asked: set[str] = set()


@pytest.mark.parametrize("task", TASKS)
def test_no_other_setting_decides_a_base_or_what_it_is_looked_at_for(task: Task, tiny: Tiny) -> None:
    config = Read(**tiny.config(task).model_dump())
    data = load_data(config)
    asked.clear()
    model, _ = models.load_base(config, data.tokenizer, data.label_names)
    again = {"max_length", "max_new_tokens", "predict_with_generate"}  # of positions, looked at for a kept one too
    assert asked <= bases.DECISIVE | {"seed"} | again
    asked.clear()
    check_passes(model, config, data.tokenizer)
    sizes = {"per_device_train_batch_size", "per_device_eval_batch_size", "tokens_per_pass"}
    assert asked <= bases.DECISIVE | {"predict_with_generate"} | sizes


def test_what_a_kept_base_is_too_short_for_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    results(tiny.config("sequence-classification", **SHORT), tmp_path / "first")
    with pytest.raises(UserError, match="max_length: 65 is more"):
        results(tiny.config("sequence-classification", **SHORT | {"max_length": 65}), tmp_path / "second")


def test_passes_are_looked_at_once_for_one_base_and_again_for_other_settings(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    check = loop.check_passes
    monkeypatch.setattr(loop, "check_passes", lambda *args: (looked.append(1), check(*args)))
    others: list[dict[str, Any]] = [{"per_device_train_batch_size": 4}, {"per_device_generation_batch_size": 1}]
    for number, settings in enumerate(({}, {}, *others)):
        results(tiny.config("causal-lm", **SHORT | settings), tmp_path / str(number))
    assert len(looked) == 3
