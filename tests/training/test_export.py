"""What leaves training: an adapter that plain PEFT loads, with the very logits that were evaluated."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_trials import HEADS, METHODS, TASKS, Tiny, evaluate_adapter, run_fit
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, GenerationConfig

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.facts import METHOD_TITLES
from bilora_ray.measures import Task
from bilora_ray.recipe import evaluation_config, is_whole, read_recipe
from bilora_ray.release.card import write_card
from bilora_ray.release.export import export_adapter, export_merged
from bilora_ray.training import tasks
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loading import load_data
from bilora_ray.training.loop import Run
from bilora_ray.training.model import AUTO_CLASS

# The outputs of a classification head.
PROBLEMS = {
    "sequence-classification": "single_label_classification",
    "multi-label-classification": "multi_label_classification",
    "regression": "regression",
}
ORIGIN = {"study": "s", "trial": 3}
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "bilora_ray.json"]

# What somebody without this package does with the adapters.
PLAIN = """
import sys
import torch
from huggingface_hub import ModelCard
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

for job in sys.argv[1:]:
    kind, base, adapter, batch, labels, output = job.split(",")
    more = {"num_labels": int(labels)} if int(labels) else {}
    model = getattr(transformers, kind).from_pretrained(base, **more)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        save_file({"logits": model(**load_file(batch)).logits.contiguous()}, output)
