"""What servers make of an adapter: how it is served, or why it would be refused and what to do then.

Read in their sources: vLLM's `vllm/config/lora.py`, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py` and
`docs/models/supported_models.md`, SGLang's `sglang/srt/lora/{lora_config,lora_manager,utils}.py`, llama.cpp's
`convert_lora_to_gguf.py`; in 2026.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilora_ray.checking import build
from bilora_ray.config import TrialConfig
from bilora_ray.measures import TASK_FACTS
from bilora_ray.paths import kind_by_name, loadable
from bilora_ray.recipe import CONFIG, RECIPE, TEMPLATE, WEIGHTS, read_recipe
from bilora_ray.release.base import base_settings
from bilora_ray.release.names import name_outside
from bilora_ray.training.tasks import TASKS

# What vLLM takes for --max-lora-rank from 16 on, its default: releases differ in whether they take less.
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
# The modules that SGLang knows the shape of in any model; a model's own code may know more.
SGLANG_MODULES = frozenset(
    [
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"),
        *("embed_tokens", "lm_head"),
    ]
)
# The architectures that vLLM serves, but without LoRA.
VLLM_WITHOUT_LORA = frozenset(
    [
        *("ArcticForCausalLM", "BloomForCausalLM", "DbrxForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM"),
        *("GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoXForCausalLM", "Gemma3nForCausalLM", "MPTForCausalLM"),
        *("Mamba2ForCausalLM", "MambaForCausalLM", "OlmoeForCausalLM", "RWForCausalLM", "StableLmForCausalLM"),
    ]
)
FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
MERGE = "export it with --merge"


@dataclass(frozen=True)
class Refusal:
    """Why a server would not take an adapter.

    Attributes:
        server: its name.
        why: what is wrong, for a person.
        mend: what to do.
    """

    server: str
    why: str
    mend: str

    def __str__(self) -> str:
        return f"{self.server} would refuse it: {self.why}; {self.mend}"


def refusals(adapter: Path, config: TrialConfig) -> list[Refusal]:
    """What vLLM, SGLang and llama.cpp would refuse the folder `adapter`, trained with `config`, for; none as a rule."""
    facts = TASK_FACTS[config.task]
    if facts.reads_images:
        return [Refusal("vLLM, SGLang and llama.cpp", "they classify no images", "load it with PEFT")]
    if facts.generates and not TASKS[config.task].continues:
        why = "they serve no encoder-decoder that writes texts"
        return [Refusal("vLLM and SGLang", why, "load it with PEFT, or use `bilora-ray predict`")]
    settings = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    if not facts.generates:
        why = "none reads an adapter's head, but a vLLM with its pull request 53555 of August 2026"
        return [Refusal("vLLM, SGLang and llama.cpp", why, f"{MERGE}, which any vLLM serves")]
    names = _tensors(adapter)
    whole = sorted({name.rpartition(".")[0].removeprefix("base_model.model.") for name in names if _is_whole(name)})
    base = base_settings(config)
    found = [*_of_vllm(settings, whole, base), *_of_sglang(settings, names, whole)]
    tied = base.get("tie_word_embeddings") and any(_module(name).endswith("lm_head") for name in names)
    if tied:
        why = "it adapts lm_head, which is the embeddings' in this base model and is not read there"
        found.append(Refusal("llama.cpp", why, f"train without lm_head among target_modules, or {MERGE}"))
    elif whole:
        found.append(Refusal("llama.cpp", f"it has other weights than of LoRA ({', '.join(whole)})", MERGE))
    elif settings.get("use_dora"):
        found.append(Refusal("llama.cpp", "it is a DoRA", MERGE))
    return found


def _of_vllm(settings: Mapping[str, Any], whole: Sequence[str], base: Mapping[str, Any]) -> list[Refusal]:
    found, most = [], VLLM_RANKS[-1]
    if unable := sorted(VLLM_WITHOUT_LORA & set(base.get("architectures") or ())):
        found.append(Refusal("vLLM", f"it has no LoRA for {', '.join(unable)}", MERGE))
    if settings["r"] > most:
        line = f"rank {settings['r']} is above {most}, the highest --max-lora-rank"
        found.append(Refusal("vLLM", line, f"train with a rank of {most} at the most, or {MERGE}"))
    if modules := settings.get("modules_to_save") or whole:
        found.append(Refusal("vLLM", f"modules_to_save ({', '.join(modules)}) are no part of a LoRA there", MERGE))
    return found + _of_both("vLLM", settings)


def _of_sglang(settings: Mapping[str, Any], names: Sequence[str], whole: Sequence[str]) -> list[Refusal]:
    found, targets = [], settings["target_modules"]
    if isinstance(targets, str):
        line = f"target_modules is a pattern ({targets}), where it wants names"
        found.append(Refusal("SGLang", line, f"train with a list of names, or {MERGE}"))
    adapted = {_module(name).rpartition(".")[2] for name in names if not _is_whole(name)}
    if unknown := sorted(adapted - SGLANG_MODULES):
        line = f"it knows {', '.join(unknown)} in few models, if in any"
        found.append(Refusal("SGLang", line, f"train with target_modules that it knows, or {MERGE}"))
    if modules := settings.get("modules_to_save") or whole:
        found.append(Refusal("SGLang", f"modules_to_save ({', '.join(modules)}) are no part of a LoRA there", MERGE))
    return found + _of_both("SGLang", settings)


def _of_both(server: str, settings: Mapping[str, Any]) -> list[Refusal]:
    found = []
    if settings.get("use_dora"):
        found.append(Refusal(server, "it is a DoRA", MERGE))
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        found.append(Refusal(server, "it has biases of its own", MERGE))
    return found


def _tensors(adapter: Path) -> list[str]:
    """The names in the header of the weights' file."""
    with (adapter / WEIGHTS).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [name for name in header if name != "__metadata__"]


