"""What identifies a base model's folder: whatever a training changes, and nothing beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from bilora_ray.config import TrialConfig
from bilora_ray.digests import (
    BASE,
    CHAT_TEMPLATE,
    by_setting,
    check_base,
    check_rows,
    check_template,
    check_unchanged,
    of_base,
    of_data,
    of_marked,
    of_template,
)
from bilora_ray.errors import MachineError, UserError

COMMIT = "0" * 40


def config(**settings: Any) -> TrialConfig:
    return TrialConfig(**{"model_name_or_path": "/m", "task": "causal-lm", "train_data": "/rows.jsonl", **settings})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("a model")
    random = numpy.random.default_rng(0)
    tensors = {name: random.normal(size=(200, 50)).astype("float32") for name in ("up", "down")}
    save_file(tensors, folder / "model.safetensors")
    return folder


def digest(folder: Path) -> str | None:
    return of_base(config(model_name_or_path=str(folder)))


def trained(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] += 1e-3
        save_file(tensors, folder / "model.safetensors")

    return change


def cast(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.astype("float16") for name, tensor in tensors.items()}, folder / "model.safetensors")


def grown(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / file).open("ab") as opened:
            opened.write(b" ")

    return change


@pytest.mark.parametrize(
    "change",
    [
        trained("up"),
        trained("down"),
        cast,
        grown("config.json"),
        grown("tokenizer.json"),
        grown("model.safetensors"),
        lambda folder: (folder / "chat_template.jinja").touch(),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "config.json").rename(folder / "other.json"),
    ],
)
def test_another_model_has_another_digest(change: Callable[[Path], None], base: Path) -> None:
    before = digest(base)
    change(base)
    assert before != digest(base)


def test_a_copy_has_the_same_digest_whatever_lies_beside_it(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "README.md").write_text("another text")
    (copy / "checkpoint-500").mkdir()
    assert digest(base) == digest(copy)
    assert len(digest(base) or "") == 16


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b'\x0a\0\0\0\0\0\0\0{"a": {}}'])
def test_torn_weights_are_left_to_who_loads_them(content: bytes, base: Path) -> None:
    (base / "model.safetensors").write_bytes(content)
    assert digest(base)


def test_a_hub_model_is_its_commit_and_what_is_away_is_not_known(tmp_path: Path) -> None:
    assert of_base(config(model_name_or_path="a/b", model_revision=COMMIT)) == COMMIT
    assert of_base(config(model_name_or_path="a/b", model_revision="main")) is None
    assert digest(tmp_path / "gone") is None


def test_what_is_built_in_is_identified_as_a_folder() -> None:
    assert len(of_base(config(model_name_or_path="builtin:quickstart/model")) or "") == 16


def test_a_study_tells_data_from_bases_and_a_trial_hears_of_its_own() -> None:
    digests = {"/rows.jsonl": "1", "/other.jsonl": "2", "model /m": "3", "model /n": "4", "chat template /c.jinja": "5"}
    assert of_data(digests) == {"/rows.jsonl": "1", "/other.jsonl": "2"}
    assert of_marked(BASE, digests) == {"/m": "3", "/n": "4"}
    assert of_marked(CHAT_TEMPLATE, digests) == {"/c.jinja": "5"}
    found = by_setting(digests, config(validation_data="/other.jsonl"))
    assert found == {"train_data": "1", "validation_data": "2", "model_name_or_path": "3"}
    assert by_setting(digests, chats(Path("/c.jinja")))["chat_template"] == "5"
    assert by_setting({}, config()) == {}


def test_a_trial_goes_on_with_what_the_study_began_with() -> None:
    check_unchanged(config(), {"train_data": "1"}, {"train_data": "1", "validation_data": "2"})
    check_unchanged(config(), {"validation_data": "1"}, {"train_data": "1"})
    check_unchanged(config(), {"model_name_or_path": "1"}, {"model_name_or_path": None})
    for setting, name in (("train_data", "/rows.jsonl"), ("model_name_or_path", "/m")):
        with pytest.raises(MachineError) as caught:
            check_unchanged(config(), {setting: "1"}, {setting: "2"})
        assert str(caught.value) == f"{setting}: {name} has changed since the study began: its digest was 1, is 2"


def chats(template: Path) -> TrialConfig:
    return config(messages_column="m", chat_template=str(template))


def test_a_chat_template_is_identified_by_its_text(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    assert of_template(config()) is of_template(chats(file)) is None
    file.write_text("one")
    before = of_template(chats(file))
    (tmp_path / "same.jinja").write_text("one")
    assert of_template(chats(tmp_path / "same.jinja")) == before
    assert list(check_template(chats(file), {"chat_template": str(before)})) == []
    file.write_text("two")
    assert of_template(chats(file)) != before
    line = "chat_template: is not what it was in the training, which wrote chats in another way"
    assert list(check_template(chats(file), {"chat_template": str(before)})) == [line]
    assert list(check_template(chats(file), {})) == []  # what 0.1.0 wrote says nothing
    with pytest.raises(MachineError, match=f"^chat_template: {file} has changed since the study began: its digest was"):
        check_unchanged(chats(file), {"chat_template": str(before)}, {"chat_template": of_template(chats(file))})


def test_an_adapter_belongs_to_the_base_of_its_training(base: Path, tmp_path: Path) -> None:
    before, name = digest(base), str(base)
    recipe = {"settings": {"model_name_or_path": name}, "digests": {"model_name_or_path": before}}
    assert check_base(config(model_name_or_path=name), recipe) is None
    copy = str(shutil.copytree(base, tmp_path / "copy"))
    assert check_base(config(model_name_or_path=copy), recipe) is None
    trained("up")(base)
    trained("up")(Path(copy))
    with pytest.raises(UserError) as caught:
        check_base(config(model_name_or_path=name), recipe)
    changed = f"{name} has changed since the training: its digest was {before}, is {digest(base)}"
    assert str(caught.value) == f"model_name_or_path: {changed}"
    other = check_base(config(model_name_or_path=copy), recipe)
    assert other == f"model_name_or_path: {copy} is another model than that of the training"
    # What 0.1.0 wrote says nothing, and a commit says nothing of a folder.
    assert check_base(config(model_name_or_path=name), {"settings": recipe["settings"]}) is None
    assert check_base(config(model_name_or_path="a/b", model_revision=COMMIT), recipe) is None


def test_rows_that_were_held_out_are_known_only_of_the_same_file() -> None:
    assert list(check_rows(config(), {"train_data": "1"}, {"train_data": "1"})) == []
    assert list(check_rows(config(), {}, {"train_data": "1"})) == []
    assert list(check_rows(config(train_data="a/b"), {"train_data": "1"}, {"train_data": "2"})) == []
    with pytest.raises(UserError) as caught:
        list(check_rows(config(), {"train_data": "1"}, {"train_data": "2"}))
    line = "is not what it was in the training, so which of its rows were held out is not known; give --data"
    assert str(caught.value) == f"train_data: /rows.jsonl {line}"


def test_a_file_of_validation_rows_that_has_changed_is_told() -> None:
    named = config(validation_data="/v.jsonl")
    before = {"train_data": "1", "validation_data": "2"}
    assert list(check_rows(named, before, {"train_data": "9", "validation_data": "2"})) == []
    line = "validation_data: /v.jsonl is not what it was in the training, which was measured on other rows"
    assert list(check_rows(named, before, {"train_data": "1", "validation_data": "9"})) == [line]