assert not [name for name in sys.modules if name.startswith("bilora_ray")]
"""


@dataclass(frozen=True)
class Trained:
    """A trial after its last step, which was its best: the adapter, and the logits of its evaluation."""

    config: TrialConfig
    adapter: Path
    metrics: dict[str, float]
    batch: dict[str, Tensor]
    logits: Tensor


def train(config: TrialConfig, path: Path) -> Trained:
    run = Run(config, TrialFolder(path))
    while run.progress.step < run.max_steps:
        run.train_step()
    metrics = run.evaluate()
    adapter = run.folder.best_adapter()
    assert adapter == run.folder.adapter_at(run.max_steps)
    batch = batch_of(config)
    run.model.eval()
    with torch.inference_mode():
        logits = run.model(**batch).logits
    return Trained(config, adapter, metrics, batch, logits)


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Trained]:
    """One Bi-LoRA trial of each task, with a radius that would show in the logits."""
    return {task: train(tiny.config(task, rho=0.5, lora_dropout=0.1), tmp_path_factory.mktemp(task)) for task in TASKS}


def batch_of(config: TrialConfig) -> dict[str, Tensor]:
    data = load_data(config)
    batch = tasks.TASKS[config.task].collate(data.validation, data.tokenizer)
    if config.task in HEADS:  # of which a model would make a loss of its own
        del batch["labels"]
    return batch


def logits_of(model: Any, trial: Trained) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model(**trial.batch).logits


def base_of(trial: Trained) -> Any:
    labels = HEADS.get(trial.config.task)
    more = {} if labels is None else {"num_labels": labels}
    return AUTO_CLASS[trial.config.task].from_pretrained(trial.config.model_name_or_path, **more)


@pytest.mark.slow
def test_plain_peft_gives_the_logits_of_training(trained: dict[Task, Trained], tmp_path: Path) -> None:
    jobs = []
    for task, trial in trained.items():
        labels = HEADS.get(task, 0)
        save_file(trial.batch, tmp_path / f"{task}.batch")
        files = (trial.config.model_name_or_path, trial.adapter, tmp_path / f"{task}.batch")
        jobs.append(",".join(map(str, (AUTO_CLASS[task].__name__, *files, labels, tmp_path / f"{task}.logits"))))
    subprocess.run([sys.executable, "-c", PLAIN, *jobs], check=True, cwd=tmp_path, capture_output=True)
    for task, trial in trained.items():
        difference = load_file(tmp_path / f"{task}.logits")["logits"] - trial.logits
        assert float(difference.abs().max()) == 0.0, task


@pytest.mark.parametrize("task", TASKS)
def test_the_adapter_matters_and_the_auxiliary_does_not(task: Task, trained: dict[Task, Trained]) -> None:
    trial = trained[task]
    assert trial.metrics["auxiliary_norm"] == pytest.approx(0.5, rel=1e-4)
    base = base_of(trial)
    without = logits_of(base, trial)
    loaded = PeftModel.from_pretrained(base, str(trial.adapter))
    assert torch.equal(logits_of(loaded, trial), trial.logits)
    assert not torch.allclose(without, trial.logits, atol=1e-2)


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_of_the_exported_adapter_gives_the_reported_metrics(
    task: Task, trained: dict[Task, Trained]
) -> None:
    trial = trained[task]
    measured = evaluate_adapter(trial.adapter, evaluation_config(trial.adapter, {}))
    assert measured == {name: trial.metrics[name] for name in trial.config.available_metrics}


@pytest.mark.parametrize("task", TASKS)
def test_the_best_metrics_are_those_of_the_kept_adapter_and_not_of_the_last_step(
    task: Task, tiny: Tiny, tmp_path: Path
) -> None:
    # A learning rate too large for the second half of the training.
    rate = 0.5 if task == "regression" else 0.3
    config = tiny.config(task, learning_rate=rate, lr_scheduler_type="constant", max_steps=6, eval_steps=1, seed=3)
    reports, progress = run_fit(config, tmp_path)
    adapter = TrialFolder(tmp_path).best_adapter()
    assert adapter is not None
    best = reports[progress.best_step - 1]
    assert best["eval_loss"] == progress.best_value == min(report["eval_loss"] for report in reports)
    assert best != reports[-1]
    assert evaluate_adapter(adapter, config) == {name: best[name] for name in config.available_metrics}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_folder_is_plain_peft(
    task: Task, method: str, trained: dict[Task, Trained], tiny: Tiny, tmp_path: Path
) -> None:
    trial = trained[task] if method == "bilora" else train(tiny.config(task, method="lora"), tmp_path)
    assert sorted(path.name for path in trial.adapter.iterdir()) == FILES
    text = (trial.adapter / "adapter_config.json").read_text() + (trial.adapter / "README.md").read_text()
    assert "auxiliary" not in text.lower()
    settings = json.loads((trial.adapter / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (8, 16, "LORA")
    assert settings["base_model_name_or_path"] == trial.config.model_name_or_path
    assert settings["inference_mode"] is True
    weights = load_file(trial.adapter / "adapter_model.safetensors")
    assert trial.metrics["adapter_mb"] * 1e6 == pytest.approx(sum(tensor.nbytes for tensor in weights.values()))
    names = weights.keys()
    assert not [name for name in names if "auxiliary" in name or "optimizer" in name]
    heads = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    expected = heads if task in HEADS else set()
    assert {name for name in names if not name.endswith(("lora_A.weight", "lora_B.weight"))} == expected


def test_both_methods_export_the_same_files(trained: dict[Task, Trained], tiny: Tiny, tmp_path: Path) -> None:
    lora = train(tiny.config("causal-lm", method="lora"), tmp_path).adapter
    bilora = trained["causal-lm"].adapter
    shapes = [
        {name: tensor.shape for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (lora, bilora)
    ]
    assert shapes[0] == shapes[1]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (lora, bilora)]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
        config["lora_dropout"] = None
    assert configs[0] == configs[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_modules_without_pretrained_weights_are_saved_with_the_adapter(
    precision: str, tiny: Tiny, tmp_path: Path
) -> None:
    # The pooler is in the middle of the model, so PEFT does not know by itself that it was never trained.
    folder = tmp_path / "base"
    BertModel.from_pretrained(tiny.folder / "bert", add_pooling_layer=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.folder / "bert").save_pretrained(folder)
    config = tiny.config(
        "sequence-classification", model_name_or_path=str(folder), precision=precision, metric="eval_accuracy"
    )
    reports, progress = run_fit(config, tmp_path / "run")
    adapter = TrialFolder(tmp_path / "run").best_adapter()
    assert adapter is not None
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {name for name in tensors if "lora_" not in name} == {
        f"base_model.model.{name}"
        for name in ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias")
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    best = next(report for report in reports if report["step"] == progress.best_step)
    for seed in (0, 1):  # what stays random in the base may not matter
        measured = evaluate_adapter(adapter, config.model_copy(update={"seed": seed}))
        assert measured == {name: best[name] for name in config.available_metrics}


@pytest.mark.parametrize("task", TASKS)
def test_bf16_adapters_evaluate_to_the_reported_metrics(task: Task, tiny: Tiny, tmp_path: Path) -> None:
    trial = train(tiny.config(task, precision="bf16"), tmp_path)
    measured = evaluate_adapter(trial.adapter, trial.config)
    assert measured == {name: trial.metrics[name] for name in trial.config.available_metrics}


def test_the_recipe_says_where_an_adapter_comes_from(trained: dict[Task, Trained]) -> None:
    trial = trained["sequence-classification"]
    recipe = read_recipe(trial.adapter)
    assert recipe["step"] == 8
    assert recipe["model_commit"] is None  # of a folder
    # The labels that were found are kept, so that an evaluation needs no training data.
    known = {"label_names": ("bad", "good"), "precision": "fp32"}  # which was auto
    assert TrialConfig(**recipe["settings"]) == trial.config.model_copy(update=known)


def test_export_adapter_copies_the_adapter_and_adds_its_origin(trained: dict[Task, Trained], tmp_path: Path) -> None:
    trial = trained["causal-lm"]
    output = tmp_path / "a" / "adapter"
    export_adapter(trial.adapter, output, ORIGIN)
    assert sorted(path.name for path in output.iterdir()) == FILES
    expected, here = read_recipe(trial.adapter), trial.config.model_dump()
    names = {key: f"./{Path(here[key]).name}" for key in ("model_name_or_path", "train_data", "validation_data")}
    assert read_recipe(output) == {**ORIGIN, **expected, "settings": {**expected["settings"], **names}}
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (trial.adapter, output))
    assert after == {**before, "base_model_name_or_path": "./llama"}
    assert (output / FILES[2]).read_bytes() == (trial.adapter / FILES[2]).read_bytes()
    assert [path.name for path in output.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("task", TASKS)
def test_the_card_says_what_was_trained_and_its_code_loads_the_adapter(
    task: Task, trained: dict[Task, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = trained[task]
    export_adapter(trial.adapter, tmp_path / "x", {**ORIGIN, trial.config.metric: 0.25})
    card = ModelCard.load(tmp_path / "x" / "README.md")
    assert card.data.base_model is None  # the Hub takes no path for the name of a base model
    assert (card.data.library_name, card.data.tags) == ("peft", ["bilora", "bilora-ray", "lora", "transformers"])
    assert f"trial 3 of study `s`, with {trial.config.metric} 0.25 on its validation rows." in card.text
    assert f"| rho | {trial.config.rho} |" in card.text
    assert "More Information Needed" not in card.text
    monkeypatch.chdir(tmp_path / "x")
    Path(Path(model_folder(trial)).name).symlink_to(model_folder(trial))
    codes = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert ["PeftModel" in code for code in codes] == [True, False]
    for code in codes:
        (tmp_path / "load.py").write_text(code)
        model = runpy.run_path(str(tmp_path / "load.py"))["model"]
        assert float((logits_of(model, trial) - trial.logits).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_the_card_names_the_method_and_its_source(
    name: Any, trained: dict[Task, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHOD_TITLES, name, "A Method ([paper](https://a.b))")
    export_adapter(trained["causal-lm"].adapter, tmp_path / "x", ORIGIN)
    write_card(tmp_path / "x", trained["causal-lm"].config.model_copy(update={"method": name}), ORIGIN)
    assert "Trained with A Method ([paper](https://a.b)) by bilora-ray" in (tmp_path / "x" / "README.md").read_text()


def test_to_copy_an_adapter_out_takes_no_torch(trained: dict[Task, Trained], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from bilora_ray.release.export import export_adapter\n"
        "export_adapter(Path(sys.argv[1]), Path(sys.argv[2]), {'study': 's', 'trial': 3})\n"
        "assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    adapter = trained["causal-lm"].adapter
    subprocess.run([sys.executable, "-c", code, str(adapter), str(tmp_path / "x")], check=True)


def test_the_card_loads_the_base_as_it_was_trained_on(trained: dict[Task, Trained], tmp_path: Path) -> None:
    export_adapter(trained["causal-lm"].adapter, tmp_path / "x", ORIGIN)
    settings = {"model_revision": "0" * 40, "trust_remote_code": True, "target_modules": "q_proj|v_proj"}
    write_card(tmp_path / "x", trained["causal-lm"].config.model_copy(update=settings), ORIGIN)
    text = (tmp_path / "x" / "README.md").read_text()
    assert "num_train_epochs" not in text
    assert f', revision="{"0" * 40}", trust_remote_code=True)' in text
    assert "| target_modules | q_proj\\|v_proj |" in text
    built_in = {"model_name_or_path": "builtin:quickstart/model"}
    write_card(tmp_path / "x", trained["causal-lm"].config.model_copy(update=built_in), ORIGIN)
    code, _ = re.findall(r"```python\n(.*?)model =", (tmp_path / "x" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "load.py").write_text(code)
    assert runpy.run_path(str(tmp_path / "load.py"))["base"].config.model_type == "llama"


def test_others_may_read_an_adapter(trained: dict[Task, Trained]) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in trained["causal-lm"].adapter.iterdir()}
    assert modes == dict.fromkeys(FILES, trained["causal-lm"].adapter.stat().st_mode & 0o666)


@pytest.mark.parametrize("task", TASKS)
def test_a_merged_model_needs_no_peft(task: Task, trained: dict[Task, Trained], tmp_path: Path) -> None:
    trial = trained[task]
    export_merged(trial.adapter, tmp_path / "merged", {"study": "s"})
    model = AUTO_CLASS[task].from_pretrained(tmp_path / "merged")
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    difference = (logits_of(model, trial) - trial.logits).abs().max()
    assert float(difference) <= 1e-5 * max(1.0, float(trial.logits.abs().max()))
    batch = batch_of(trial.config.model_copy(update={"model_name_or_path": str(tmp_path / "merged")}))
    assert batch.keys() == trial.batch.keys()
    assert all(torch.equal(batch[key], tensor) for key, tensor in trial.batch.items())
    assert {path.suffix for path in (tmp_path / "merged").iterdir()} <= {".json", ".md", ".safetensors", ".jinja"}
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    if task in HEADS:
        assert model.config.num_labels == HEADS[task]
        if (names := read_recipe(trial.adapter)["settings"]["label_names"]) is not None:
            assert model.config.id2label == dict(enumerate(names))
    if task in PROBLEMS:
        assert model.config.problem_type == PROBLEMS[task]


@pytest.mark.parametrize("task", TASKS)
def test_a_merged_model_measures_what_its_adapter_does(
    task: Task, trained: dict[Task, Trained], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.folder)
    trial, merged = trained[task], tmp_path / "merged"
    export_merged(trial.adapter, merged, ORIGIN)
    assert is_whole(merged)
    assert not is_whole(trial.adapter)
    measured = evaluate_adapter(None, evaluation_config(merged, {}))
    assert measured == pytest.approx({name: trial.metrics[name] for name in measured}, rel=1e-4)
    base = evaluation_config(merged, {}, base_model=True)
    assert base.model_name_or_path == f"./{Path(model_folder(trial)).name}"
    assert line_of(merged, model_name_or_path="x") == (
        f"{merged}: is a whole model, so model_name_or_path says nothing"
    )


def test_only_an_adapter_is_exported(trained: dict[Task, Trained], tmp_path: Path) -> None:
    export_merged(trained["causal-lm"].adapter, tmp_path / "merged", ORIGIN)
    torn = tmp_path / "torn"
    export_adapter(trained["causal-lm"].adapter, torn, ORIGIN)
    (torn / "adapter_config.json").unlink()
    for folder in (torn, tmp_path / "merged"):
        for export in (export_adapter, export_merged):
            with pytest.raises(UserError, match=r"no adapter here \(adapter_config.json is missing\)$"):
                export(folder, tmp_path / "out", ORIGIN)
    assert not (tmp_path / "out").exists()
    assert line_of(torn) == f"{torn}: no adapter here (adapter_config.json is missing)"


def test_an_evaluation_without_generation_needs_no_other_metric(trained: dict[Task, Trained], tmp_path: Path) -> None:
    export_adapter(trained["causal-lm"].adapter, tmp_path / "x", ORIGIN)
    recipe = read_recipe(tmp_path / "x")
    recipe["settings"] |= {"metric": "eval_exact_match", "predict_with_generate": True}
    (tmp_path / "x" / "bilora_ray.json").write_text(json.dumps(recipe))
    assert "eval_exact_match" in evaluation_config(tmp_path / "x", {}).available_metrics
    config = evaluation_config(tmp_path / "x", {"predict_with_generate": False})
    assert "eval_exact_match" not in config.available_metrics


def model_folder(trial: Trained) -> str:
    return trial.config.model_name_or_path


def test_a_merge_does_not_touch_the_adapter(trained: dict[Task, Trained], tmp_path: Path) -> None:
    trial = trained["causal-lm"]
    before = {path.name: path.read_bytes() for path in trial.adapter.iterdir()}
    export_merged(trial.adapter, tmp_path / "merged", ORIGIN)
    assert {path.name: path.read_bytes() for path in trial.adapter.iterdir()} == before
    loaded = AutoModelForCausalLM.from_pretrained(trial.config.model_name_or_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(loaded, str(trial.adapter)), trial), trial.logits)


def test_an_evaluation_takes_other_data_and_settings(trained: dict[Task, Trained], tiny: Tiny) -> None:
    trial = trained["sequence-classification"]
    data = str(tiny.folder / "labels-train.jsonl")
    settings = {"train_data": data, "validation_data": data, "per_device_eval_batch_size": 5, "learning_rate": "3e-4"}
    config = evaluation_config(trial.adapter, settings)
    expected = {**settings, "learning_rate": 3e-4, "label_names": ("bad", "good"), "precision": "fp32"}
    assert config == trial.config.model_copy(update=expected)
    metrics = evaluate_adapter(trial.adapter, config)
    loaded = PeftModel.from_pretrained(base_of(trial), str(trial.adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(trial.config.model_name_or_path)
    right = 0
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    for row in rows:
        with torch.inference_mode():
            logits = loaded(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)).logits
        right += ("bad", "good")[int(logits.argmax())] == row["label"]
    assert metrics["eval_accuracy"] == right / len(rows)


def test_a_recipe_cannot_turn_remote_code_on(trained: dict[Task, Trained], tmp_path: Path) -> None:
    export_adapter(trained["causal-lm"].adapter, tmp_path / "theirs", ORIGIN)
    recipe = read_recipe(tmp_path / "theirs")
    recipe["settings"] |= {"trust_remote_code": True, "attn_implementation": "kernels-community/flash-attn3"}
    (tmp_path / "theirs" / "bilora_ray.json").write_text(json.dumps(recipe))
    assert not evaluation_config(tmp_path / "theirs", {}).trust_remote_code
    assert evaluation_config(tmp_path / "theirs", {}).attn_implementation is None
    assert evaluation_config(tmp_path / "theirs", {"trust_remote_code": True}).trust_remote_code


def test_an_evaluation_survives_the_loss_of_the_training_data(
    trained: dict[Task, Trained], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.folder)
    trial = trained["sequence-classification"]
    only_good = tmp_path / "good.jsonl"
    only_good.write_text('{"text": "lovely red", "label": "good"}\n')
    lost = tmp_path / "adapter"
    export_adapter(trial.adapter, lost, ORIGIN)
    recipe = read_recipe(lost)
    recipe["settings"] |= {"train_data": str(tmp_path / "gone.jsonl"), "validation_data": None}
    (lost / "bilora_ray.json").write_text(json.dumps(recipe))
    data = {"train_data": str(only_good), "validation_data": str(only_good)}
    metrics = evaluate_adapter(lost, evaluation_config(lost, data))
    assert metrics["eval_accuracy"] in (0.0, 1.0)


def test_the_base_model_alone_is_measured_without_an_adapter(trained: dict[Task, Trained]) -> None:
    trial = trained["causal-lm"]
    base = evaluate_adapter(None, trial.config)
    assert base.keys() == set(trial.config.available_metrics)
    assert base["eval_loss"] > trial.metrics["eval_loss"]


def line_of(adapter: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        evaluation_config(adapter, settings)
    return str(caught.value)


def test_a_folder_that_is_no_adapter_of_ours_is_named(trained: dict[Task, Trained], tmp_path: Path) -> None:
    assert line_of(tmp_path) == f"{tmp_path}: no adapter here (adapter_config.json is missing)"
    export_adapter(trained["causal-lm"].adapter, tmp_path / "x", ORIGIN)
    (tmp_path / "x" / "bilora_ray.json").unlink()
    assert line_of(tmp_path / "x") == (
        f"{tmp_path / 'x'}: bilora_ray.json is missing: this adapter was not trained here, so give its settings"
    )


def test_wrong_settings_of_an_evaluation_are_named(trained: dict[Task, Trained]) -> None:
    adapter = trained["causal-lm"].adapter
    where = f"{adapter / 'bilora_ray.json'}: settings"
    assert line_of(adapter, rnak=4) == f"{where}: unknown key 'rnak'; did you mean 'rank'?"
    assert line_of(adapter, metric="eval_los") == (
        f"{where}: metric: 'eval_los' is not measured here; did you mean 'eval_loss'?"
    )


OWN_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ bos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {{ style }}{% endif %}"
)


@pytest.fixture(scope="module")
def chatted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """A trial on chats, with a template of its own that ends turns with another token than the model's; the file."""
    file = tmp_path_factory.mktemp("template") / "own.jinja"
    file.write_text(OWN_TEMPLATE)
    config = tiny.config(
        "causal-lm",
        train_data=str(tiny.folder / "chats-train.jsonl"),
        validation_data=str(tiny.folder / "chats-validation.jsonl"),
        chat_template=str(file),
        chat_template_kwargs={"style": ""},
        predict_with_generate=True,
        max_new_tokens=8,
        max_steps=4,
    )
    return train(config, tmp_path_factory.mktemp("chatted")), file


