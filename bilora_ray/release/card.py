"""The model card of an exported adapter: what the Hub shows of it, and what a person reads first."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from bilora_ray.config import METHOD_TITLES, TASK_FACTS, TrialConfig, applies, shown
from bilora_ray.paths import BUILTIN, kind_by_name
from bilora_ray.recipe import PAD, TEMPLATE
from bilora_ray.training.tasks import TASKS

CARD = "README.md"
# What vLLM takes for --max-lora-rank: https://docs.vllm.ai/en/latest/features/lora.html
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)


def write_card(adapter: Path, config: TrialConfig, origin: Mapping[str, Any]) -> None:
    """Put a card in the place of PEFT's, which has only headings; its metadata, which the Hub reads, stay.

    Args:
        adapter: the folder, as PEFT wrote it.
        config: the settings of the trial.
        origin: the study, the trial's number and the value of its metric; the tokens that end a text and the padding
            token's id, where they matter.
    """
    base, model_class = config.model_name_or_path, TASK_FACTS[config.task].model_class
    arguments, imports = [f'"{base}"'], ""
    if kind_by_name(base, is_data=False) == "built in":
        imports, arguments = "from bilora_ray import builtin\n", [f'builtin.path("{base.removeprefix(BUILTIN)}")']
    if config.model_revision is not None:
        arguments.append(f'revision="{config.model_revision}"')
    if config.trust_remote_code:
        arguments.append("trust_remote_code=True")
    more = TASKS[config.task].model_arguments(config.label_names)
    arguments += [f"{key}={value!r}" for key, value in more.items()]
    if TASKS[config.task].heads:  # the base may have one for other labels; the adapter has its own
        arguments.append("ignore_mismatched_sizes=True")
    pad = origin.get(PAD)
    padding = (
        "" if pad is None else f"base.config.get_text_config().pad_token_id = {pad}  # what batches are padded with\n"
    )
    settings = {key: value for key, value in config.model_dump().items() if applies(key, config.method)}
    if config.max_steps is not None:
        del settings["num_train_epochs"]
    table = {key: str(settings[key]).replace("|", "\\|") for key in shown("card") if settings.get(key) is not None}
    rows = "\n".join(f"| {key} | {value} |" for key, value in table.items())
    value, stops, newline = origin.get(config.metric), origin.get("stop_token_ids"), "\n"
    result = "" if value is None else f", with {config.metric} {value:.6g} on its validation rows"
    metadata = ModelCard.load(adapter / CARD, ignore_metadata_errors=True).data
    if kind_by_name(base, is_data=False) != "hub":  # a path of this machine, at which the Hub would stop
        metadata.base_model = None
        metadata.tags = [tag for tag in metadata.tags or () if not tag.startswith("base_model:")]
    (adapter / CARD).write_text(
        f"""---
{metadata.to_yaml()}
---

# LoRA adapter of `{base}`

Trained with {METHOD_TITLES[config.method]} by bilora-ray: trial {origin["trial"]} of study `{origin["study"]}`{result}.
`bilora_ray.json` has all of its settings.

| setting | value |
| --- | --- |
{rows}

```python
{imports}from peft import PeftModel
from transformers import {model_class}

base = {model_class}.from_pretrained({", ".join(arguments)})
{padding}model = PeftModel.from_pretrained(base, ".")  # the folder of this file
{f"model.generation_config.eos_token_id = {stops}{newline}" if stops else ""}```
{_served(config, stops)}""",
        encoding="utf-8",
    )


def _served(config: TrialConfig, stops: Sequence[int] | None) -> str:
    """How to serve what a server would not find by itself: a chat template, what that is told, the ends of a text."""
    template = f" --chat-template {TEMPLATE}" if config.chat_template is not None else ""
    told = dict(config.chat_template_kwargs or ())
    kwargs = f" --default-chat-template-kwargs {shlex.quote(json.dumps(told))}" if told else ""
    is_builtin = kind_by_name(config.model_name_or_path, is_data=False) == "built in"
    if is_builtin or not TASKS[config.task].continues or not (template or kwargs or stops):
        return ""
    base = config.model_name_or_path + (f" --revision {config.model_revision}" if config.model_revision else "")
    code = " --trust-remote-code" if config.trust_remote_code else ""
    rank = next((most for most in VLLM_RANKS if most >= config.rank), config.rank)
    ends = " --generation-config ." if stops else ""
    line = f"vllm serve {base}{code} --enable-lora --max-lora-rank {rank} --lora-modules adapter=."
    line += f"{template}{kwargs}{ends}"
    text = f"\nIn this folder:\n\n```bash\n{line}\n```\n"
    if stops:
        text += (
            f"\nWithout `--generation-config`, a request needs `stop_token_ids: {list(stops)}`, or a text has no end.\n"
        )
    return text
