"""JSON Schema of space files, made from the settings themselves, by which an editor completes and checks one."""

from __future__ import annotations

from typing import Any

from bilora_ray.checking import Settings
from bilora_ray.config import TrialConfig
from bilora_ray.expressions import ALLOWED
from bilora_ray.facts import Facts, methods_in_words
from bilora_ray.search.space import Choice, Given, Range, ResourceConfig, StudyConfig
from bilora_ray.search.space.order import NOT_SEARCHED
from bilora_ray.settings import FACTS, is_number

Schema = dict[str, Any]
# What pydantic leaves in its own words where a setting may be null.
LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
# What is known of a setting for other purposes.
NOT_FOR_EDITORS = frozenset({"title", *Facts.__dataclass_fields__})
NUMBER, INTEGER = r"\s*[-+]?[0-9._]+([eE][-+]?[0-9]+)?\s*", r"\s*[-+]?[0-9_]+(\.0*)?\s*"
AS_TEXT = {
    "number_as_text": rf"^{NUMBER}$",
    "unsigned_number_as_text": rf"^(?!\s*-){NUMBER}$",
    "integer_as_text": rf"^{INTEGER}$",
    "unsigned_integer_as_text": rf"^(?!\s*-){INTEGER}$",
    # What an editor, which has another version of YAML, takes for text.
    "boolean_as_text": "^([Tt]rue|TRUE|[Ff]alse|FALSE|[Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF)$",
}


def schema() -> Schema:
    """The schema, of the draft that editors know best."""
    definitions: Schema = {}
    sections = {
        "study": _of(StudyConfig, definitions),
        "trial": _of(TrialConfig, definitions),
        "resources": _of(ResourceConfig, definitions),
    }
    values = sections["trial"]["properties"]
    settings = {f"trial.{key}": value for key, value in values.items()}
    sections["trial"]["properties"] = {key: _setting(key, value, definitions) for key, value in values.items()}
    points = {key: _ref(f"trial.{key}") for key in values}
    sections["study"]["properties"]["points_to_evaluate"]["items"] = _mapping(points)
    definitions |= settings
    definitions |= {name: {"type": "string", "pattern": pattern} for name, pattern in AS_TEXT.items()}
    definitions["range"] = _part(Range, definitions)
    definitions["when"] = _mapping({key: _or_several(_single(key, values[key])) for key in values})
    numbers = [key for key in values if is_number(key)]
    definitions["expression"] = {
        "type": "string",
        "description": f"derived from other settings: {ALLOWED}",
        "pattern": rf"^(?=.*\w)(?!{NUMBER}$)[\w\s.,()+*/-]*[-+*/()][\w\s.,()+*/-]*$|^\s*({'|'.join(numbers)})\s*$",
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "a bilora-ray space file",
        **_mapping(sections),
        "required": ["study", "trial"],
        "definitions": definitions,
    }


def _of(kind: type[Settings], definitions: Schema) -> Schema:
    """The schema of a group of settings; those that it refers to go into `definitions`."""
    found = kind.model_json_schema(ref_template="#/definitions/{model}")
    for name, definition in found.pop("$defs", {}).items():
        definitions[name] = _as_read(definition)
    return _as_read(found)


def _as_read(schema: Schema) -> Schema:
    """As a space file is read: a number may be text, since YAML 1.1 takes `3e-4` for one, and a text a number."""
    found = {LIMITS.get(key, key): value for key, value in schema.items() if key not in NOT_FOR_EDITORS}
    for key in ("properties", "patternProperties"):
        if key in found:
            found[key] = {name: _as_read(value) for name, value in found[key].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), dict):
            found[key] = _as_read(found[key])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in found:
            found[key] = [_as_read(value) for value in found[key]]
    if found.get("type") == "string" and not {"enum", "pattern"} & found.keys():
        found["type"] = ["string", "number"]
    if found.get("type") in ("number", "integer", "boolean"):
        told: Schema = {key: found.pop(key) for key in ("description", "default") if key in found}
        sign = "unsigned_" if max(found.get("minimum", -1), found.get("exclusiveMinimum", -1)) >= 0 else ""
        return told | {"anyOf": [found, _ref(f"{sign}{found['type']}_as_text")]}
    return found


def _setting(key: str, value: Schema, definitions: Schema) -> Schema:
    """What may stand behind `key`: a value, a distribution, an expression, or any of them under a condition."""
    told: Schema = {name: value.pop(name) for name in ("description", "default") if name in value}
    ways: list[Schema] = [_ref(f"trial.{key}")]
    if is_number(key):
        ways.append(_ref("expression"))
    given = {"anyOf": [*ways]}
    if key in NOT_SEARCHED:
        ways.append({**_mapping({"value": given}), "required": ["value"]})
    else:
        choice = {"type": "array", "minItems": 1, "uniqueItems": True, "items": _single(key, value)}
        if key == "precision":
            choice["items"] = {"allOf": [choice["items"], {"not": {"const": "auto"}}]}
        drawn = [_part(Choice, definitions, choice=choice)]
        if is_number(key):
            drawn.append(_ref("range"))
        drawn.append(_part(Given, definitions, value=given))
        definitions[f"drawn.{key}"] = {"anyOf": drawn}
        ways.append(_or_several(_ref(f"drawn.{key}")))
    of = methods_in_words(FACTS[key].of)
    if "description" in told and of:
        told["description"] += f" (of {of})"
    return told | {"anyOf": ways}


def _single(key: str, value: Schema) -> Schema:
    """A value of the setting `key` where there may be several: none of them is a list."""
    lists = any(one.get("type") == "array" for one in value.get("anyOf", (value,)))
    return {"allOf": [_ref(f"trial.{key}"), {"not": {"type": "array"}}]} if lists else _ref(f"trial.{key}")


def _part(kind: type[Settings], definitions: Schema, **properties: Schema) -> Schema:
    found = _of(kind, definitions)
    found["properties"] |= {**properties, "when": _ref("when")}
    return found


def _or_several(value: Schema) -> Schema:
    return {"anyOf": [value, {"type": "array", "minItems": 1, "items": value}]}


def _mapping(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}
