"""What a source is called outside of this machine: nothing that leaves the house names a path of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bilora_ray.config import TrialConfig
from bilora_ray.paths import kind_by_name
from bilora_ray.recipe import CONFIG, TEMPLATE
from bilora_ray.settings import SOURCES

BASE = "base_model_name_or_path"


def name_outside(name: str, is_data: bool) -> str:
    """What the source `name` is called elsewhere: of a path `./` and its end, else the name itself.

    The end is what follows the current folder, or, where the path is not in it, the last part. PEFT and transformers
    take such a name for a folder of the current one, and never for a repository of the Hub, as they would the name of
    a folder alone: `gpt2` may be anything here, and is one model there.
    """
    path = Path(name)
    if kind_by_name(name, is_data) != "local" or not path.is_absolute():
        return name
    here, home = Path.cwd(), Path(os.path.expanduser("~"))
    holds_home = home != here and home.is_relative_to(here)
    inside = path != here and path.is_relative_to(here) and not holds_home
    return f"./{path.relative_to(here).as_posix() if inside else path.name}"


def outside(config: TrialConfig, template: bool = True) -> TrialConfig:
    """`config` with its sources as they are called elsewhere.

    Args:
        config: the settings.
        template: whether the chat template goes along, under the name that all who read chats know.
    """
    names = {
        key: name_outside(name, kind != "model")
        for key, kind in SOURCES.items()
        if isinstance(name := getattr(config, key), str)
    }
    if template and config.chat_template is not None:
        names["chat_template"] = TEMPLATE
    return config.model_copy(update=names)


def rename_base(adapter: Path, config: TrialConfig) -> None:
    """Have PEFT's file in the folder `adapter` name the base model of `config` as it is called elsewhere."""
    file = adapter / CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings[BASE] = name_outside(config.model_name_or_path, is_data=False)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
