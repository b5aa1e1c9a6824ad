"""A bf16 base: what is kept for the backward pass, what is rounded, and plain LoRA, which gets the same."""

import copy
import importlib.util
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from tiny import activate_both_by_peft, bilora_model, closure_of, primary_model, randomize

from benchmarks.saved_bytes import Kept
from bilora_ray.method import BiLoraAdamW, attach_auxiliary, auxiliary_factors, build_method, detach_auxiliary, fuse
from bilora_ray.method.layers import FusedLayer, PerturbedLayer, add_base, add_low_rank

SETTINGS = {"learning_rate": 1e-3, "weight_decay": 0.0, "max_grad_norm": None}
BF16 = torch.bfloat16


def fused_model(family, dtype=torch.float32, **config):
    """Plain LoRA as its method trains it, in training mode, with B1 != 0; and a batch."""
    model, batch = primary_model(family, dtype, **config)
    randomize(model)
    build_method("lora", model, **SETTINGS)
    return model.train(), batch


def as_peft_has_it(model):
    """A copy whose layers are PEFT's own."""
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, FusedLayer):
            layer.__class__ = layer.plain_class
    return plain


def losses_and_gradients(model, batch):
    torch.manual_seed(3)
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return [output.loss.detach(), output.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def kept_by(model, batch, autocast=False):
    with Kept(model) as kept, torch.autocast("cpu", dtype=BF16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    return kept.bytes()


@pytest.mark.parametrize("method", ["lora", "bilora"])
def test_a_bf16_base_keeps_less_than_fp32_adapters_and_no_more_than_autocast(method):
    model = bilora_model("llama", dtype=BF16)[0] if method == "bilora" else fused_model("llama", BF16)[0]
    stock = as_peft_has_it(model)
    if method == "bilora":
        stock = copy.deepcopy(model)
        activate_both_by_peft(stock)
    ids = torch.randint(3, 40, (8, 128))  # activations count, as they do in a large model
    batch = {"input_ids": ids, "labels": ids}
    ours, fp32_adapters, autocast = kept_by(model, batch), kept_by(stock, batch), kept_by(stock, batch, autocast=True)
    assert ours <= 0.68 * fp32_adapters
    assert ours <= autocast


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_layers_that_read_one_input_keep_it_once(dtype):
    """x (64 wide) and what is r wide, but nothing m wide: m is 256."""
    x = torch.randn(100, 64, dtype=dtype, requires_grad=True)
    base = torch.nn.ModuleDict({name: torch.nn.Linear(64, 256) for name in "qkv"}).to(dtype)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q", "k", "v"]))
    attach_auxiliary(model, 2)
    model.train()
    with Kept(model) as kept:
        total = sum(model.base_model.model[name](x) for name in "qkv")
    total.sum().backward()
    sizes = sorted((storage.nbytes() // x.element_size() for storage in kept.storages.values()), reverse=True)
    assert sizes[0] == x.numel()
    assert sum(size == sizes[0] for size in sizes) == 1
    assert sizes[1] <= 4 * 256  # B of both, cast
    assert set(kept.dtypes.values()) == {dtype}


def test_a_term_too_small_for_the_bases_rounding_arrives():
    torch.manual_seed(0)
    x, weight = torch.randn(4000, 64, dtype=BF16), torch.randn(32, 64).to(BF16)
    hidden, B = torch.randn(4000, 1, dtype=BF16), torch.full((32, 1), 1e-3)  # 1e-4 of the output
    before = add_base(x, weight, None, hidden, torch.zeros_like(B)).double()
    moved = add_base(x, weight, None, hidden, B).double() - before
    asked = hidden.double() @ B.T.double()
    assert float((moved * asked).sum() / asked.square().sum()) == pytest.approx(1.0, abs=0.1)
    output = torch.nn.functional.linear(x, weight)
    lost = add_low_rank(output, hidden, torch.ones(1, 1), B, 1.0).double() - output.double()
    assert abs(float((lost * asked).sum() / asked.square().sum())) < 0.5


@pytest.mark.parametrize("bias", [False, True])
def test_base_and_adapters_are_rounded_as_one_sum(bias):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 40, 64, dtype=BF16), torch.randn(96, 64).to(BF16)
    hidden, B = torch.randn(5, 40, 4, dtype=BF16), torch.randn(96, 4).to(BF16) / 100
    added = torch.randn(96).to(BF16) if bias else None
    exact = x.double() @ weight.T.double() + hidden.double() @ B.T.double() + (added.double() if bias else 0)
    ours = add_base(x, weight, added, hidden, B)
    assert ours.shape == (5, 40, 96)
    rounding = (exact.to(BF16).double() - exact).norm()
    assert (ours.double() - exact).norm() < (1.1 if bias else 1.02) * rounding


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2", "mlp"])
def test_plain_lora_is_pefts_to_the_bit_in_fp32(family):
    model, batch = fused_model(family)
    assert any(isinstance(layer, FusedLayer) for layer in model.modules())
    for ours, theirs in zip(
        losses_and_gradients(model, batch), losses_and_gradients(as_peft_has_it(model), batch), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("config", [{"lora_alpha": 12}, {"use_rslora": True}, {"lora_dropout": 0.4}], ids=str)
def test_plain_lora_is_pefts_for_every_scaling_and_dropout(config):
    model, batch = fused_model("llama", torch.float64, **config)
    for ours, theirs in zip(
        losses_and_gradients(model, batch), losses_and_gradients(as_peft_has_it(model), batch), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_fused_stays_pefts():
    model, batch = fused_model("llama", use_dora=True)
    assert torch.equal(model(**batch).logits, as_peft_has_it(model)(**batch).logits)
    model, batch = fused_model("llama", BF16)
    plain = as_peft_has_it(model)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_a_hook_on_a_base_layer_sees_what_it_computes():
    model, batch = fused_model("llama", BF16)
    *_, layer = (module for module in model.modules() if isinstance(module, FusedLayer))
    seen = []
    hook = layer.base_layer.register_forward_hook(lambda *call: seen.append(call))
    own = layer.base_layer.forward
    layer.base_layer.forward = lambda x: (seen.append(x), own(x))[1]  # as accelerate puts it there
    model(**batch)
    assert len(seen) == 2
    hook.remove()
    model(**batch)
    assert len(seen) == 3


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_fused_model_is_copied_pickled_merged_and_given_an_auxiliary(dtype, tmp_path):
    model, batch = fused_model("llama", dtype)
    model.eval()
    logits = model(**batch).logits
    assert torch.equal(copy.deepcopy(model)(**batch).logits, logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits, logits)  # noqa: S301 # our own bytes
    model.save_pretrained(tmp_path)
    served = PeftModel.from_pretrained(primary_model("llama", dtype)[0].unload(), tmp_path).eval()
    assert torch.equal(fuse(served)(**batch).logits, logits)
    attach_auxiliary(model, 3)
    assert {type(layer).__name__ for layer in model.modules() if isinstance(layer, FusedLayer)} == {"PerturbedLinear"}
    assert torch.equal(model.eval()(**batch).logits, logits)
    detach_auxiliary(model)
    assert {type(layer) for layer in model.modules() if isinstance(layer, lora.Linear)} == {lora.Linear}
    merged = fuse(model).merge_and_unload()
    assert not any(isinstance(layer, FusedLayer) for layer in merged.modules())
    torch.testing.assert_close(merged(**batch).logits, logits, rtol=0, atol=5e-6 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_with_a_bf16_base_the_norm_is_at_most_rho_and_all_that_is_trained_is_fp32(rho):
    model, batch = bilora_model("llama", dtype=BF16)
    optimizer = BiLoraAdamW(model, learning_rate=1e-2, rho=rho)
    for _ in range(5):
        optimizer.step(closure_of(model, optimizer, batch))
        squares = [(s * B.double() @ A.double()).square().sum() for A, B, s in auxiliary_factors(model)]
        assert torch.stack(squares).sum().sqrt() <= rho * (1 + 1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert {tensor.dtype for tensor in (*trained, *(p.grad for p in trained), *moments)} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "bilora"])
def test_a_block_is_one_graph(method):
    model = bilora_model("llama", dtype=BF16)[0] if method == "bilora" else fused_model("llama", BF16)[0]
    randomize(model, 0.01)
    block = model.get_base_model().model.layers[0]
    x = torch.randn(2, 7, 32, dtype=BF16)
    positions = model.get_base_model().model.rotary_emb(x, torch.arange(7)[None])
    trained = [p for p in block.parameters() if p.requires_grad]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    ours, eager = (run(x, position_embeddings=positions) for run in (compiled, block))
    assert torch.equal(ours, eager)
    for got, expected in zip(*(torch.autograd.grad(y.float().sum(), trained) for y in (ours, eager)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("method", ["lora", "bilora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_keep_nothing_in_fp32(bits, method):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    if bits == 4:
        base = torch.nn.Sequential(bnb.nn.Linear4bit(64, 256, compute_dtype=BF16, quant_type="nf4"))
        base.is_loaded_in_4bit = True
    else:
        base = torch.nn.Sequential(bnb.nn.Linear8bitLt(64, 256, has_fp16_weights=False))
        base.is_loaded_in_8bit = True
    model = get_peft_model(base.to("cpu"), LoraConfig(r=2, target_modules=["0"]))
    randomize(model)
    if method == "bilora":
        attach_auxiliary(model, 2)
        randomize(model)
    else:
        fuse(model)
    x = torch.randn(100, 64, dtype=BF16, requires_grad=True)
    with Kept(model) as kept:
        output = model.train()(x)
    assert output.dtype == BF16
    assert set(kept.dtypes.values()) == {BF16}
    assert max(storage.nbytes() for storage in kept.storages.values()) <= x.nbytes
    reference = copy.deepcopy(model)
    if method == "bilora":
        activate_both_by_peft(reference)
    else:
        reference = as_peft_has_it(model)
    assert (output - reference(x)).norm() < 0.01 * output.norm()
    assert isinstance(model.base_model.model[0], PerturbedLayer if method == "bilora" else FusedLayer)
