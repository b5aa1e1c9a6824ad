"""What identifies the data, the base model and the chat template of a trial: who goes on must find the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from bilora_ray.config import TrialConfig
from bilora_ray.errors import MachineError, UserError
from bilora_ray.paths import COMMIT, kind_of, loadable

BASE, CHAT_TEMPLATE = "model_name_or_path", "chat_template"
# What a mapping with sources of data calls a source that is none.
MARKS = {BASE: "model ", CHAT_TEMPLATE: "chat template "}
# Beside the weights, what decides what a model makes of a text: its settings, its tokenizer, its code.
READ_WHOLE = frozenset({".jinja", ".json", ".model", ".py", ".tiktoken", ".txt"})
WEIGHTS = ".safetensors"
LENGTH, SAMPLE = 16, 4096


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None:
        """As hashlib has it."""


def of_base(config: TrialConfig) -> str | None:
    """What identifies the base model of `config`: its commit on the Hub, 16 hexadecimal digits of a folder.

    Those are of the names and the content of its files, but of weights, which may be many gigabytes: of them the size,
    the header, and some bytes in the middle of each tensor. So a model that was trained on, cast or replaced shows; one
    of which single values elsewhere were changed does not. Subfolders are not looked at.

    Returns:
        None where it is not known: the folder is away, or the commit was not looked up.
    """
    name, revision = config.model_name_or_path, config.model_revision
    if kind_of(name, is_data=False) == "hub":
        return revision if COMMIT.fullmatch(revision or "") else None
    folder = Path(loadable(name))
    return _of_folder(folder, _stamp(folder)) if folder.is_dir() else None


def stamp_of_base(config: TrialConfig) -> object | None:
    """What tells the base model of `config` from the same one after a file of it was written again, without a read.

    Returns:
        None where it is not known: the folder is away, or the commit was not looked up.
    """
    name, revision = config.model_name_or_path, config.model_revision
    if kind_of(name, is_data=False) == "hub":
        return revision if COMMIT.fullmatch(revision or "") else None
    folder = Path(loadable(name))
    return _stamp(folder) if folder.is_dir() else None


def of_template(config: TrialConfig) -> str | None:
    """What identifies the chat template of `config`: the start of the SHA-256 of its text; None where there is none."""
    try:
        text = Path(config.chat_template or "").read_text(encoding="utf-8")
    except (OSError, ValueError):  # who writes chats with it says what is wrong
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _files_of(folder: Path) -> list[Path]:
    """The files of a model's folder that a model is made from."""
    known = READ_WHOLE | {WEIGHTS}
    return [path for path in sorted(folder.iterdir()) if path.suffix in known and path.is_file()]


