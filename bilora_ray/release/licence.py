"""The licence of a base model, as its own files state it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

from huggingface_hub import ModelCard

from bilora_ray.config import TrialConfig
from bilora_ray.paths import kind_by_name
from bilora_ray.release.base import base_files

# What a card's metadata say of a licence, as the Hub has them.
KEYS = ("license", "license_name", "license_link")
# How the texts of licences begin that need no reading -> what the Hub calls them.
TEXTS = {
    "Apache License Version 2.0": "apache-2.0",
    "MIT License": "mit",
    "BSD 3-Clause License": "bsd-3-clause",
    "GNU GENERAL PUBLIC LICENSE Version 3": "gpl-3.0",
}


def licence_of(config: TrialConfig) -> dict[str, str]:
    """What the Hub's metadata say of the licence of the base model of `config`; empty where it is not known here.

    The base's own card says it, or else its LICENSE file: of a folder those in it, of a model of the Hub those that
    are in the cache. Nothing is guessed, and nobody is asked.
    """
    if kind_by_name(config.model_name_or_path, is_data=False) == "built in":
        try:
            licence = metadata("bilora-ray").json.get("license_expression")
        except PackageNotFoundError:
            licence = None
        return {} if licence is None else {"license": str(licence).lower()}
    for file in base_files(config, "README.md"):
        said: dict[str, Any] = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
        if isinstance(said.get("license"), str):
            return {key: said[key] for key in KEYS if isinstance(said.get(key), str)}
    for file in base_files(config, "LICENSE", "LICENSE.txt", "LICENSE.md"):
        beginning = " ".join(file.read_text(encoding="utf-8", errors="replace")[:400].split())
        known = next((licence for text, licence in TEXTS.items() if beginning.startswith(text)), None)
        return {"license": known} if known else {"license": "other", "license_name": "see-base-model"}
    return {}
