"""Groups of settings, and what is wrong with one in a line: pydantic's problems in a user's words."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, to_jsonable_python

from bilora_ray.errors import UserError, nearest

# What pydantic calls a value that should have been one number, word or true or false.
ONE_VALUE = frozenset({"int_type", "float_type", "bool_type", "literal_error"})


def _reject_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _pairs(value: Any) -> Any:
    if isinstance(value, tuple):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping of names to values")
    for key, item in value.items():
        if item is not None and not isinstance(item, bool | int | float | str):
            raise ValueError(f"'{key}' must be one number, text, true, false or null")
    return tuple((str(key), item) for key, item in value.items())


Int = Annotated[int, BeforeValidator(_reject_bool)]
Float = Annotated[float, BeforeValidator(_reject_bool)]
# A mapping of names to single values, as settings can be compared and hashed with; written as a mapping again.
Pairs = Annotated[
    tuple[tuple[str, bool | int | float | str | None], ...],
    BeforeValidator(_pairs),
    PlainSerializer(dict),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["boolean", "number", "string", "null"]}}),
]


class Settings(BaseModel):
    """Base of every group of settings: unknown keys, NaN and infinity are refused, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


SettingsT = TypeVar("SettingsT", bound=Settings)


def build(kind: type[SettingsT], values: Mapping[str, Any], where: str, overridden: Container[str] = ()) -> SettingsT:
    """`kind` from plain `values`, or UserError with one line that starts with `where` the wrong one is.

    Args:
        kind: of settings.
        values: by key.
        where: the values were read, such as `my_space.yaml: trial`.
        overridden: the keys whose values came from `--set` instead.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        problem = first_problem(error)
        if problem["loc"] and problem["loc"][0] in overridden:
            where = f"--set {where.rpartition(' ')[2]}"
        elif not problem["loc"] and overridden:  # settings that do not go together, of either origin
            where = f"{where}, with --set"
        raise UserError(f"{where}: {in_words(kind, problem)}") from None


def completed(kind: type[Settings], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The values that were `stored` of a `kind`, by an earlier version perhaps, as JSON holds them, and its defaults.

    What is compared with them must be completed too: a setting that is new since then has its default on both sides, or
    what that version did without it (see `facts.Facts`).
    """
    fields = kind.model_fields.items()
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields if not field.is_required()}
    missing = {key: value for key, value in {**defaults, **before(kind)}.items() if key not in stored}
    return to_jsonable_python({**stored, **missing})


def before(kind: type[Settings]) -> dict[str, Any]:
    """Of a `kind` the settings whose default does something else than versions that did not have them, with that."""
    known = {key: field.json_schema_extra for key, field in kind.model_fields.items()}
    values = {key: extra.get("before") for key, extra in known.items() if isinstance(extra, dict)}
    return {key: value for key, value in values.items() if value is not None}


def first_problem(error: ValidationError) -> ErrorDetails:
    """The first problem that `error` has, or an unknown key if there is one: it is often why another is missing."""
    problems = error.errors(include_url=False)
    return next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])


def in_words(kind: type[Settings], problem: ErrorDetails, alone: str = "") -> str:
    """A `problem` with a group of settings of a `kind`, or with the value of one that is checked `alone`, in a line."""
    key = ".".join(str(part) for part in problem["loc"] if not _is_union_branch(part))
    message = re.sub(r"^(Value error, |Input |String |Tuple )", "", problem["msg"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {nearest_setting(key, kind)}"
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    if problem["type"] == "value_error" and not key:
        return message
    if not message.startswith(given := repr(problem["input"])):
        message = f"{message}, got {given}"
    if problem["type"] == "string_type" and isinstance(problem["input"], bool):
        message += '; yes, no, on and off are true or false to YAML: a text needs quotes, as in "no"'
    if isinstance(problem["input"], list) and problem["type"] in ONE_VALUE and _is_searched(kind, key or alone):
        message += "; several values to choose from are {choice: [...]}"
    return f"{key}: {message}" if key else message


def nearest_setting(key: str, kind: type[Settings]) -> str:
    """As `nearest`, of the settings of a `kind`; where they are too many to list, who lists them."""
    return nearest(key, kind.model_fields, "`bilora-ray settings` lists the keys")


def _is_searched(kind: type[Settings], key: str) -> bool:
    """Whether the fact stands on the field: see `facts.setting`."""
    extra = kind.model_fields[key].json_schema_extra if key in kind.model_fields else None
    return isinstance(extra, dict) and bool(extra.get("searched"))


def _is_union_branch(part: int | str) -> bool:
    return isinstance(part, str) and (part in {"str", "int", "float"} or "[" in part)
