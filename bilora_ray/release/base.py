"""The files of a base model that are on this machine: nobody is asked for others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from bilora_ray.config import TrialConfig
from bilora_ray.paths import WEIGHTS, kind_by_name, loadable


def base_files(config: TrialConfig, *names: str) -> Iterator[Path]:
    """Those of `names` that the base model of `config` has, in its folder or the Hub's cache."""
    model = config.model_name_or_path
    folder = Path(loadable(model))
    for name in names:
        if folder.is_dir():
            if (folder / name).is_file():
                yield folder / name
        elif kind_by_name(model, is_data=False) == "hub":
            cached = try_to_load_from_cache(model, name, revision=config.model_revision)
            if isinstance(cached, str):
                yield Path(cached)


def base_settings(config: TrialConfig) -> dict[str, Any]:
    """What the base model's config.json says; empty where it is not here."""
    for file in base_files(config, "config.json"):
        return dict(json.loads(file.read_text(encoding="utf-8")))
    return {}


def base_bytes(config: TrialConfig) -> int:
    """What the base model's weights take in their files; 0 where those are not here."""
    for file in base_files(config, WEIGHTS):
        return file.stat().st_size
    for file in base_files(config, f"{WEIGHTS}.index.json"):
        return int(json.loads(file.read_text(encoding="utf-8"))["metadata"]["total_size"])
    return 0
