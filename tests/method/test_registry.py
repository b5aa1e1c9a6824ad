"""The table of methods: each has its word in the settings and its entry, and reads what is said to be of it."""

from typing import get_args

import pytest
from tiny import closure_of, primary_model

from bilora_ray.config import TrialConfig
from bilora_ray.facts import ADAPTING, METHOD_TITLES, MethodName
from bilora_ray.method import METHODS, LoraAdamW, build_method, settings_of
from bilora_ray.settings import applies
from bilora_ray.training import model as models

NEEDED = {"model_name_or_path": "m", "task": "causal-lm", "train_data": "d"}


def test_each_word_has_its_entry_and_each_entry_its_word():
    assert set(METHODS) == set(METHOD_TITLES) == set(get_args(MethodName))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_settings_that_apply_to_it(name):
    settings = settings_of(name)
    assert {"learning_rate"} <= set(settings) <= set(TrialConfig.model_fields)
    assert [setting for setting in settings if not applies(setting, name)] == []


def test_a_setting_of_some_methods_only_is_read_by_those():
    for setting in TrialConfig.model_fields:
        of = {name for name in METHODS if applies(setting, name)}
        if of not in (
            set(METHODS),
            set(ADAPTING),
        ):  # where there is an adapter, it is made before its method's optimizer
            assert {name for name in METHODS if setting in settings_of(name)} == of, setting


def test_the_settings_of_a_trial_reach_its_method():
    config = TrialConfig(**NEEDED, rho=0.3, auxiliary_rank=5, auxiliary_learning_rate=2e-3, max_grad_norm=None)
    model, _ = primary_model("llama")
    descent, ascent = models.build_optimizer(model, config, lambda _: None).param_groups
    assert (ascent["rho"], ascent["lr"], descent["lr"]) == (0.3, 2e-3, config.learning_rate)
    assert (descent["max_grad_norm"], ascent["max_grad_norm"]) == (None, None)
    assert ascent["params"][0].shape[0] == 5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("more", ["weight_decy", "rank"])
def test_a_setting_that_is_not_read_is_refused_before_anything_is_done(name, more):
    model, _ = primary_model("llama")
    before = [(key, type(module), vars(module).copy()) for key, module in model.named_modules()]
    hint = "did you mean 'weight_decay'" if more == "weight_decy" else ""
    placed = []
    with pytest.raises(TypeError, match=f"^method '{name}' does not read {more}; {hint}"):
        build_method(name, model, placed.append, **dict.fromkeys(settings_of(name), 0.1), **{more: 1})
    assert placed == []
    assert [(key, type(module), vars(module)) for key, module in model.named_modules()] == before


def test_a_new_method_is_one_entry(monkeypatch):
    def build(model, place, *, learning_rate, rho):
        place(model)
        return LoraAdamW(model, learning_rate=rho * learning_rate)

    monkeypatch.setitem(METHODS, "lora", build)
    model, batch = primary_model("llama")
    placed = []
    optimizer = build_method("lora", model, placed.append, learning_rate=1e-3, rho=0.5)
    assert placed == [model]
    assert optimizer.param_groups[0]["lr"] == 5e-4
    assert optimizer.step(closure_of(model.train(), optimizer, batch)) is not None
    model, _ = primary_model("llama")
    optimizer = models.build_optimizer(model, TrialConfig(**NEEDED, method="lora", rho=0.1), lambda _: None)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-5)
