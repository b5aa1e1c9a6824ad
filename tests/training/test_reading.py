"""A base model that cannot be read: a wrong file is the user's, a failing disk the machine's."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_trials import Tiny, run_fit
from transformers import AutoModelForCausalLM, AutoTokenizer

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, UserError
from bilora_ray.training import loading
from bilora_ray.training.checkpoint import load_checkpoint
from bilora_ray.training.evaluate import load_adapted
from bilora_ray.training.folder import TENSORS, TrialFolder
from bilora_ray.training.model import load_adapter, load_base, load_tokenizer
from bilora_ray.training.rehearsal import rehearse

CONFIGURATION = "from transformers import LlamaConfig\nclass Mine(LlamaConfig):\n    model_type = 'mine'\n"
CODE = """{line}
from transformers import LlamaForCausalLM
from .configuration import Mine
class MyModel(LlamaForCausalLM):
    config_class = Mine
"""


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    loading._kept.clear()


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> TrialConfig:
    """Settings whose model may be spoilt."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.model("causal-lm"), folder)
    return tiny.config("causal-lm", model_name_or_path=str(folder))


def cut(file: str) -> Callable[[Path], None]:
    return lambda model: (model / file).write_bytes((model / file).read_bytes()[: (model / file).stat().st_size // 2])


def other_shape(model: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "hidden_size": 64}))


def remote(model: Path, line: str, name: str) -> None:
    """Give the model code of its own, in a module of a name that no other test has loaded."""
    settings = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration.Mine", "AutoModelForCausalLM": f"{name}.MyModel"}
    (model / "config.json").write_text(json.dumps({**settings, "model_type": "mine", "auto_map": auto_map}))
    (model / "configuration.py").write_text(CONFIGURATION)
    (model / f"{name}.py").write_text(CODE.format(line=line))


@pytest.mark.parametrize(
    "spoil",
    [
        cut("config.json"),
        cut("tokenizer.json"),
        cut("tokenizer_config.json"),
        cut("model.safetensors"),
        lambda model: (model / "model.safetensors").unlink(),
        other_shape,
    ],
    ids=["configuration", "tokenizer", "its configuration", "weights", "no weights", "other shape"],
)
def test_a_missing_or_malformed_file_is_bad_input(
    spoil: Callable[[Path], None], copied: TrialConfig, tmp_path: Path
) -> None:
    spoil(Path(copied.model_name_or_path))
    with pytest.raises(UserError) as caught:
        run_fit(copied, tmp_path / "trial")
    assert type(caught.value) is UserError
    assert str(caught.value).startswith(f"model_name_or_path: cannot load '{copied.model_name_or_path}' (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", [AutoTokenizer, AutoModelForCausalLM])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"), TimeoutError("timed out")],
    ids=["EIO", "ESTALE", "timeout"],
)
def test_a_disk_or_network_that_fails_is_the_machines(
    error: OSError, reader: Any, copied: TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(reader, "from_pretrained", failing)
    with pytest.raises(MachineError) as caught:
        run_fit(copied, tmp_path / "trial")
    reason = error.strerror or "timed out"
    assert str(caught.value) == f"model_name_or_path: cannot load '{copied.model_name_or_path}' ({reason})"


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("reader", [AutoModelForCausalLM, PeftModel])
def test_what_the_device_says_is_not_the_models_fault(
    reader: Any, error: RuntimeError, copied: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(reader, "from_pretrained", failing)
    with pytest.raises(RuntimeError) as caught:
        load_adapter(load_base(copied, load_tokenizer(copied), None)[0], Path("adapter"))
    assert caught.value is error


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_attention_whose_package_is_missing_is_refused_where_the_trials_run(
    copied: TrialConfig, tmp_path: Path
) -> None:
    config = copied.model_copy(update={"attn_implementation": "flash_attention_2"})
    line = "attn_implementation: flash_attention_2 needs the package flash-attn: pip install flash-attn"
    for start in (lambda: rehearse(config), lambda: run_fit(config, tmp_path / "trial")):
        with pytest.raises(UserError) as caught:
            start()
        assert str(caught.value) == line
    rehearse(config, here=False)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="nothing to hide")
def test_what_another_machine_has_of_packages_is_not_asked_here(
    copied: TrialConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else there(name))
    config = copied.model_copy(update={"quantization": "nf4"})
    rehearse(config, here=False)
    with pytest.raises(UserError, match=r"^quantization: needs the package bitsandbytes"):
        rehearse(config)


def test_remote_code_that_misses_a_package_is_refused_before_anything_is_started(
    copied: TrialConfig, tmp_path: Path
) -> None:
    remote(Path(copied.model_name_or_path), "import no_such_package", "misses_a_package")
    config = copied.model_copy(update={"trust_remote_code": True})
    for start in (lambda: rehearse(config), lambda: run_fit(config, tmp_path / "trial")):
        with pytest.raises(UserError) as caught:
            start()
        assert type(caught.value) is UserError
        assert str(caught.value).startswith(f"trust_remote_code: the code of '{config.model_name_or_path}' cannot be")
        assert "pip install no_such_package" in str(caught.value)


def test_remote_code_is_rehearsed_as_often_as_a_space_asks_for(copied: TrialConfig) -> None:
    remote(Path(copied.model_name_or_path), "", "twice")
    config = copied.model_copy(update={"trust_remote_code": True})
    assert rehearse(config) == rehearse(config)


def test_an_adapter_that_is_torn_or_of_another_model_is_one_line(
    tiny: Tiny, copied: TrialConfig, tmp_path: Path
) -> None:
    run_fit(copied.model_copy(update={"max_steps": 2, "eval_steps": 2}), tmp_path / "trial")
    adapter = TrialFolder(tmp_path / "trial").best_adapter()
    assert adapter is not None
    with pytest.raises(UserError, match=f"^{adapter}: is no adapter of this base model"):
        load_adapted(adapter, tiny.config("sequence-classification"))
    cut("adapter_model.safetensors")(adapter)
    with pytest.raises(UserError, match=f"^{adapter}: is no adapter of this base model"):
        load_adapted(adapter, copied)


def test_a_torn_checkpoint_is_named(tmp_path: Path) -> None:
    file = TrialFolder(tmp_path).checkpoint_at(1) / TENSORS
    file.parent.mkdir(parents=True)
    file.write_bytes(b"torn")
    model = torch.nn.Linear(1, 1)
    with pytest.raises(MachineError, match=f"^{file}: cannot be read"):
        load_checkpoint(TrialFolder(tmp_path), model, torch.optim.AdamW(model.parameters()))
