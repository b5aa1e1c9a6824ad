"""Compiled blocks: few graphs, none anew for another trial, and numbers as without; none where a machine cannot."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trials import METHODS, Tiny, reproducible, run_fit
from torch import nn
from torch._dynamo.utils import counters

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.training import model as models
from bilora_ray.training.compute import bases, compiled
from bilora_ray.training.distributed.workers import ALONE
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loading import load_data
from bilora_ray.training.loop import Run
from bilora_ray.training.rehearsal import rehearse

Backend = str | Callable[..., Any]
Graphs = tuple[int, int]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Backend], None]]:
    """Has blocks compiled by another backend, such as one that needs no C++ compiler, and forgets their graphs."""

    def choose(backend: Backend) -> None:
        monkeypatch.setattr(compiled, "BACKEND", backend)
        compiled._try.cache_clear()

    torch._dynamo.reset()
    choose("eager")
    yield choose
    compiled._try.cache_clear()
    bases._kept.clear()
    torch._dynamo.reset()


def trained(config: TrialConfig, path: Path) -> tuple[list[float], set[Any], Run]:
    """The losses of a trial, and the shapes of what its blocks read; its base is kept."""
    run = Run(config, TrialFolder(path), keep_base=True)
    shapes, losses = set(), []
    model: Any = run.model.get_base_model()
    hook = model.register_forward_pre_hook(
        lambda _, args, named: shapes.add(named["input_ids"].shape), with_kwargs=True
    )
    while run.progress.step < run.max_steps:
        run.train_step()
        losses.append(float(run.window.losses[-1]))
    hook.remove()
    return losses, shapes, run


def new_graphs() -> Graphs:
    """How many graphs have come since the last call, and in how many places one had to end."""
    found = counters["stats"]["unique_graphs"], len(counters["graph_break"])
    counters.clear()
    return found


@pytest.mark.parametrize("task", ["causal-lm", pytest.param("sequence-classification", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("compiler")
def test_few_graphs_do_for_all_shapes_and_for_a_second_trial(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    for method in (*METHODS, "flat-lora"):
        config = tiny.config(task, method=method, max_steps=12, per_device_train_batch_size=5)
        plain, _, _ = trained(config, tmp_path / f"plain-{method}")
        config = config.model_copy(update={"torch_compile": True})
        counters.clear()
        losses, shapes, run = trained(config, tmp_path / f"first-{method}")
        graphs, breaks = new_graphs()
        assert len(shapes) >= 4
        assert 1 <= graphs <= 3
        assert breaks == 0
        assert losses == plain
        assert run.compiled.metrics() == {"compiled": 1.0}
        run.base.end()
        other = config.model_copy(update={"learning_rate": 1e-3, "lora_alpha": 3.0})
        _, _, run = trained(other, tmp_path / f"second-{method}")
        assert new_graphs() == (0, 0)
        run.base.end()


@pytest.mark.parametrize("task", ["causal-lm", pytest.param("seq2seq-lm", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("compiler")
def test_what_is_measured_is_computed_as_without(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 2, "eval_steps": 2, "predict_with_generate": True, "max_new_tokens": 6}
    run = Run(tiny.config(task, **settings, torch_compile=True), TrialFolder(tmp_path / "compiled"))
    run.train_step()
    counters.clear()
    metrics = run._metrics()
    assert new_graphs() == (0, 0)
    plain = Run(tiny.config(task, **settings), TrialFolder(tmp_path / "plain"))
    plain.train_step()
    assert reproducible([metrics]) == reproducible([plain._metrics() | {"compiled": 1.0}])


@pytest.mark.slow
def test_an_encoder_and_a_decoder_have_two_graphs_each(
    compiler: Callable[[Backend], None], tiny: Tiny, tmp_path: Path
) -> None:
    """However many blocks there are: in T5 the first of a stack makes the bias of positions that the others are given.

    Three would do only if the first ones were not compiled, which gains nothing: they are as dear as the others.
    """
    makes_bias: list[bool] = []

    def noted(graph: torch.fx.GraphModule, _: Any) -> Any:
        makes_bias.append(any("embedding" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiler(noted)
    assert compiled.why_not("cpu") is None
    makes_bias.clear()
    config = tiny.config("seq2seq-lm", max_steps=12, per_device_train_batch_size=5, torch_compile=True)
    _, shapes, run = trained(config, tmp_path)
    assert len(shapes) >= 4
    assert len(compiled.blocks_of(run.model)) == 4
    assert makes_bias == [True, False, True, False]
    run.base.end()


def told() -> list[object]:
    """What torch is told about compiling."""
    dynamo, shapes = torch._dynamo.config, torch.fx.experimental._config
    level = logging.getLogger("torch._dynamo").level
    return [dynamo.recompile_limit, dynamo.suppress_errors, dynamo.optimize_ddp, shapes.use_duck_shape, level]


@pytest.mark.usefixtures("compiler")
def test_it_ends_with_its_trial(tiny: Tiny, tmp_path: Path) -> None:
    config, before = tiny.config("causal-lm", max_steps=1), told()
    _, _, run = trained(config.model_copy(update={"torch_compile": True}), tmp_path / "compiled")
    assert told() == before
    run.base.end()
    counters.clear()
    _, _, run = trained(config, tmp_path / "plain")
    assert not any(module._compiled_call_impl for module in run.model.modules())
    assert run.compiled.metrics() == {}


def _is_missing(*_: Any) -> Any:
    raise RuntimeError("g++ is not here")


class _Torn:
    """Compiles what is tried, and no block."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.asked += 1
        return graph.forward if self.asked == 1 else _is_missing()


