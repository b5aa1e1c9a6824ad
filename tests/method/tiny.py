"""Tiny random models of each family with one batch, and how the tests put adapters on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from bilora_ray.method import attach_auxiliary
from bilora_ray.method.layers import AUXILIARY, PRIMARY, PerturbedLayer

Batch = dict[str, Tensor]
VOCABULARY = 40


class Output:
    """What a model of transformers returns, as far as the tests read it."""

    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.loss = loss
        self.logits = logits


class Mlp(nn.Module):
    """Three linear layers of different shapes, the middle one without bias, and a squared loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, y: Tensor) -> Output:
        logits = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return Output((logits - y).square().mean(), logits)


def mlp() -> tuple[nn.Module, Batch]:
    return Mlp(), {"x": torch.randn(9, 12), "y": torch.randn(9, 5)}


def llama() -> tuple[nn.Module, Batch]:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    ids = _ids(3, 7)
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def gpt2() -> tuple[nn.Module, Batch]:
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    ids = _ids(3, 7)
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def t5() -> tuple[nn.Module, Batch]:
    config = T5Config(
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config), {"input_ids": _ids(3, 7), "labels": _ids(3, 4)}


def bert() -> tuple[nn.Module, Batch]:
    config = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config), {"input_ids": _ids(4, 7), "labels": torch.tensor([0, 1, 2, 1])}


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "bert": bert,
    "mlp": mlp,
}
TASK_TYPE = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "mlp": None}


def primary_model(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[PeftModel, Batch]:
    """A LoRA model of rank 4 on every linear layer, B1 = 0, and a batch; the same ones at every call."""
    torch.manual_seed(0)
    base, batch = FAMILIES[family]()
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    targets = ["first", "second", "head"] if family == "mlp" else "all-linear"
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": TASK_TYPE[family], **config}
    return get_peft_model(base.to(dtype), LoraConfig(**settings)), batch


def whole_model(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Batch]:
    """The same base without an adapter, which full fine-tuning trains, and the same batch."""
    torch.manual_seed(0)
    base, batch = FAMILIES[family]()
    return base.to(dtype), {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()
    }


def model_of(method: str, family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Batch]:
    """What `method` trains, and a batch."""
    return whole_model(family, dtype) if method == "full" else primary_model(family, dtype)


def bilora_model(
    family: str, rank: int = 3, dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[PeftModel, Batch]:
    """`primary_model` with an auxiliary, B2 = 0, in training mode."""
    model, batch = primary_model(family, dtype, **config)
    attach_auxiliary(model, rank)
    return model.train(), batch


def norm_in_float64(model: nn.Module) -> None:
    """transformers normalises in fp32 whatever the model is in: a direction of length 1 would show that."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        scale: Tensor = (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * hidden * scale

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm | T5LayerNorm):
            module.forward = MethodType(forward, module)


def randomize(model: PeftModel, size: float = 0.3) -> None:
    """Make B1 and B2 random, so that both adapters count."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(values * size)


def own_loss(output: Any, batch: Batch) -> Tensor:
    """The loss that the model computes by itself."""
    return output.loss


class closure_of:
    """The loss of `batch` with its gradient, as a training loop gives it to `step`. All rows weigh alike."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        loss_of: Callable[[Any, Batch], Tensor] = own_loss,
    ) -> None:
        self.model, self.optimizer, self.batch, self.loss_of = model, optimizer, batch, loss_of

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss_of(self.model(**self.batch), self.batch)
        loss.backward()
        return loss

    def by_row(self, rows: Sequence[int] | None = None, gradient: bool = True) -> Tensor:
        chosen = range(len(rows_of(self.batch))) if rows is None else rows
        if gradient:
            self.optimizer.zero_grad()
        parts = []
        for row in chosen:
            one = rows_of(self.batch)[row]
            with torch.set_grad_enabled(gradient):
                loss = self.loss_of(self.model(**one), one) / len(chosen)
            if gradient:
                loss.backward()
            parts.append(loss.detach())
        return torch.stack(parts)


def rows_of(batch: Batch) -> list[Batch]:
    """Each row as a batch of its own."""
    count = len(next(iter(batch.values())))
    return [{key: tensor[row : row + 1] for key, tensor in batch.items()} for row in range(count)]


def activate_both_by_peft(model: PeftModel) -> None:
    """Turn the perturbed layers into PEFT's own with both adapters active: PEFT's reading of Eq. 7."""
    for layer in model.modules():
        if isinstance(layer, PerturbedLayer):
            layer.__class__ = layer.plain_class
            layer.set_adapter([PRIMARY, AUXILIARY])


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))
