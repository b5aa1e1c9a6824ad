"""Logits are computed of targets only and without a mask, and the loss is what transformers makes of all positions."""

from __future__ import annotations

from array import array
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import DECODERS, SEQ2SEQS, build, has
from peft import LoraConfig, get_peft_model
from tiny_trials import Tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from bilora_ray.measures import Task
from bilora_ray.training.compute.targets import POSITIONS, decoder_inputs, is_plain, without_targets
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run
from bilora_ray.training.metrics import IGNORED, LossSum
from bilora_ray.training.model import AUTO_CLASS
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Example

FIRST = ("llama", "gpt2", "mixtral", "t5", "m2m_100")
# One sees what comes, and one has a cache that fails in a pass: both are refused as decoders.
REFUSED = ("xlnet", "recurrent_gemma")
FAMILIES: list[tuple[Task, str]] = [("causal-lm", family) for family in DECODERS if family not in REFUSED]
FAMILIES += [("seq2seq-lm", family) for family in SEQ2SEQS]
CASES = [
    pytest.param(task, family, marks=() if family in FIRST else pytest.mark.slow)
    for task, family in FAMILIES
    if has(task, family)
]
# The one whose loss is of more than the next token.
OTHERWISE = {"prophetnet"}
LENGTHS = ((40, 9), (17, 30), (9, 4), (33, 21), (25, 12), (5, 3))
READS = frozenset({"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"})


class Reads(TorchDispatchMode):
    """Counts what reads a number of a tensor: on a GPU each is a wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def made(tiny: Tiny, task: Task, family: str, folder: Path, **settings: Any) -> Any:
    """A model of `family` in training mode and without dropout, which has many names in configs and modules."""
    model = AUTO_CLASS[task].from_pretrained(build(task, family, tiny, folder, **settings))
    for module in model.modules():
        for owner in (module, getattr(module, "config", module)):
            for key, value in list(vars(owner).items()):
                if "drop" in key and isinstance(value, float):
                    setattr(owner, key, 0.0)
                if "jitter" in key:  # what a router adds to its input by chance
                    setattr(owner, key, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def made_up(task: Task, model: Any) -> dict[str, Tensor]:
    """A batch of rows of very different lengths, the ends of which are learned."""
    random, examples = Random(0), []
    for read, written in LENGTHS:
        ids = random.choices(range(5, 200), k=read)
        learned = random.choices(range(5, 200), k=written) if task == "seq2seq-lm" else ids[:]
        if task == "causal-lm":
            learned[: read // 3] = [IGNORED] * (read // 3)
        examples.append(Example(array("i", ids), array("i", learned)))
    tokenizer: Any = SimpleNamespace(pad_token_id=model.config.pad_token_id)
    return TASKS[task].collate(examples, tokenizer)


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def by_all_positions(task: Task, logits: Tensor, labels: Tensor) -> LossSum:
    """What an evaluation measured of logits of all positions."""
    found = LossSum()
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    found.add(logits, labels)
    return found


@pytest.mark.parametrize(("task", "family"), CASES)
def test_the_loss_is_that_of_all_positions(task: Task, family: str, tiny: Tiny, tmp_path: Path) -> None:
    model = made(tiny, task, family, tmp_path)
    batch = made_up(task, model)
    before = model(**without_targets(batch))
    now = TASKS[task].loss(model, batch)
    assert (is_plain(model) if task == "causal-lm" else decoder_inputs(model) is not None) is (family not in OTHERWISE)
    assert now.item() == before.loss.item()
    expected = gradient(before.loss, model)
    assert (gradient(now, model) - expected).norm() <= 6e-7 * expected.norm()
    model.eval()
    with torch.no_grad():
        measured = TASKS[task].measure(*TASKS[task].forward(model, batch))
        assert measured == by_all_positions(task, model(**without_targets(batch)).logits, batch["labels"])


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_targets_alone_reach_the_head(task: Task, gradient_checkpointing: bool, tiny: Tiny, tmp_path: Path) -> None:
    seen: list[int] = []
    config = tiny.config(task, max_steps=2, eval_steps=2, gradient_checkpointing=gradient_checkpointing)
    run = Run(config, TrialFolder(tmp_path))
    head = run.model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[:-1].numel()))
    rows = run._next_rows()
    run.train_step()
    assert sum(seen) == run.task.target_count(rows)
    seen.clear()
    run.evaluate()
    assert sum(seen) == run.task.target_count(run.data.validation)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_pass_over_padded_rows_reads_no_number(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model = made(tiny, "causal-lm", family, tmp_path)
    batch = made_up("causal-lm", model)
    with Reads() as reads:
        TASKS["causal-lm"].loss(model, batch)
    assert reads.found == []
    if family == "llama":  # the test can fail: with a mask transformers looks at it
        with Reads() as reads:
            model(**without_targets(batch))
        assert reads.found


@pytest.mark.parametrize("trained", [["q_proj", "lm_head"], ["lm_head"]])
def test_a_head_with_an_adapter(trained: list[str], tiny: Tiny, tmp_path: Path) -> None:
    base = made(tiny, "causal-lm", "llama", tmp_path)
    model: Any = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=trained, init_lora_weights=False)
    )
    batch = made_up("causal-lm", model)
    before = model(**without_targets(batch)).loss
    now = TASKS["causal-lm"].loss(model, batch)
    assert now.item() == before.item()
    expected = gradient(before, model)
    assert (gradient(now, model) - expected).norm() <= 6e-7 * expected.norm()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_balance_of_routers_stays_in_the_loss(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model = made(tiny, "causal-lm", family, tmp_path, output_router_logits=True, router_aux_loss_coef=0.5)
    batch = made_up("causal-lm", model)
    before = model(**without_targets(batch))
    assert not is_plain(model)
    assert TASKS["causal-lm"].loss(model, batch).item() == before.loss.item()
    model.config.output_router_logits = False
    assert TASKS["causal-lm"].loss(model, batch).item() != before.loss.item()


def test_a_models_own_code_is_used_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    class Own(LlamaForCausalLM):
        """As from a file beside the weights."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
            assert attention_mask.shape == input_ids.shape
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            output.loss = None if labels is None else output.loss * 2
            return output

    model = Own.from_pretrained(build("causal-lm", "llama", tiny, tmp_path)).train()
    batch = made_up("causal-lm", model)
    assert TASKS["causal-lm"].loss(model, batch).item() == model(**without_targets(batch)).loss.item()
    logits, targets = TASKS["causal-lm"].forward(model, batch)
    assert logits.shape[:-1] == targets.shape == batch[POSITIONS].shape
