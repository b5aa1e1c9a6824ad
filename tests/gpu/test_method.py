"""The method on a GPU: its layers, its radius and its optimizer beside PEFT's, the paper's and torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_trials import METHODS
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import activate_both_by_peft, closure_of, randomize
from transformers import LlamaConfig, LlamaForCausalLM

from bilora_ray.method import (
    attach_auxiliary,
    auxiliary_factors,
    auxiliary_parameters,
    build_method,
    fuse,
    settings_of,
)

pytestmark = pytest.mark.gpu
SETTINGS = {
    "learning_rate": 1e-2,
    "auxiliary_learning_rate": None,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "rho": 0.05,
    "auxiliary_rank": 4,
}


def lora_model(device: str, dtype: torch.dtype) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A LoRA model with B1 = 0 and a batch, the same ones at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    base = LlamaForCausalLM(config).to(device, dtype)
    ids = torch.randint(512, (4, 64)).to(device)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora), {"input_ids": ids, "labels": ids}


def built(method: str, model: PeftModel, **settings: object) -> torch.optim.Optimizer:
    """The product's optimizer of a `method` for `model`, which gets what the method needs."""
    torch.manual_seed(1)
    model.train()
    return build_method(method, model, **{key: (SETTINGS | settings)[key] for key in settings_of(method)})


def outcome(model: PeftModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The logits, and the gradient of each trained parameter by name."""
    output = model(**batch)
    output.loss.backward()
    return {"logits": output.logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def both(method: str, dtype: torch.dtype, device: str) -> tuple[PeftModel, PeftModel, dict[str, torch.Tensor]]:
    """A model as the product computes it, the same one as PEFT does, and a batch."""
    model, batch = lora_model(device, dtype)
    stock = copy.deepcopy(model).train()
    built(method, model)
    randomize(model)
    if method == "bilora":
        stock = copy.deepcopy(model)
        activate_both_by_peft(stock)
    else:
        randomize(stock)
    return model, stock, batch


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_computes_what_pefts_does(method: str, device: str) -> None:
    model, stock, batch = both(method, torch.float32, device)
    ours, theirs = outcome(model, batch), outcome(stock, batch)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_in_bf16_is_as_near_to_fp32_as_pefts_under_autocast(method: str, device: str) -> None:
    model, stock, batch = both(method, torch.bfloat16, device)
    truth = outcome(copy.deepcopy(stock).float(), batch)
    ours = outcome(model, batch)
    # As the HF Trainer has it; else PEFT widens what its adapters read to fp32, and is slow.
    with torch.autocast(device, dtype=torch.bfloat16):
        theirs = outcome(stock, batch)
    assert {name: value.dtype for name, value in ours.items()} == {n: value.dtype for n, value in theirs.items()}
    off, theirs_off = (sum(_apart(found, truth).values()) for found in (ours, theirs))
    assert off <= 1.1 * theirs_off
    assert max(_apart(ours, truth).values()) <= 0.15


def _apart(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each tensor is from the true one, as a share of its length."""
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in truth.items()}


@pytest.mark.parametrize("products", ["highest", "high"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_perturbation_stays_within_its_radius(products: str, dtype: torch.dtype, device: str) -> None:
    model, batch = lora_model(device, dtype)
    optimizer = built("bilora", model, auxiliary_learning_rate=0.1)
    before = torch.get_float32_matmul_precision()
    # "high" is TF32, with which a trial in fp32 multiplies.
    torch.set_float32_matmul_precision(products)
    try:
        for _ in range(6):
            optimizer.step(closure_of(model, optimizer, batch))
            with torch.no_grad():
                squares = [(f.scaling * f.B.double() @ f.A.double()).square().sum() for f in auxiliary_factors(model)]
            c = float(sum(squares)) ** 0.5
            assert c <= SETTINGS["rho"] * (1 + 1e-6)
        assert c >= SETTINGS["rho"] * (1 - 1e-5)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("method", METHODS)
def test_the_optimizer_moves_as_torchs_adamw(method: str, device: str) -> None:
    model, batch = lora_model(device, torch.float64)
    twin = copy.deepcopy(model).train()
    optimizer = built(method, model)
    groups = [{"params": [p for p in twin.parameters() if p.requires_grad], "weight_decay": SETTINGS["weight_decay"]}]
    if method == "bilora":
        torch.manual_seed(1)
        attach_auxiliary(twin, SETTINGS["auxiliary_rank"])
        ascent = list(auxiliary_parameters(twin).values())
        groups.append({"params": ascent, "weight_decay": 0.0, "maximize": True})
    else:
        fuse(twin)
    adamw = torch.optim.AdamW(groups, lr=SETTINGS["learning_rate"])
    for _ in range(5):
        optimizer.step(closure_of(model, optimizer, batch))
        closure_of(twin, adamw, batch)()
        for group in adamw.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], SETTINGS["max_grad_norm"])
        adamw.step()
        if method == "bilora":
            project(twin)
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-8, atol=1e-12, msg=name)


@torch.no_grad()
def project(model: PeftModel) -> None:
    """Eq. 10 as it stands."""
    factors = auxiliary_factors(model)
    c = torch.stack([(f.scaling * f.B @ f.A).square().sum() for f in factors]).sum().sqrt()
    for layer in factors:
        for factor in (layer.A, layer.B):
            factor.mul_((SETTINGS["rho"] / c).sqrt().clamp(max=1.0))
