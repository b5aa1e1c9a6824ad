"""The extreme trials of a space, and what a trial between them takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.search.space import Choice, Distribution, Range, Space, Value, setting_of
from bilora_ray.settings import FACTS, is_integer

# Of the settings that decide the training, those that decide what a step of it takes too.
COUNTED_IN_TRAINING = frozenset(
    {
        *("method", "primary", "rank", "auxiliary_rank", "looksam_every", "esam_gamma", "rwp_space"),
        *("target_modules", "lora_dropout", "gradient_checkpointing"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    }
)
# What decides how many steps there are, or which, and nothing of what one takes.
BESIDE_A_STEP = frozenset({"num_train_epochs", "max_steps", "max_train_samples", "seed", "split_seed"})
# Of which more costs less: so many steps share one second pass.
SHARED_BY = frozenset({"looksam_every"})
# More kinds of trials than these are not all tried with each other: each choice is tried with the first of the others.
MOST_KINDS = 8


@dataclass(frozen=True)
class Kind:
    """Trials that have the same of all that is no number: the cheapest of them, and the dearest.

    Attributes:
        chosen: what they have.
        low: the settings of the cheapest, as they are sampled.
        high: of the dearest.
    """

    chosen: Mapping[str, Value]
    low: dict[str, Value]
    high: dict[str, Value]


def kinds(space: Space) -> list[Kind]:
    """The kinds of trials of `space`. What decides neither time nor memory is in the middle of its range."""
    choices = {key: tuple(one.ends()) for key, one in space.distributions.items() if _is_kind(key, one)}
    combined = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    if len(combined) > MOST_KINDS:
        first = {key: values[0] for key, values in choices.items()}
        combined = [first, *({**first, key: one} for key, values in choices.items() for one in values[1:])]
    found: dict[str, Kind] = {}
    for chosen in combined:
        low, high = (_end(space, chosen, low) for low in (True, False))
        # Of what a condition leaves out, all values are the same trial.
        asked = {name: value for name, value in chosen.items() if name in low or name in high}
        found.setdefault(repr((low, high)), Kind(asked, low, high))
    return list(found.values())


def position(space: Space, config: TrialConfig) -> float:
    """Where a trial's step is between the cheapest of its kind, 0, and the dearest, 1: the mean over its settings."""
    places = [
        _place(key, distribution, getattr(config, setting_of(key)))
        for key, distribution in space.distributions.items()
        if counts(key) and setting_of(key) not in BESIDE_A_STEP and not _is_kind(key, distribution)
        if space.asked(key, config.model_dump())
    ]
    return sum(places) / len(places) if places else 0.0


def kind_of(all_kinds: Sequence[Kind], config: TrialConfig) -> Kind:
    """The kind that a trial is of; where not all are tried, the one that it has the most in common with."""
    return max(
        all_kinds, key=lambda kind: sum(getattr(config, setting_of(key)) == value for key, value in kind.chosen.items())
    )


def counts(setting: str) -> bool:
    """Whether a setting decides what a trial takes."""
    return FACTS[setting_of(setting)].decides != "training" or setting_of(setting) in COUNTED_IN_TRAINING


def _is_kind(key: str, distribution: Distribution) -> bool:
    return counts(key) and isinstance(distribution, Choice) and not all(map(_is_number, distribution.choice))


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _end(space: Space, chosen: Mapping[str, Value], low: bool) -> dict[str, Value]:
    """What the cheapest trial of a kind samples, or the dearest."""
    sampled: dict[str, Value] = {}
    for key, distribution in space.distributions.items():
        if space.asked(key, sampled):
            sampled[key] = chosen[key] if key in chosen else _value(key, distribution, low)
    return sampled


def _value(key: str, distribution: Distribution, low: bool) -> Value:
    if not counts(key):
        return _middle(key, distribution)
    ends: list[Any] = sorted(_ends(distribution), key=lambda value: _weight(key, value))
    end = ends[0] if low else ends[-1]
    return _whole(key, end) if isinstance(distribution, Range) else end


def _middle(key: str, distribution: Distribution) -> Value:
    if isinstance(distribution, Choice):
        return distribution.choice[len(distribution.choice) // 2]
    low, high = distribution.low, distribution.high
    if distribution.step is not None:
        return _whole(key, low + distribution.step * (round((high - low) / distribution.step) // 2))
    return _whole(key, math.sqrt(low * high) if distribution.log else (low + high) / 2)


def _whole(key: str, value: float) -> Value:
    return round(value) if is_integer(setting_of(key)) else value


def _ends(distribution: Distribution) -> list[Any]:
    return list(distribution.choice) if isinstance(distribution, Choice) else [distribution.low, distribution.high]


def _weight(key: str, value: Any) -> float:
    """What the cost of a trial goes by."""
    return 1 / float(value) if setting_of(key) in SHARED_BY else float(value)


def _place(key: str, distribution: Distribution, value: Any) -> float:
    weights = [_weight(key, end) for end in _ends(distribution)]
    low, high = min(weights), max(weights)
    return 0.0 if high == low else (_weight(key, value) - low) / (high - low)


def in_words(settings: Mapping[str, Value]) -> str:
    """Those of `settings` that decide what a trial takes, as in `--set`."""
    return " ".join(f"{setting_of(key)}={value}" for key, value in _counted(settings))


def _counted(settings: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    return ((key, value) for key, value in settings.items() if counts(key))
