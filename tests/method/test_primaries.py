"""Primaries besides plain LoRA: what each begins as, and where the auxiliary perturbs beside it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from test_optimizer import of, train
from tiny import TASK_TYPE, Batch, Mlp, bilora_model, closure_of, primary_model
from torch import Tensor

from bilora_ray.facts import ADAPTING
from bilora_ray.method import (
    BiLoraAdamW,
    MethodAdamW,
    auxiliary_parameters,
    build_method,
    export_primary,
    primary_parameters,
)
from bilora_ray.method.noise import WeightNoise
from bilora_ray.method.primaries import (
    DIRECTIONS,
    await_start,
    begin,
    gradient_starts,
    keep_start,
    principal_starts,
    starts,
    weight_in_rows,
    with_exact_magnitudes,
)
from bilora_ray.method.spaces import FullSpace, Pass

KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
STARTS = ("pissa", "lora-ga")


def begun(model: PeftModel, batch: Batch, kind: str, name: str = "lora", **settings: object) -> MethodAdamW:
    """The optimizer of method `name` for a model with a new primary, which begins as `kind` says."""
    if kind in STARTS:
        await_start(model, DIRECTIONS[kind])
    optimizer = build_method(name, model, **{**of(name), **settings})
    if kind == "pissa":
        begin(model, principal_starts(model))
    if kind == "lora-ga":
        rows = [Pass(lambda: model(**batch).loss, 1, len(next(iter(batch.values()))))]
        begin(model, gradient_starts(model, FullSpace(model).gradient(rows)))
    keep_start(model)
    return optimizer


def layers_of(model: PeftModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def weights_of(model: PeftModel) -> list[Tensor]:
    """The weight that each layer computes with in its mode, n x m, by what it makes of single inputs."""
    found = []
    for layer in layers_of(model):
        x = torch.eye(layer.in_features, dtype=weight_in_rows(layer).dtype)
        found.append((layer(x) - layer(torch.zeros_like(x))).detach())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["mlp", "gpt2"])
def test_rho_is_of_what_is_added_to_the_weight_whatever_the_primary_is(kind: str, family: str) -> None:
    model, batch = bilora_model(family, dtype=torch.float64, **KINDS[kind])
    optimizer = BiLoraAdamW(model, learning_rate=1e-2, rho=0.05, max_grad_norm=None)
    for _ in range(4):
        optimizer.step(closure_of(model.train(), optimizer, batch))
    perturbed = weights_of(model.train())
    changes = [there - here for there, here in zip(perturbed, weights_of(model.eval()), strict=True)]
    norm = torch.stack([change.norm() for change in changes]).norm()
    torch.testing.assert_close(norm, optimizer.auxiliary_norm, rtol=1e-9, atol=0)
    torch.testing.assert_close(norm, norm.new_tensor(0.05), rtol=1e-9, atol=0)


def test_rslora_scales_by_the_root_of_the_rank_and_its_auxiliary_does_not() -> None:
    model, _ = bilora_model("mlp", dtype=torch.float64, use_rslora=True)  # rank 4, lora_alpha 8
    assert {layer.scaling["default"] for layer in layers_of(model)} == {8 / 4**0.5}
    assert {layer.scaling["auxiliary"] for layer in layers_of(model)} == {2.0}


def test_rows_of_a_dora_are_as_long_as_its_magnitudes_while_it_learns() -> None:
    model, batch = primary_model("mlp", torch.float64, use_dora=True)
    train(model, build_method("lora", model, **of("lora")), batch, 5)
    for layer, weight in zip(layers_of(model), weights_of(model.eval()), strict=True):
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert not torch.equal(magnitude, weight_in_rows(layer).norm(dim=1))  # it is descended on
        torch.testing.assert_close(weight.norm(dim=0), magnitude, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", [family for family in TASK_TYPE if family != "mlp"])
def test_a_dora_begins_as_its_base_on_bf16_too(family: str) -> None:
    logits = []
    for exact in (False, True):
        model, batch = primary_model(family, torch.bfloat16, use_dora=True)
        if exact:
            assert with_exact_magnitudes(model) is model
        with torch.no_grad():
            logits.append(model.eval()(**batch).logits.float())
    with model.disable_adapter(), torch.no_grad():
        expected = model(**batch).logits.float()
    pefts, ours = ((one - expected).norm() / expected.norm() for one in logits)
    assert ours < 2e-3 < pefts or ours == 0
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("magnitude" in name for name in trained) == len(layers_of(model))


@pytest.mark.parametrize("kind", [*KINDS, *STARTS])
@pytest.mark.parametrize("name", ADAPTING)
def test_every_method_learns_with_every_primary_that_it_takes(name: str, kind: str) -> None:
    if kind == "dora" and name in ("flat-lora", "rwp"):
        pytest.skip("refused: see test_noise")
    model, batch = primary_model("llama", **KINDS.get(kind, {}))
    optimizer = begun(model, batch, kind, name, learning_rate=1e-3)
    optimizer.total_steps = 15
    losses = train(model, optimizer, batch, 15)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["lora", "bilora", "lora-sam"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pissa_is_pefts_own(name: str, family: str) -> None:
    ours, batch = primary_model(family)
    optimizer = begun(ours, batch, "pissa", name)
    theirs, _ = primary_model(family, init_lora_weights="pissa")
    other = begun(theirs, batch, "none", name)
    for (key, one), two in zip(primary_parameters(ours).items(), primary_parameters(theirs).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=key)
    torch.manual_seed(0)
    for model in (ours, theirs):
        for number, (_, parameter) in enumerate(auxiliary_parameters(model).items()):
            torch.nn.init.normal_(parameter, std=0.01, generator=torch.Generator().manual_seed(number))
    one, two = (train(model, own, batch, 8) for model, own in ((ours, optimizer), (theirs, other)))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-4, atol=0)
    with torch.no_grad():
        logits = [model.eval()(**batch).logits for model in (ours, theirs)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-4)


def test_lora_ga_begins_with_the_singular_vectors_of_the_gradient_as_long_as_its_authors_have_them() -> None:
    model, batch = primary_model("mlp", torch.float64, r=2)
    begun(model, batch, "lora-ga")
    found = iter(starts(model).values())
    plain = mlp_gradients(batch)
    for gradient in plain:
        A, B = next(found), next(found)
        U, _, Vh = torch.linalg.svd(gradient)
        size = gradient.shape[0] ** 0.25 / 16**0.5
        torch.testing.assert_close((A @ Vh[:2].T).abs(), size * torch.eye(2, dtype=A.dtype), rtol=0, atol=1e-6)
        torch.testing.assert_close((U[:, 2:4].T @ B).abs(), size * torch.eye(2, dtype=A.dtype), rtol=0, atol=1e-6)


def mlp_gradients(batch: Batch) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    plain = Mlp().double()
    return torch.autograd.grad(plain(**batch).loss, [plain.first.weight, plain.second.weight, plain.head.weight])


@pytest.mark.parametrize("kind", STARTS)
def test_what_is_exported_computes_the_same_in_plain_peft_on_the_base(kind: str, tmp_path: Path) -> None:
    model, batch = primary_model("mlp", torch.float64, r=2)
    train(model, begun(model, batch, kind, "bilora"), batch, 5)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    export_primary(model, tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mlp().double(), str(tmp_path), autocast_adapter_dtype=False).double()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, expected, rtol=0, atol=1e-12)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 # its own
        with torch.no_grad():
            assert torch.equal(other.eval()(**batch).logits, expected)


def test_noise_is_as_large_as_rows_of_the_merged_weight_where_the_primary_has_a_start() -> None:
    model, batch = primary_model("mlp", torch.float64, r=2)
    optimizer = begun(model, batch, "pissa", "rwp")
    train(model, optimizer, batch, 3)
    noise = optimizer._noise
    assert isinstance(noise, WeightNoise)
    for (_, norms), weight in zip(noise._norms(), weights_of(model.eval()), strict=True):
        torch.testing.assert_close(norms, weight.norm(dim=0), rtol=1e-9, atol=0)


def test_sharpness_is_measured_around_the_merged_weight_where_the_primary_has_a_start() -> None:
    model, batch = primary_model("mlp", torch.float64, r=2)
    train(model, begun(model, batch, "pissa"), batch, 3)
    for norms, weight in zip(FullSpace(model).filter_norms(), weights_of(model.eval()), strict=True):
        torch.testing.assert_close(norms.squeeze(1), weight.norm(dim=0), rtol=1e-9, atol=0)


def test_a_start_is_refused_where_it_cannot_be_and_is_left_out_by_nobody() -> None:
    model, batch = primary_model("mlp", r=4)  # the last layer has five outputs
    with pytest.raises(ValueError, match=r"more singular vectors than there are of head"):
        await_start(model, 2)
    model, batch = primary_model("llama", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match=r"unquantised linear layers, not on .*embed_tokens"):
        await_start(model, 1)
    model, batch = primary_model("llama")
    begun(model, batch, "pissa")
    with pytest.raises(ValueError, match="export_primary"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="export_primary"):
        model.eval()(**batch, adapter_names=["default"] * 3)