@pytest.mark.parametrize("backend", [_is_missing, _Torn()], ids=["machine", "model"])
def test_what_cannot_be_compiled_computes_as_it_is_and_says_so(
    backend: Any, compiler: Callable[[Backend], None], tiny: Tiny, tmp_path: Path
) -> None:
    compiler(backend)
    config = tiny.config("causal-lm", max_steps=2)
    reports, _ = run_fit(config.model_copy(update={"torch_compile": True}), tmp_path / "compiled")
    plain, _ = run_fit(config, tmp_path / "plain")
    assert reproducible(reports) == [{**report, "compiled": 0.0} for report in reproducible(plain)]


def test_a_failure_that_passes_is_not_remembered(compiler: Callable[[Backend], None]) -> None:
    fails = iter([_is_missing])
    compiler(lambda graph, _: next(fails, lambda: graph.forward)())
    assert compiled.why_not("cpu") == "g++ is not here"
    assert compiled.why_not("cpu") is None


def test_a_dry_run_says_what_is_missing(compiler: Callable[[Backend], None], tiny: Tiny) -> None:
    config = tiny.config("causal-lm", torch_compile=True)
    assert rehearse(config).notes == ()
    compiler(_is_missing)
    line = "torch_compile: this machine cannot compile, so that trials compute as without it (g++ is not here)"
    assert rehearse(config).notes == (line,)
    assert rehearse(config, here=False).notes == ()


def test_parts_of_blocks_are_not_compiled(tiny: Tiny) -> None:
    config = tiny.config("causal-lm", torch_compile=True)
    data, parts = load_data(config), dataclasses.replace(ALONE, sharded=True)
    with pytest.raises(UserError, match="torch_compile: blocks that are cut into parts are not compiled"):
        models.load_base(config, data.tokenizer, None, parts)


def test_the_blocks_of_a_model_are_those_of_its_lists() -> None:
    inner, last = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])), nn.Tanh()
    model = nn.ModuleDict(
        {"encoder": nn.ModuleList([inner]), "head": nn.Linear(1, 1), "decoder": nn.ModuleList([last])}
    )
    assert compiled.blocks_of(nn.Sequential(model)) == [inner, last]


CASES: list[dict[str, Any]] = [
    {"method": "lora"},
    {"method": "bilora"},
    {"lora_dropout": 0.2},
    {"lora_dropout": 0.2, "gradient_checkpointing": True},
    {"precision": "bf16"},
    {"per_device_train_batch_size": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_traced_gradients_are_those_of_the_model_to_the_bit(
    settings: dict[str, Any], compiler: Callable[[Backend], None], tiny: Tiny, tmp_path: Path
) -> None:
    compiler("aot_eager")
    config = tiny.config("causal-lm", **{"max_steps": 6} | settings)
    plain, _, _ = trained(config, tmp_path / "plain")
    losses, _, run = trained(config.model_copy(update={"torch_compile": True}), tmp_path / "compiled")
    assert losses == plain
    assert run.compiled.metrics() == {"compiled": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_losses_are_those_of_the_model_but_for_rounding(
    method: str, compiler: Callable[[Backend], None], tiny: Tiny, tmp_path: Path
) -> None:
    compiler("inductor")
    if reason := compiled.why_not("cpu"):
        pytest.skip(reason)
    config = tiny.config("causal-lm", method=method, max_steps=6)
    plain, _, _ = trained(config, tmp_path / "plain")
    losses, _, _ = trained(config.model_copy(update={"torch_compile": True}), tmp_path / "compiled")
    assert losses == pytest.approx(plain, rel=1e-5)
