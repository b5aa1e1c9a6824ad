"""A study as a space file: what it searched, for another study that starts from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from bilora_ray.checking import Settings
from bilora_ray.search.space import Distribution, Given, Space, setting_of


def sections_of(space: Space) -> dict[str, dict[str, Any]]:
    """The sections of a file that says what `space` does, which may be that of a study.

    What a study's trials have read is named by absolute paths, and pinned.
    """
    parts: dict[str, list[Any]] = {}
    for name, part in space.parts.items():
        parts.setdefault(setting_of(name), []).append(_part(part))
    drawn = {key: found[0] if len(found) == 1 else found for key, found in parts.items()}
    return {
        "study": _told(space.study),
        "trial": {**space.fixed, **drawn},
        "resources": _told(space.resources),
    }


def written(space: Space) -> str:
    """The text of a space file that says what the checked `space` does."""
    sections = sections_of(space)
    # Less what does not fit a setting that was changed.
    sections["study"]["points_to_evaluate"] = list(space.points_to_evaluate)
    if not space.points_to_evaluate:
        del sections["study"]["points_to_evaluate"]
    told = {name: _plain(section) for name, section in sections.items() if section}
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=120)


def _part(part: Distribution | Given) -> Any:
    """What a setting is drawn or derived from, or its value under a condition."""
    told = {key: value for key, value in part.described().items() if key == "value" or value is not False}
    return told["value"] if told.keys() == {"value"} else told


def _told(settings: Settings) -> dict[str, Any]:
    """Those of a group of settings that are not their defaults."""
    return settings.model_dump(mode="json", exclude_defaults=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