def _stamp(folder: Path) -> tuple[object, ...]:
    stats = [(path.name, path.stat()) for path in _files_of(folder)]
    return tuple((name, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in stats)


@lru_cache(maxsize=16)
def _of_folder(folder: Path, stamp: tuple[object, ...]) -> str:
    """Tokenizers and vocabularies take some tenths of a second, and a process asks for them before each trial."""
    whole = hashlib.sha256()
    for path in _files_of(folder):
        part = hashlib.sha256()
        if path.suffix == WEIGHTS:
            _read_weights(path, part)
        else:
            part.update(path.read_bytes())
        whole.update(f"{path.name}\0{part.hexdigest()}\0".encode())
    return whole.hexdigest()[:LENGTH]


def _read_weights(path: Path, part: _Hash) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
        part.update(f"{size}\0".encode() + header)
        for start, end in _places(header):
            file.seek(8 + length + max(start, (start + end - SAMPLE) // 2))
            part.update(file.read(min(SAMPLE, end - start)))


def _places(header: bytes) -> Iterator[tuple[int, int]]:
    """Where the tensors of a safetensors file begin and end; none of a header that is none, as a trial will say."""
    try:
        tensors = json.loads(header)
        places = [tensor["data_offsets"] for name, tensor in sorted(tensors.items()) if name != "__metadata__"]
        yield from ((int(start), int(end)) for start, end in places)
    except (ValueError, AttributeError, KeyError, TypeError):
        return


def source_of(config: TrialConfig, setting: str) -> str:
    """What a mapping calls what `setting` names: a file, a folder, or a Hub name with what is used of it.

    Args:
        config: the settings.
        setting: one of the four that name data, as `train_data`, or one of the MARKS, which is before the name.
    """
    if setting in MARKS:
        return f"{MARKS[setting]}{getattr(config, setting)}"
    name = str(getattr(config, setting) or config.train_data)
    if kind_of(name, is_data=True) != "hub":
        return name
    splits = {"train_data": config.train_split, "test_data": config.test_split or "test"}
    split = splits.get(setting, config.validation_split)
    return "/".join(filter(None, (name, config.dataset_config_name, split)))


def of_data(digests: Mapping[str, str]) -> dict[str, str]:
    """Of the `digests` by source those of data."""
    return {source: digest for source, digest in digests.items() if not source.startswith(tuple(MARKS.values()))}


def of_marked(setting: str, digests: Mapping[str, str]) -> dict[str, str]:
    """Of the `digests` by source those of what one of the MARKS names, by name."""
    mark = MARKS[setting]
    return {source.removeprefix(mark): digest for source, digest in digests.items() if source.startswith(mark)}


def by_setting(digests: Mapping[str, str], config: TrialConfig) -> dict[str, str]:
    """Of the `digests` by source those of what a trial with `config` reads, by setting."""
    sources = {setting: source_of(config, setting) for setting in ("train_data", "validation_data", *MARKS)}
    return {setting: digests[source] for setting, source in sources.items() if source in digests}


def check_unchanged(config: TrialConfig, before: Mapping[str, str], now: Mapping[str, str | None]) -> None:
    """Refuse to train on other rows, or another base, than the trials before.

    Args:
        config: the settings.
        before: setting -> digest as the study began; what is not there is not known.
        now: setting -> digest.

    Raises:
        MachineError: one is another. What is complete stays right, and the study can go on once it is put back.
    """
    for setting, digest in before.items():
        if now.get(setting) not in (None, digest):
            raise MachineError(f"{setting}: {_changed(config, setting, 'the study began', digest, now[setting])}")


def changed(config: TrialConfig, before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Lines about what is another than when a study began, one of whose trials is trained anew.

    Args:
        config: the settings.
        before: setting -> digest as it began.
        now: setting -> digest.
    """
    for setting, digest in before.items():
        if now.get(setting) not in (None, digest):
            source = source_of(config, setting).removeprefix(MARKS.get(setting, ""))
            yield f"{setting}: {source} has changed since the study began, so that the two trials cannot be compared"


def check_base(config: TrialConfig, recipe: Mapping[str, Any]) -> str | None:
    """Whether the base model of `config` is the one that a training began with, as far as its `recipe` tells.

    Returns:
        A line for who named another one; None if all is well.

    Raises:
        UserError: the folder of that name holds another model by now.
    """
    before, now = recipe.get("digests", {}).get(BASE), of_base(config)
    if before is None or now is None or before == now or len(before) != len(now):
        return None
    if config.model_name_or_path == recipe["settings"][BASE] and not COMMIT.fullmatch(now):
        raise UserError(f"{BASE}: {_changed(config, BASE, 'the training', before, now)}")
    return f"{BASE}: {config.model_name_or_path} is another model than that of the training"


def check_template(config: TrialConfig, before: Mapping[str, str]) -> Iterator[str]:
    """A line where the chat template of `config` is another than that of a training, whose digests were `before`."""
    if CHAT_TEMPLATE in before and before[CHAT_TEMPLATE] != of_template(config):
        yield f"{CHAT_TEMPLATE}: is not what it was in the training, which wrote chats in another way"


def check_rows(config: TrialConfig, before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Whether the validation rows of an evaluation are those of a training, as far as that is known.

    Rows of the Hub are those of a commit, which the settings name.

    Args:
        config: of the evaluation.
        before: setting -> digest of the training's data.
        now: setting -> digest of the evaluation's.

    Yields:
        A line where a file of validation rows has changed.

    Raises:
        UserError: they are split off training data that is another now.
    """
    held_out = config.validation_data is None and config.validation_split is None
    setting = "train_data" if held_out else "validation_data"
    name = str(getattr(config, setting) or config.train_data)
    if kind_of(name, is_data=True) == "hub" or before.get(setting) in (None, now.get(setting)):
        return
    if held_out:
        line = "is not what it was in the training, so which of its rows were held out is not known; give --data"
        raise UserError(f"{setting}: {name} {line}")
    yield f"{setting}: {name} is not what it was in the training, which was measured on other rows"


def _changed(config: TrialConfig, setting: str, since: str, before: str, now: str | None) -> str:
    source = source_of(config, setting).removeprefix(MARKS.get(setting, ""))
    return f"{source} has changed since {since}: its digest was {before}, is {now}"