def _is_whole(name: str) -> bool:
    return not name.endswith(FACTORS)


def _module(name: str) -> str:
    return next((name.removesuffix(end) for end in FACTORS if name.endswith(end)), name)


def serving(
    config: TrialConfig,
    base: str,
    adapter: str,
    name: str,
    stops: Sequence[int] | None = None,
    refused: Sequence[Refusal] = (),
) -> dict[str, str]:
    """Server -> the command that serves an adapter that writes texts; none of one that does not, or is refused.

    Args:
        config: of the training.
        base: the base model, as a shell is to read it.
        adapter: the adapter's folder.
        name: what requests call the adapter.
        stops: the tokens that end a text, where they are the adapter's own.
        refused: see `refusals`.
    """
    if not TASKS[config.task].continues:
        return {}
    code = " --trust-remote-code" if config.trust_remote_code else ""
    revision = f" --revision {config.model_revision}" if config.model_revision is not None else ""
    template = f" --chat-template {_quoted(adapter, TEMPLATE)}" if config.chat_template is not None else ""
    told = dict(config.chat_template_kwargs or ())
    kwargs = f" --default-chat-template-kwargs {shlex.quote(json.dumps(told))}" if told else ""
    ends = f" --generation-config {shlex.quote(adapter)}" if stops else ""
    # What it was trained on, as vLLM makes it of whole weights.
    bits = " --quantization bitsandbytes" if config.quantization == "nf4" else ""
    rank = next((most for most in VLLM_RANKS if most >= config.exported_rank), config.exported_rank)
    named = shlex.quote(f"{name}={adapter}")
    lines = {
        "vLLM": f"vllm serve {base}{revision}{code}{bits} --enable-lora --max-lora-rank {rank} --lora-modules {named}"
        f"{template}{kwargs}{ends}",
        "SGLang": f"python -m sglang.launch_server --model-path {base}{revision}{code} --enable-lora"
        f" --lora-paths {named}{template}",
    }
    return {server: line for server, line in lines.items() if server not in {one.server for one in refused}}


def serving_whole(config: TrialConfig, folder: str) -> dict[str, str]:
    """Server -> the command that serves the whole model in `folder`; none where no server has such models."""
    facts, where = TASK_FACTS[config.task], shlex.quote(folder)
    code = " --trust-remote-code" if config.trust_remote_code else ""
    if TASKS[config.task].continues:
        sglang = f"python -m sglang.launch_server --model-path {where}{code}"
        return {"vLLM": f"vllm serve {where}{code}", "SGLang": sglang}
    if facts.generates or facts.reads_images:
        return {}
    return {"vLLM": f"vllm serve {where}{code} --runner pooling"}


def _quoted(folder: str, file: str) -> str:
    return shlex.quote(file if folder == "." else f"{folder}/{file}")


@dataclass(frozen=True)
class Advice:
    """What to tell whoever has exported something.

    Attributes:
        commands: server -> the command that serves it on this machine.
        notes: what would be refused, and what whoever gets it needs besides.
    """

    commands: Mapping[str, str]
    notes: Sequence[str]


def advice_on(adapter: Path, output: Path, merged: bool) -> Advice:
    """How to serve on this machine what was exported of the folder `adapter` to `output`, and what to mind.

    Args:
        adapter: as it was trained.
        output: as a person gave it.
        merged: whether a whole model is there.
    """
    recipe = read_recipe(adapter)
    config = build(TrialConfig, recipe["settings"], f"{adapter / RECIPE}: settings")
    if merged or config.leaves_model:
        return Advice(serving_whole(config, str(output)), [])
    refused, name = refusals(adapter, config), config.model_name_or_path
    base = shlex.quote(loadable(name))
    commands = serving(config, base, str(output), output.resolve().name, recipe.get("stop_token_ids"), refused)
    notes = [str(refusal) for refusal in refused]
    if kind_by_name(name, is_data=False) == "local":
        here = name_outside(name, is_data=False)
        line = f"the base model is a folder: who gets the adapter needs it too, and PEFT looks for it as {here}"
        notes.append(line)
    return Advice(commands, notes)