def test_an_adapter_for_chats_takes_its_template_and_its_ends_along(
    chatted: tuple[Trained, Path], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trial, file = chatted
    output = tmp_path / "adapter"
    export_adapter(trial.adapter, output, ORIGIN)
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [*FILES, "chat_template.jinja", "generation_config.json"]
    )
    assert (output / "chat_template.jinja").read_text() == OWN_TEMPLATE
    # bos, with which the template ends a turn, and eos.
    assert GenerationConfig.from_pretrained(output).eos_token_id == [1, 2]
    card = (output / "README.md").read_text()
    assert (
        "vllm serve ./llama --enable-lora --max-lora-rank 16 --lora-modules adapter=. "
        """--chat-template chat_template.jinja --default-chat-template-kwargs '{"style": ""}' --generation-config ."""
    ) in card
    assert "a request needs `stop_token_ids: [1, 2]`" in card
    assert "model.generation_config.eos_token_id = [1, 2]" in card
    # Evaluated elsewhere, where the file that the space named is not.
    monkeypatch.chdir(tiny.folder)
    content = file.read_text()
    file.unlink()
    try:
        config = evaluation_config(output, {})
        assert config.format == "openai"  # as it was found
        measured = evaluate_adapter(output, config)
        assert measured == {name: trial.metrics[name] for name in trial.config.available_metrics}
        export_merged(output, tmp_path / "merged", ORIGIN)
    finally:
        file.write_text(content)
    merged = tmp_path / "merged"
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [1, 2]
    assert AutoTokenizer.from_pretrained(merged).chat_template == OWN_TEMPLATE
    assert evaluation_config(merged, {}).chat_template == str(merged / "chat_template.jinja")
