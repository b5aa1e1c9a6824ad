"""Each family of models that transformers has for a task trains, and its adapter is read again as what it was.

Those that are refused say why in one line, at a dry run, and most of them what to do; that is done then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, build, has
from tiny_trials import Tiny, evaluate_adapter, write_rows

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import TASK_FACTS, Task
from bilora_ray.recipe import evaluation_config
from bilora_ray.release.export import export_merged
from bilora_ray.training.evaluate import evaluate, load_adapted, predict
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run
from bilora_ray.training.model import AUTO_CLASS
from bilora_ray.training.rehearsal import rehearse

CASES: list[tuple[Task, str]] = [(task, family) for task, known in FAMILIES.items() for family in known]
CASES = [(task, family) for task, family in CASES if has(task, family)]
# Each family once, for the task that it is known for.
FIRST = [next(case for case in CASES if case[1] == family) for family in dict.fromkeys(family for _, family in CASES)]

# Of a scan or a convolution, where a tensor lies in memory decides the order of its sums.
SUMS = 1e-6
ATTENTION = {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
LATENT = {"target_modules": ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj")}
ALONE = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
READS = "reads a row in another way beside a longer one; needs per_device_train_batch_size and per_device_eval_batch_"
# Family -> what its line says, and the settings that mend it, which the line names; None: none do.
REFUSED: dict[str, tuple[str, dict[str, Any] | None]] = {
    **dict.fromkeys(
        ("mixtral", "olmoe", "qwen3_moe"),
        ("; what can have one: target_modules: [k_proj, o_proj, q_proj, v_proj]", ATTENTION),
    ),
    "deepseek_v3": (
        "; what can have one: target_modules: [kv_a_proj_with_mqa, kv_b_proj, o_proj, q_a_proj, q_b_proj]",
        LATENT,
    ),
    "mamba": (
        "; what can have one: target_modules: [dt_proj, in_proj, x_proj]",
        {"target_modules": ("dt_proj", "in_proj", "x_proj")},
    ),
    "mamba2": ("; what can have one: target_modules: [in_proj]", {"target_modules": ("in_proj",)}),
    "rwkv": (
        "predict_with_generate needs per_device_generation_batch_size of 1",
        {"per_device_generation_batch_size": 1},
    ),
    **dict.fromkeys(("convbert", "fnet", "prophetnet"), (READS, ALONE)),
    # Its cache fails in a pass that is not the first of a text.
    "recurrent_gemma": ("cannot read a row (`get_seq_length` can only be called on Attention layers", None),
    # It wants rows of so many tokens, or of their multiples.
    "nystromformer": ("cannot read a row (shape '[-1, 4, 4, 16, 8]' is invalid", None),
    # Its linear layers are of a class of their own.
    "ibert": ("target_modules: No modules were targeted for adaptation", None),
}
ENCODER = ("sees the tokens that it is to predict, as an encoder does", None)


@pytest.fixture(scope="module")
def data(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[Task, str]:
    """Twelve rows of each task, to train on and to measure."""
    folder = tmp_path_factory.mktemp("rows")
    found: dict[Task, str] = {}
    for task in TASK_FACTS:
        rows = Path(tiny.config(task).train_data).read_text().splitlines()[:12]
        found[task] = str(write_rows(folder / f"{task}.jsonl", [json.loads(row) for row in rows]))
    return found


def settings(tiny: Tiny, task: Task, base: Path, rows: str, **changes: Any) -> TrialConfig:
    shape = {"max_length": 48, "max_new_tokens": 6, "predict_with_generate": TASK_FACTS[task].generates}
    steps = {"per_device_train_batch_size": 12, "per_device_eval_batch_size": 12, "learning_rate": 5e-3}
    data = {"train_data": rows, "validation_data": rows}
    return tiny.config(task, model_name_or_path=str(base), **data, **shape, **steps | changes)


def mended(config: TrialConfig, family: str) -> TrialConfig | None:
    """The settings that `family` trains with: those of `config` if they do, or what the line of their refusal names."""
    line, cure = ENCODER if (config.task, family) == ("causal-lm", "xlnet") else REFUSED.get(family, ("", {}))
    if (config.task, family) == ("sequence-classification", "xlnet"):
        line, cure = READS, ALONE
    if line:
        with pytest.raises(UserError) as error:
            rehearse(config)
        assert line in str(error.value)
        assert "\n" not in str(error.value)
    return None if cure is None else config.model_copy(update=cure)


def trained(config: TrialConfig, folder: Path, steps: int) -> tuple[Path, dict[str, float]]:
    """The adapter of a trial whose loss has fallen, and what it measured."""
    run = Run(config, TrialFolder(folder))
    before = evaluate(run.network.evaluated, run.data.validation, config, run.data.tokenizer)
    for _ in range(steps):
        run.train_step()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    adapter = run.folder.best_adapter()
    assert adapter is not None
    return adapter, {name: after[name] for name in config.available_metrics}


@pytest.mark.parametrize(("task", "family"), FIRST)
def test_a_family_trains(task: Task, family: str, tiny: Tiny, data: dict[Task, str], tmp_path: Path) -> None:
    base = build(task, family, tiny, tmp_path / "base")
    config = mended(settings(tiny, task, base, data[task], max_steps=4, eval_steps=4), family)
    if config is None:
        return
    rehearse(config)
    config = config.model_copy(update={"predict_with_generate": False})
    adapter, measured = trained(config, tmp_path / "trial", steps=4)
    assert evaluate_adapter(adapter, config) == pytest.approx(measured, rel=SUMS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_plain_lora_on_experts_is_merged(family: str, tiny: Tiny, data: dict[Task, str], tmp_path: Path) -> None:
    base = build("causal-lm", family, tiny, tmp_path / "base")
    config = settings(tiny, "causal-lm", base, data["causal-lm"], method="lora", max_steps=4, eval_steps=4)
    adapter, measured = trained(config, tmp_path / "trial", steps=4)
    assert export_merged(adapter, tmp_path / "merged", {}) == []
    rows = {"train_data": config.train_data, "validation_data": config.validation_data}
    merged = evaluation_config(tmp_path / "merged", rows)
    assert evaluate_adapter(None, merged) == pytest.approx(measured, rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "family"), CASES)
def test_an_adapter_is_the_same_wherever_it_is_used(
    task: Task, family: str, tiny: Tiny, data: dict[Task, str], tmp_path: Path
) -> None:
    base = build(task, family, tiny, tmp_path / "base")
    config = mended(settings(tiny, task, base, data[task], max_steps=8, eval_steps=8), family)
    if config is None:
        return
    adapter, measured = trained(config, tmp_path / "trial", steps=8)
    assert evaluate_adapter(adapter, config) == pytest.approx(measured, rel=SUMS)
    alone = config.model_copy(update={"per_device_eval_batch_size": 1})
    model, loaded, _ = load_adapted(adapter, alone)
    assert evaluate(model, loaded.validation, alone, loaded.tokenizer) == pytest.approx(measured, rel=1e-4, abs=1e-4)
    if TASK_FACTS[task].generates:
        texts: list[Sequence[str]] = []
        for way in (alone, config):
            texts.append([row.prediction for row in predict(model, loaded, way, 12)])
        assert texts[0] == texts[1]
    assert export_merged(adapter, tmp_path / "merged", {}) == []
    rows = {"train_data": config.train_data, "validation_data": config.validation_data}
    merged = evaluation_config(tmp_path / "merged", rows)
    assert evaluate_adapter(None, merged) == pytest.approx(measured, rel=1e-4, abs=1e-4)
    if not TASK_FACTS[task].generates:
        assert AUTO_CLASS[task].from_pretrained(tmp_path / "merged").config.id2label == {0: "bad", 1: "good"}


def test_the_table_is_as_long_as_it_is_said_to_be() -> None:
    assert len(FIRST) >= 90
    assert all(family in {family for _, family in CASES} for family in REFUSED)
