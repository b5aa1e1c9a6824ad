"""What is known of a setting by its name: what it decides, which values it takes, which methods read it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from bilora_ray.checking import Pairs, first_problem, in_words
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.facts import WHOLE, Decides, facts_of

FACTS = facts_of(TrialConfig)


def deciding(*words: Decides) -> frozenset[str]:
    """The settings that decide one of `words`."""
    return frozenset(key for key, facts in FACTS.items() if facts.decides in words)


def deciding_the_split(settings: Mapping[str, Any]) -> frozenset[str]:
    """What decides which rows are held out; nothing does where `settings` name validation data.

    `seed` does where they have no `split_seed`.
    """
    if any(settings.get(key) is not None for key in ("validation_data", "validation_split")):
        return frozenset()
    without = set() if settings.get("split_seed") is None else {"seed"}
    return frozenset(key for key, facts in FACTS.items() if facts.holds_out) - without


def deciding_the_draw(settings: Mapping[str, Any]) -> frozenset[str]:
    """What decides which validation rows `max_eval_samples` draws; nothing does where it draws none."""
    if settings.get("max_eval_samples") is None or not settings.get("stratify", True):
        return frozenset()
    return frozenset({"split_seed"} if settings.get("split_seed") is not None else {"seed", "split_seed"})


def shown(place: Literal["card", "best"]) -> tuple[str, ...]:
    """The settings that a person is told of in `place`, in the order of their declaration."""
    return tuple(key for key, facts in FACTS.items() if place in facts.shown)


def non_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a trial's `settings` that have not their default."""
    return {key: value for key, value in settings.items() if value != TrialConfig.model_fields[key].default}


# What an evaluation of an adapter does not read.
TRAINING_SETTINGS = deciding("training", "training rows")
# What may be another from a checkpoint on.
AMID = frozenset(key for key, facts in FACTS.items() if facts.amid)
# What names a model or data -> which of the two.
SOURCES = {key: facts.source for key, facts in FACTS.items() if facts.source is not None}
# The same -> what names the commit of one that is on the Hub.
REVISIONS = {key: facts.revision for key, facts in FACTS.items() if facts.revision is not None}


def leaves_model(settings: Mapping[str, Any]) -> bool:
    """Whether a trial with the stored `settings` leaves a model, and no adapter."""
    return settings.get("method") in WHOLE


def of_other_sources(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `others` on top, less the revision of each source that is another now: it is not of that one."""
    gone = {revision for source, revision in REVISIONS.items() if source in others and revision not in others}
    return {key: value for key, value in {**settings, **others}.items() if key not in gone}


def is_integer(setting: str) -> bool:
    """Whether `setting` takes whole numbers only."""
    return int in _kinds(setting)


def is_number(setting: str) -> bool:
    """Whether `setting` takes numbers."""
    return bool({int, float} & _kinds(setting))


def takes_mapping(setting: str) -> bool:
    """Whether a mapping is a value of `setting`, and no distribution."""
    return setting in FACTS and Pairs in get_args(TrialConfig.model_fields[setting].annotation)


def _kinds(setting: str) -> set[Any]:
    annotation = TrialConfig.model_fields[setting].annotation
    return {getattr(kind, "__origin__", kind) for kind in (annotation, *get_args(annotation))}


def coerce(setting: str, value: Any, where: str) -> Any:
    """`value` as the type of `setting`: YAML 1.1 reads `3e-4` as text. UserError if it can't be."""
    try:
        return _adapter(setting).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{where}: {in_words(TrialConfig, first_problem(error), setting)}") from None


@cache
def _adapter(setting: str) -> TypeAdapter[Any]:
    field = TrialConfig.model_fields[setting]
    kind: Any = Annotated[field.annotation, field]
    return TypeAdapter(kind, config=TrialConfig.model_config)


def applies(setting: str, method: str) -> bool:
    """Whether `method` reads `setting`."""
    return method in FACTS[setting].of
