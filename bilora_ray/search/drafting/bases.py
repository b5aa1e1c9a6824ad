"""The base model of a draft: which one where none is named, how large it is, and where its learning rates are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.paths import kind_of
from bilora_ray.search.drafting.firsts import BUILT_IN, FIRSTS
from bilora_ray.search.drafting.roles import Writes
from bilora_ray.search.preflight import check_model, described

# Parameters at the most -> the least and the greatest learning rate, and the one to begin with, as a person writes
# them. Those of the shipped spaces.
RATES = (
    (20e6, ("1e-3", "1e-2", "4e-3")),
    (500e6, ("1e-4", "3e-3", "5e-4")),
    (10e9, ("5e-5", "1e-3", "3e-4")),
    (float("inf"), ("1e-5", "5e-4", "5e-5")),
)
MIDDLE = ("5e-5", "1e-3", "3e-4")
SIZE_IN_NAME = re.compile(r"(?<![a-z0-9])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        name: as in a space file.
        why: it is this one; empty where it was named.
        missing: why it cannot be looked at from here; None if it can.
        parameters: about how many, by its shape or its name; None: not known.
        writes: the task in which it writes text, or "nothing"; None: not known.
    """

    name: str
    why: str
    missing: str | None
    parameters: float | None
    writes: Writes | None

    @property
    def rates(self) -> tuple[str, str, str]:
        """The least and the greatest learning rate to search, and the one to begin with."""
        if self.parameters is None:
            return MIDDLE
        return next(rates for most, rates in RATES if self.parameters <= most)


def base_of(name: str, task: Task, why: str = "") -> Base:
    """What is known of the model `name`.

    Raises:
        UserError: it is a folder of this machine, and holds no model.
    """
    config = TrialConfig(model_name_or_path=name, task=task, train_data="-")
    missing = None
    try:
        check_model(config)
    except UserError as error:
        if kind_of(name, is_data=False) != "hub":
            raise
        missing = str(error).partition(": ")[2]
    model = {} if missing else described(config)
    return Base(name, why, missing, _parameters(model) or _in_name(name), _writes(model))


def default_base(task: Task, gpus: int) -> Base:
    """The model for a first search where none was named.

    Raises:
        UserError: there is none for the task without the Hub, which does not answer.
    """
    first = FIRSTS[task]
    name = first.on_gpu if gpus else first.on_cpu
    if name == BUILT_IN:
        why = "there is no GPU here, and it is small; it knows arithmetic word problems only: --model names another"
        return base_of(name, task, why)
    base = base_of(name, task, "a common base for this task; --model names another")
    if base.missing is None:
        return base
    if first.without_hub is None:
        raise UserError(f"--model: is needed for {task}, for the Hub, where '{name}' is, cannot be reached from here")
    why = f"it is small and knows arithmetic only, and the Hub with '{name}' does not answer: --model names another"
    return base_of(first.without_hub, task, why)


def _parameters(model: Mapping[str, Any]) -> float | None:
    """About how many a transformer of this shape has."""

    def first(*keys: str) -> Any:
        return next((model[key] for key in keys if isinstance(model.get(key), int)), None)

    hidden, layers = (
        first("hidden_size", "d_model", "n_embd", "dim"),
        first("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    )
    if hidden is None or layers is None:
        return None
    inner = first("intermediate_size", "d_ff", "n_inner", "hidden_dim") or 4 * hidden
    stacks = 2 if model.get("is_encoder_decoder") else 1
    return float(stacks * layers * (4 * hidden**2 + 3 * hidden * inner) + (first("vocab_size") or 0) * hidden)


def _in_name(name: str) -> float | None:
    found = SIZE_IN_NAME.search(name)
    return float(found[1]) * (1e9 if found[2].lower() == "b" else 1e6) if found else None


def _writes(model: Mapping[str, Any]) -> Writes | None:
    kinds = [str(name) for name in model.get("architectures") or ()]
    if not kinds:
        return None
    if not any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in kinds):
        return "nothing"
    return "seq2seq-lm" if model.get("is_encoder_decoder") else "causal-lm"


def in_words(parameters: float) -> str:
    """A number of them, for people."""
    unit, word = next(one for one in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")) if parameters >= one[0])
    return f"{parameters / unit:.{int(parameters < 10 * unit)}f} {word}"
