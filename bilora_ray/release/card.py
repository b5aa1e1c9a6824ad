"""The model card of what is exported: what the Hub shows of it, and what a person reads first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from bilora_ray.config import TEST_SETTINGS, TrialConfig
from bilora_ray.facts import METHOD_TITLES
from bilora_ray.measures import TASK_FACTS
from bilora_ray.paths import BUILTIN, kind_by_name
from bilora_ray.recipe import CONFIG, PAD
from bilora_ray.release.licence import licence_of
from bilora_ray.release.names import name_outside
from bilora_ray.release.servers import refusals, serving, serving_whole
from bilora_ray.settings import FACTS, SOURCES, applies, shown
from bilora_ray.training.tasks import TASKS
from bilora_ray.words import without_training

CARD = "README.md"
# What is known of a study's baseline, by the name that a trial's origin has it under.
BASELINE = "baseline"
# What the Hub calls what models of transformers' classes are for.
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
}


def write_card(folder: Path, config: TrialConfig, origin: Mapping[str, Any], whole: bool = False) -> None:
    """Put a card in the place of PEFT's, which has only headings.

    Args:
        folder: the adapter, or the whole model.
        config: the settings of the trial, with its sources as they are called here.
        origin: the study, the trial's number and the values of its metrics; the study's baseline, the digests, the
            tokens that end a text and the padding token's id, where they are known.
        whole: whether it is a whole model, with the adapter merged in or trained whole.
    """
    base = name_outside(config.model_name_or_path, is_data=False)
    kind = f"`{base}` with a LoRA adapter merged into its weights" if whole else f"LoRA adapter of `{base}`"
    if config.leaves_model:
        kind = f"`{base}`, fully fine-tuned"
    parts = [
        f"---\n{_metadata(folder, config, whole).to_yaml()}\n---\n",
        f"# {kind}\n",
        f"Trained with {METHOD_TITLES[config.method]} by bilora-ray{_result(config, origin)}.\n"
        "`bilora_ray.json` has all of its settings.\n",
        _scores(config, origin),
        _settings(config),
        _data(config, origin.get("digests", {})),
        _loading_whole(config) if whole else _loading(config, origin),
        _serving(folder, config, origin.get("stop_token_ids"), whole),
    ]
    (folder / CARD).write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _metadata(folder: Path, config: TrialConfig, whole: bool) -> ModelCardData:
    """What the Hub reads. It would stop at a name that is none there."""
    base, names = config.model_name_or_path, [config.train_data, config.validation_data]
    of_hub = kind_by_name(base, is_data=False) == "hub"
    datasets = [name for name in names if name is not None and kind_by_name(name, is_data=True) == "hub"]
    relation = "finetune" if whole else "adapter"
    licence: dict[str, Any] = dict(licence_of(config))
    tags = ["bilora-ray", config.method, "transformers"]
    if not whole:
        tags.append(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"].lower())
    if of_hub:
        tags.append(f"base_model:{relation}:{base}")
    return ModelCardData(
        base_model=base if of_hub else None,
        base_model_relation=relation if of_hub else None,
        library_name="transformers" if whole else "peft",
        pipeline_tag=PIPELINES.get(TASK_FACTS[config.task].model_class),
        tags=sorted(set(tags)),
        datasets=sorted(set(datasets)) or None,
        **licence,
    )


def _result(config: TrialConfig, origin: Mapping[str, Any]) -> str:
    value = origin.get(config.metric)
    trial = f": trial {origin['trial']} of study `{origin['study']}`" if "trial" in origin else ""
    return trial if value is None else f"{trial}, with {config.metric} {value:.6g} on its validation rows"


def _scores(config: TrialConfig, origin: Mapping[str, Any]) -> str:
    """The scores beside those of what learned nothing from the rows; nothing where no baseline is known."""
    baseline = origin.get(BASELINE) or {}
    metrics = [key for key in (config.metric, *config.available_metrics) if isinstance(origin.get(key), int | float)]
    metrics = [key for key in dict.fromkeys(metrics) if isinstance(baseline.get(key), int | float)]
    if not metrics:
        return ""
    what = "model" if config.leaves_model else "adapter"
    return "\n".join(
        [
            f"| on the validation rows | {' | '.join(metrics)} |",
            f"| --- |{' --- |' * len(metrics)}",
            f"| this {what} | {' | '.join(f'{origin[key]:.6g}' for key in metrics)} |",
            f"| {without_training(baseline)} | {' | '.join(f'{baseline[key]:.6g}' for key in metrics)} |\n",
        ]
    )


def _settings(config: TrialConfig) -> str:
    settings = {key: value for key, value in config.model_dump().items() if applies(key, config.method)}
    if config.max_steps is not None:
        del settings["num_train_epochs"]
    table = {key: str(settings[key]).replace("|", "\\|") for key in shown("card") if settings.get(key) is not None}
    rows = "".join(f"| {key} | {value} |\n" for key, value in table.items())
    return f"| setting | value |\n| --- | --- |\n{rows}"


def _data(config: TrialConfig, digests: Mapping[str, str]) -> str:
    """What it was made from, and what tells that from anything else of the name."""
    rows = []
    for key, kind in SOURCES.items():
        name, revision = getattr(config, key), FACTS[key].revision
        if not isinstance(name, str) or (key in TEST_SETTINGS and key not in digests):
            continue
        commit = getattr(config, revision) if revision is not None else None
        what = digests.get(key) or commit
        known = f"`{what}`" if what else ""
        rows.append(f"| {key} | `{name_outside(name, kind != 'model')}` | {known} |")
    return "\n".join(["| made from | name | digest or commit |", "| --- | --- | --- |", *rows]) + "\n"


def _arguments(config: TrialConfig) -> tuple[str, str]:
    """What `from_pretrained` is given for the base model, and the imports that it takes."""
    name = config.model_name_or_path
    arguments, imports = [f'"{name_outside(name, is_data=False)}"'], ""
    if kind_by_name(name, is_data=False) == "built in":
        imports, arguments = "from bilora_ray import builtin\n", [f'builtin.path("{name.removeprefix(BUILTIN)}")']
    if config.model_revision is not None:
        arguments.append(f'revision="{config.model_revision}"')
    if config.trust_remote_code:
        arguments.append("trust_remote_code=True")
    more = TASKS[config.task].model_arguments(config.label_names)
    arguments += [f"{key}={value!r}" for key, value in more.items()]
    if TASKS[config.task].heads:  # the base may have one for other labels; the adapter has its own
        arguments.append("ignore_mismatched_sizes=True")
    return ", ".join(arguments), imports


def _loading(config: TrialConfig, origin: Mapping[str, Any]) -> str:
    model_class, stops, pad = TASK_FACTS[config.task].model_class, origin.get("stop_token_ids"), origin.get(PAD)
    arguments, imports = _arguments(config)
    imported = f"{imports}from transformers import {model_class}\n"

    def loaded(name: str) -> list[str]:
        padded = f"{name}.config.get_text_config().pad_token_id = {pad}  # what batches are padded with"
        return [f"{name} = {model_class}.from_pretrained({arguments})", *([] if pad is None else [padded])]

    ends = [f"model.generation_config.eos_token_id = {list(stops)}"] if stops else []
    with_peft = [f"from peft import PeftModel\n{imported}", *loaded("base")]
    with_peft.append('model = PeftModel.from_pretrained(base, ".")  # the folder of this file')
    alone = [imported, *loaded("model"), 'model.load_adapter(".")']
    return "\n".join(
        [
            *("With PEFT:\n\n```python", *with_peft, *ends, "```"),
            *("\nWith transformers, which asks PEFT by itself:\n\n```python", *alone, *ends, "```\n"),
            *_needed(config),
        ]
    )


def _loading_whole(config: TrialConfig) -> str:
    model_class = TASK_FACTS[config.task].model_class
    code = ", trust_remote_code=True" if config.trust_remote_code else ""
    return (
        f"```python\nfrom transformers import {model_class}\n\n"
        f'model = {model_class}.from_pretrained("."{code})  # the folder of this file\n```\n'
    )


def _needed(config: TrialConfig) -> list[str]:
    """What has to be at hand that the Hub does not have."""
    name = config.model_name_or_path
    kind = kind_by_name(name, is_data=False)
    if kind == "built in":
        return [f"`{name}` is in the package: `pip install bilora-ray`.\n"]
    if kind == "local":
        here = name_outside(name, is_data=False)
        return [f"`{here}` is a folder with the base model, which is not published with this.\n"]
    return []


def _serving(folder: Path, config: TrialConfig, stops: Sequence[int] | None, whole: bool) -> str:
    """How servers serve it from its folder, and which would refuse it."""
    if whole:
        lines, refused = serving_whole(config, "."), []
    else:
        refused = refusals(folder, config)
        lines = serving(config, _base_for_shell(config), ".", "adapter", stops, refused)
    parts = [f"With {server}, in this folder:\n\n```bash\n{line}\n```\n" for server, line in lines.items()]
    parts += [f"{refusal}.\n" for refusal in refused]
    if lines and stops and not whole:
        ends = f"`stop_token_ids: {list(stops)}`"
        parts.append(f"Without `--generation-config`, a request needs {ends}, or a text has no end.\n")
    return "\n".join(parts)


def _base_for_shell(config: TrialConfig) -> str:
    name = config.model_name_or_path
    if kind_by_name(name, is_data=False) != "built in":
        return name_outside(name, is_data=False)
    python = f'from bilora_ray import builtin; print(builtin.path("{name.removeprefix(BUILTIN)}"))'
    return f"\"$(python -c '{python}')\""
