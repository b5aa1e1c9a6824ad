"""What servers would refuse of an adapter, and the command that serves one that they take."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bilora_ray.config import TrialConfig
from bilora_ray.measures import TASK_FACTS, Task
from bilora_ray.release.servers import refusals, serving, serving_whole

LAYER = "base_model.model.model.layers.0.self_attn."
CLASSIFIERS: tuple[Task, ...] = (
    "sequence-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
)


def config_of(task: Task = "causal-lm", **settings: Any) -> TrialConfig:
    return TrialConfig(**{"model_name_or_path": "org/model", "task": task, "train_data": "org/data", **settings})


def adapter(
    folder: Path, modules: tuple[str, ...] = ("q_proj", "v_proj"), whole: tuple[str, ...] = (), **more: Any
) -> Path:
    """The files of an adapter that servers look at."""
    settings = {"r": 8, "target_modules": list(modules), "modules_to_save": None, "use_dora": False, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **more}))
    names = [f"{LAYER}{module}.lora_{side}.weight" for module in modules for side in "AB"]
    save_file({name: torch.zeros(1) for name in (*names, *whole)}, folder / "adapter_model.safetensors")
    return folder


def told(folder: Path, config: TrialConfig) -> list[tuple[str, str]]:
    return [(one.server, one.why) for one in refusals(folder, config)]


def test_an_ordinary_adapter_is_refused_by_none(tmp_path: Path) -> None:
    assert refusals(adapter(tmp_path), config_of()) == []


@pytest.mark.parametrize(
    ("more", "servers", "words"),
    [
        ({"r": 513}, {"vLLM"}, "rank 513 is above 512"),
        ({"use_dora": True}, {"vLLM", "SGLang", "llama.cpp"}, "DoRA"),
        ({"bias": "all"}, {"vLLM", "SGLang"}, "biases"),
        ({"target_modules": ".*q_proj"}, {"SGLang"}, "target_modules is a pattern"),
        ({"modules": ("q_proj", "query_key_value")}, {"SGLang"}, "it knows query_key_value in few models"),
        ({"modules_to_save": ["embed_tokens"]}, {"vLLM", "SGLang"}, "modules_to_save (embed_tokens)"),
        ({"whole": ("base_model.model.lm_head.weight",)}, {"vLLM", "SGLang", "llama.cpp"}, "lm_head"),
    ],
)
def test_what_a_server_does_not_take_is_told_with_the_mend(
    more: dict[str, Any], servers: set[str], words: str, tmp_path: Path
) -> None:
    found = refusals(adapter(tmp_path, **more), config_of())
    assert {one.server for one in found} == servers
    assert all(words in one.why for one in found)
    assert all("export it with --merge" in str(one) for one in found)


@pytest.mark.parametrize(
    ("base", "modules", "server", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ("q_proj",), "vLLM", "it has no LoRA for GPT2LMHeadModel"),
        ({"tie_word_embeddings": True}, ("q_proj", "lm_head"), "llama.cpp", "it adapts lm_head"),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, ("q_proj", "lm_head"), None, ""),
    ],
)
def test_the_base_model_matters(
    base: dict[str, Any], modules: tuple[str, ...], server: str | None, words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(base))
    found = refusals(adapter(tmp_path, modules), config_of(model_name_or_path=str(tmp_path)))
    assert [one.server for one in found] == ([] if server is None else [server])
    assert all(words in one.why and "export it with --merge" in one.mend for one in found)


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_a_head_wants_a_merged_model(task: Task, tmp_path: Path) -> None:
    (one,) = refusals(adapter(tmp_path, whole=("base_model.model.classifier.weight",)), config_of(task))
    assert (one.server, one.mend) == ("vLLM, SGLang and llama.cpp", "export it with --merge, which any vLLM serves")
    assert serving(config_of(task), "org/model", "x", "x") == {}
    assert serving_whole(config_of(task), "a b") == {"vLLM": "vllm serve 'a b' --runner pooling"}


@pytest.mark.parametrize("task", ["seq2seq-lm", "image-classification"])
def test_what_no_server_has_is_told_and_no_command_is_made_up(task: Task, tmp_path: Path) -> None:
    (one,) = refusals(adapter(tmp_path), config_of(task))
    assert "load it with PEFT" in one.mend
    assert (serving(config_of(task), "org/model", "x", "x"), serving_whole(config_of(task), "x")) == ({}, {})


def test_every_task_is_known(tmp_path: Path) -> None:
    known = {*CLASSIFIERS, "causal-lm", "seq2seq-lm", "image-classification"}
    assert known == set(TASK_FACTS)


@pytest.mark.parametrize(("rank", "most"), [(1, 16), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_the_commands_say_all_that_a_server_needs_to_know(rank: int, most: int) -> None:
    config = config_of(
        rank=rank,
        model_revision="0" * 40,
        trust_remote_code=True,
        quantization="nf4",
        chat_template="own.jinja",
        chat_template_kwargs={"style": ""},
    )
    lines = serving(config, "org/model", "my adapter", "mine", [1, 2])
    words = shlex.split(lines["vLLM"])
    assert words[:3] == ["vllm", "serve", "org/model"]
    values = {
        "--revision": "0" * 40,
        "--quantization": "bitsandbytes",
        "--max-lora-rank": str(most),
        "--lora-modules": "mine=my adapter",
        "--chat-template": "my adapter/chat_template.jinja",
        "--default-chat-template-kwargs": '{"style": ""}',
        "--generation-config": "my adapter",
    }
    assert {word: words[words.index(word) + 1] for word in values} == values
    assert {"--trust-remote-code", "--enable-lora"} <= set(words)
    words = shlex.split(lines["SGLang"])
    assert words[:5] == ["python", "-m", "sglang.launch_server", "--model-path", "org/model"]
    assert words[words.index("--lora-paths") + 1] == "mine=my adapter"


def test_who_would_refuse_it_gets_no_command(tmp_path: Path) -> None:
    refused = refusals(adapter(tmp_path, target_modules=".*q_proj"), config_of())
    assert set(serving(config_of(), "org/model", "x", "x", refused=refused)) == {"vLLM"}
