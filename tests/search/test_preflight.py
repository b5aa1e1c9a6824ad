"""The commits of a Hub model and of Hub data: looked up once, kept with the study, the same for every trial.

There is no Hub here: a fake.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from tiny_trials import TASKS, Tiny, next_trial, write_rows
from training.chat_cases import ENDS_THE_TEXT, TWO, messages

from bilora_ray.checking import before
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.recipe import read_recipe
from bilora_ray.search.cluster import gpus
from bilora_ray.search.preflight import (
    BEHIND_PADDING,
    POSITIONS,
    chat_notes,
    check_kernels,
    look,
    pinned,
    positions,
    preflight,
)
from bilora_ray.search.space import Space
from bilora_ray.search.space_file import checked_space, load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import ONLY, check_study, load_study, open_study
from bilora_ray.tracking.mlflow_tracker import default_uri
from bilora_ray.training.rows import load_rows
from bilora_ray.training.tasks.base import check_positions

NAME, DATA = "someone/model", ("someone/data", "someone/else")
OLD, NEW, TAGGED = "0" * 40, "1" * 40, "2" * 40


@dataclass
class Hub:
    """A Hub with one model and one data set, whose branches and tags are `refs`; None: it does not answer."""

    refs: dict[str, str] | None = field(default_factory=lambda: {"main": OLD, "v1": TAGGED})
    asked: list[str | None] = field(default_factory=list)
    read: list[str | None] = field(default_factory=list)

    def model_info(self, name: str, revision: str | None = None, timeout: float | None = None) -> Any:
        self.asked.append(revision)
        if self.refs is None:
            raise OfflineModeIsEnabled("offline")
        assert name == NAME
        return SimpleNamespace(sha=self.refs.get(revision or "main", revision))

    def dataset_info(self, name: str, revision: str | None = None, timeout: float | None = None) -> Any:
        if self.refs is None:
            raise OfflineModeIsEnabled("offline")
        assert name in DATA
        return SimpleNamespace(sha=self.refs.get(revision or "main", revision))

    def load_dataset(self, name: str, config_name: str | None, split: str, revision: str | None) -> Any:
        self.read.append(revision)
        return datasets.Dataset.from_list([{"prompt": split, "completion": str(revision)}] * 4)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return fake


def cache(commit: str) -> None:
    """Put the model into the cache, as a download of its main branch does."""
    model = Path(constants.HF_HUB_CACHE, "models--someone--model")
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "config.json").write_text("{}")
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(commit)


def space(tiny: Tiny, *overrides: str, **trial: Any) -> Space:
    settings = {**tiny.config("causal-lm").model_dump(exclude_unset=True), "model_name_or_path": NAME, **trial}
    texts = [f"{key}={value}" for key, value in settings.items()]
    return load_space(None, [*texts, "study.name=s", "rho={low: 0.01, high: 0.2}", *overrides])


def revision(found: Space) -> object:
    return found.fixed.get("model_revision")


def test_no_revision_is_pinned_to_the_newest_commit_and_a_tag_to_its_own(hub: Hub, tiny: Tiny) -> None:
    assert revision(pinned(space(tiny), None)) == OLD
    assert revision(pinned(space(tiny, model_revision="v1"), None)) == TAGGED
    assert hub.asked == [None, "v1"]


def test_without_the_hub_the_cache_says_what_the_newest_commit_is(hub: Hub, tiny: Tiny) -> None:
    hub.refs = None
    cache(TAGGED)
    assert revision(pinned(space(tiny), None)) == TAGGED


def test_a_commit_in_the_cache_needs_no_hub(hub: Hub, tiny: Tiny) -> None:
    cache(TAGGED)
    assert revision(pinned(space(tiny, model_revision=f"'{TAGGED}'"), None)) == TAGGED
    assert hub.asked == []


def test_no_hub_and_no_cache_is_one_line(hub: Hub, tiny: Tiny) -> None:
    hub.refs = None
    with pytest.raises(UserError, match=re.escape(f"model_name_or_path: no folder '{NAME}' here, and the Hub")):
        pinned(space(tiny), None)


@pytest.mark.parametrize("name", ["a/..", "../a/b", "a--b/c", "a/b.git"])
def test_a_name_that_is_none_of_the_hubs_is_refused(name: str, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"model_name_or_path: (no such folder|'.*' is no folder here, and no name)"):
        pinned(space(tiny, model_name_or_path=name), None)


def test_local_models_and_several_models_are_not_pinned(hub: Hub, tiny: Tiny) -> None:
    for found in (
        space(tiny, model_name_or_path=str(tiny.model("causal-lm"))),
        space(tiny, model_name_or_path="builtin:quickstart/model"),
        space(tiny, "model_name_or_path={choice: [someone/model, someone/other]}"),
        space(tiny, "model_revision={choice: [v1, main]}"),
    ):
        new = {key: TrialConfig.model_fields[key].default for key in before(TrialConfig)}
        assert pinned(found, None).fixed == {**found.fixed, **new}
    assert hub.asked == []


def test_a_resumed_study_keeps_its_commit_after_the_hub_has_moved_on(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    study = open_study(pinned(space(tiny), None), layout, {})
    number = next_trial(study)
    assert number is not None
    study.release()
    assert study.config(number).model_revision == OLD
    assert study.record(number).settings["model_revision"] == OLD
    assert hub.refs is not None
    hub.refs["main"] = NEW
    again = pinned(space(tiny), layout)
    assert revision(again) == OLD
    check_study(again, layout, True, {})
    # A branch that a user names is the branch as it is now, which is not what the study began with.
    with pytest.raises(UserError, match=f"model_revision was '{OLD}', is '{NEW}'"):
        check_study(pinned(space(tiny, model_revision="main"), layout), layout, True, {})


def test_a_study_that_began_without_a_commit_goes_on_without_one(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    study = open_study(space(tiny), layout, {})
    next_trial(study)
    study.release()
    assert revision(pinned(space(tiny), layout)) is None


@pytest.mark.parametrize("given", [None, "v1", f"'{TAGGED}'"])
def test_the_hub_is_asked_once_at_a_start(given: str | None, hub: Hub, tiny: Tiny) -> None:
    trial = {} if given is None else {"model_revision": given}
    preflight(pinned(space(tiny, **trial), None))
    assert len(hub.asked) == 1


def test_of_several_models_each_is_looked_for_once(hub: Hub, tiny: Tiny) -> None:
    preflight(pinned(space(tiny, "model_revision={choice: [v1, main]}"), None))
    assert hub.asked == ["v1", "main"]


@pytest.mark.parametrize("refuses", [preflight, look])
def test_every_model_that_is_searched_is_looked_for_at_the_start(
    refuses: Callable[[Space], object], tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    first, short = tiny.model("causal-lm"), "builtin:quickstart/model"
    for other, line in (
        (str(tmp_path / "empty"), f"model_name_or_path: {tmp_path}/empty holds no model: config.json is missing"),
        (short, "max_length: 129 is more than the model's 128 positions"),
    ):
        found = space(tiny, model_name_or_path=f"{{choice: ['{first}', '{other}']}}", max_length=129)
        with pytest.raises(UserError, match=re.escape(line)):
            refuses(found)


def data(**trial: Any) -> dict[str, Any]:
    return {"train_data": DATA[0], "validation_data": DATA[1], "validation_split": "dev", **trial}


def revisions(found: Space) -> list[object]:
    return [found.fixed.get(key) for key in ("train_revision", "validation_revision")]


def test_hub_data_are_pinned_and_a_branch_that_moves_changes_no_trial(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    begun = pinned(space(tiny, **data()), None)
    assert revisions(begun) == [OLD, OLD]
    digests = preflight(begun).digests
    study = open_study(begun, layout, digests)
    number = next_trial(study)
    assert number is not None
    study.release()
    assert hub.refs is not None
    hub.refs["main"] = NEW
    load_rows(study.config(number))
    again = pinned(space(tiny, **data()), layout)
    assert revisions(again) == [OLD, OLD]
    check_study(again, layout, True, preflight(again).digests)
    assert set(hub.read) == {OLD}
    with pytest.raises(UserError, match=f"train_revision was '{OLD}', is '{NEW}'"):
        check_study(pinned(space(tiny, **data(train_revision="main")), layout), layout, True, digests)


def test_data_that_are_files_or_searched_over_are_not_pinned(hub: Hub, tiny: Tiny) -> None:
    assert revisions(pinned(space(tiny), None)) == [None, None]
    several = pinned(space(tiny, "train_data={choice: [someone/data, someone/else]}", **data()), None)
    assert revisions(several) == [None, OLD]
    hub.refs = None
    cache(TAGGED)
    assert revisions(pinned(space(tiny, **data()), None)) == [None, None]


def test_a_study_that_began_with_unpinned_data_goes_on_with_them(hub: Hub, tiny: Tiny, tmp_path: Path) -> None:
    layout, begun = Layout(tmp_path), space(tiny, model_revision=f"'{TAGGED}'", **data())
    study = open_study(begun, layout, {})
    next_trial(study)
    study.release()
    again = pinned(begun, layout)
    assert revisions(again) == [None, None]
    check_study(again, layout, True, {})


def test_what_is_refused_since_is_no_reason_to_end_a_study(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": number % 3 - 1} for number in range(12)]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    settings = tiny.config("sequence-classification").model_dump(exclude_unset=True)
    settings |= {"train_data": file, "validation_data": file, "max_eval_samples": 4, "seed": "{choice: [0, 1]}"}
    given = [f"{key}={value}" for key, value in settings.items()]
    layout, begun = Layout(tmp_path / "runs"), load_space(None, [*given, "study.name=s"])
    digests = {file: load_rows(begun.first_config().model_copy(update={"check_labels": False})).digests["train_data"]}
    study = open_study(begun, layout, digests)
    next_trial(study)
    study.release()
    again = pinned(begun, layout)
    checked = preflight(again)
    assert checked.rows.label_names == ("-1", "0", "1")
    assert [row.text for row in checked.rows.validation] == [row["text"] for row in rows[:4]]  # type: ignore[attr-defined]
    check_study(again, layout, True, digests)
    with pytest.raises(UserError, match=r"trial\.seed: needs split_seed or stratify: false, or max_eval_samples would"):
        pinned(begun, None)
    with pytest.raises(UserError, match="label '-1' beside labels from 0 on"):
        preflight(begun)


def test_another_source_has_another_revision(tiny: Tiny) -> None:
    settings = {**data(), "model_name_or_path": NAME, "task": "causal-lm"}
    settings |= {"model_revision": "m", "train_revision": "t", "validation_revision": "v"}
    sections = {"study": {"name": "s"}, "trial": settings}
    found = checked_space(sections, Path("space.yaml"), ["train_data=someone/else", "model_name_or_path=a/b"])
    kept = {key: value for key, value in found.fixed.items() if key.endswith("_revision")}
    assert kept == {"validation_revision": "v"}
    found = checked_space(sections, Path("space.yaml"), ["train_data=someone/else", "train_revision=u"])
    assert found.fixed["train_revision"] == "u"


@pytest.mark.slow
def test_the_commit_of_a_model_in_the_cache_is_in_the_settings_the_recipe_and_mlflow(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cache(TAGGED)
    shutil.copytree(
        tiny.model("causal-lm"), tmp_path / "cache/models--someone--model/snapshots" / TAGGED, dirs_exist_ok=True
    )
    settings = tiny.config("causal-lm", model_name_or_path=NAME, max_steps=2).model_dump(exclude_unset=True)
    command = [Path(sys.executable).with_name("bilora-ray"), "train", "--storage-path", tmp_path / "runs"]
    command += [f"--set={key}={value}" for key, value in settings.items()]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    record = load_study(Layout(tmp_path / "runs"), "train").record(0)
    assert record.settings["model_revision"] == TAGGED
    assert record.adapter is not None
    recipe = read_recipe(record.adapter)
    assert (recipe["model_commit"], recipe["settings"]["model_revision"]) == (TAGGED, TAGGED)
    client = MlflowClient(default_uri(tmp_path / "runs"))
    (experiment,) = (found for found in client.search_experiments() if found.name == "bilora-ray")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.params["model_revision"] for run in runs} == {TAGGED}


def test_the_notes_are_on_the_trial_whose_steps_take_the_most_rows(tiny: Tiny) -> None:
    steps = ("per_device_train_batch_size={low: 2, high: 32}", "gradient_accumulation_steps={choice: [1, 4, 2]}")
    local = {"model_name_or_path": str(tiny.model("causal-lm"))}
    (note,) = preflight(space(tiny, *steps, "lora_dropout={low: 0, high: 0.5}", **local)).notes
    assert note == "per_device_train_batch_size: a step would take 128 rows, and there are 44"


def test_what_a_chat_template_makes_of_the_first_chats_is_told_at_the_start(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"messages": messages(*TWO)}] * 130
    (tmp_path / "own.jinja").write_text(ENDS_THE_TEXT)
    trial = tiny.config("causal-lm", train_data=str(write_rows(tmp_path / "chats.jsonl", rows)), validation_data=None)
    settings = trial.model_dump(exclude_unset=True, exclude_none=True)
    sections = {
        "study": {"name": "s"},
        "trial": {**settings, "chat_template": "own.jinja", "messages_column": "messages"},
    }
    checked = preflight(checked_space(sections, tmp_path / "space.yaml", ()))
    assert chat_notes(checked) == (
        "messages_column: 100 chats are 200 training rows, one for each turn of the assistant, for the chat template "
        "writes a turn otherwise once others follow (of the first 100)",
    )


def test_what_there_is_to_know_of_labels_is_told(tiny: Tiny) -> None:
    files = {f"{split}_data": str(tiny.folder / f"labels-{split}.jsonl") for split in ("train", "validation")}
    local = {"model_name_or_path": str(tiny.model("sequence-classification")), "task": "sequence-classification"}
    found = preflight(space(tiny, "lora_dropout={low: 0, high: 0.5}", **local, **files, metric="eval_f1"))
    assert found.labels == (
        "train labels: 'good' 27, 'bad' 17",
        "validation labels: 'good' 11, 'bad' 7",
        "without learning, where every row is 'good': eval_f1 0.7586",
    )
    assert found.notes == ("positive_label: eval_f1 is that of 'good', the second label, unless it names the other",)
    local = {"model_name_or_path": str(tiny.model("causal-lm"))}
    assert preflight(space(tiny, "lora_dropout={low: 0, high: 0.5}", **local)).labels == ()


@pytest.mark.parametrize("task", TASKS)
def test_positions_are_those_that_a_trial_finds(task: Task, tiny: Tiny) -> None:
    from transformers import AutoConfig

    expected = getattr(AutoConfig.from_pretrained(tiny.model(task)), "max_position_embeddings", None)
    assert positions(tiny.config(task)) == expected
    assert (expected is None) is (task in ("seq2seq-lm", "image-classification"))


def test_kinds_of_models_call_their_positions_what_transformers_says() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = {kind: CONFIG_MAPPING[kind].attribute_map["max_position_embeddings"] for kind in POSITIONS}
    assert names == POSITIONS


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"model_type": "gpt2", "n_positions": 9}', 9),
        ('{"model_type": "t5", "n_positions": 9}', None),
        ('{"model_type": "roberta", "max_position_embeddings": 514}', 512),
        ('{"model_type": "roberta", "max_position_embeddings": 20, "pad_token_id": 3}', 16),
        ('{"model_type": "xlnet", "max_position_embeddings": -1}', -1),
        ('{"model_type": "new", "text_config": {"max_position_embeddings": 9}}', 9),
        ('{"model_type": "llama", "max_position_embeddings": "9"}', None),
        ("[]", None),
        ("{", None),
        (None, None),
    ],
)
def test_what_config_json_says_of_positions(content: str | None, found: int | None, tiny: Tiny, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert positions(tiny.config("causal-lm", model_name_or_path=str(tmp_path))) == found


def test_kinds_whose_positions_begin_behind_the_paddings_are_those_of_transformers(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from bilora_ray.training.model import load_shape

    config = tiny.config("sequence-classification", model_name_or_path=str(tmp_path), max_length=33)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for kind in BEHIND_PADDING:
        described = AutoConfig.for_model(kind, max_position_embeddings=34, pad_token_id=1, vocab_size=40, **small)
        described.save_pretrained(tmp_path)
        assert positions(config) == 32, kind
        with pytest.raises(UserError, match="max_length: 33 is more than the model's 32 positions"):
            load_shape(config, ("a", "b"))


def test_no_end_of_positions_is_none(tiny: Tiny) -> None:
    for unlimited in (None, -1, 0):
        check_positions(unlimited, tiny.config("causal-lm"), True)


@pytest.mark.parametrize(
    ("described", "of_base"),
    [
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}, 3),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}, None),
        ({"architectures": ["BertForSequenceClassification"]}, None),
        ({"architectures": ["BertModel"], "id2label": {"0": "a", "1": "b", "2": "c"}}, None),
        ({}, None),
    ],
)
def test_a_head_for_other_labels_is_told(
    described: dict[str, object], of_base: int | None, tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(described))
    data = {key: str(tiny.folder / f"labels-{key}.jsonl") for key in ("train", "validation")}
    trial = {"task": "sequence-classification", "train_data": data["train"], "validation_data": data["validation"]}
    line = f"label_names: the base model has a head for {of_base} labels; one for 2 is trained anew"
    found = space(tiny, model_name_or_path=str(tmp_path), **trial)
    assert [note for note in preflight(found).notes if "head" in note] == ([line] if of_base else [])


def test_a_hub_model_that_cannot_be_read_from_here_is_left_to_the_trial(hub: Hub, tiny: Tiny) -> None:
    assert positions(tiny.config("causal-lm", model_name_or_path=NAME)) is None
    cache(OLD)
    file = Path(constants.HF_HUB_CACHE, "models--someone--model", "snapshots", OLD, "config.json")
    file.write_text('{"max_position_embeddings": 9}')
    assert positions(tiny.config("causal-lm", model_name_or_path=NAME, model_revision=OLD)) == 9


def test_rows_too_long_for_the_model_are_refused_before_anything_heavy_is_imported(tiny: Tiny, tmp_path: Path) -> None:
    found = space(tiny, model_name_or_path="builtin:quickstart/model", max_length=129)
    with pytest.raises(UserError, match=re.escape("max_length: 129 is more than the model's 128 positions")):
        preflight(found)
    settings = tiny.config("causal-lm").model_dump(exclude_unset=True)
    code = (
        "import sys; from bilora_ray.config import TrialConfig; from bilora_ray.search.preflight import positions\n"
        f"assert positions(TrialConfig(**{settings!r})) == 2048\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_study_is_not_resumed_on_a_base_that_was_trained_since(tiny: Tiny, tmp_path: Path) -> None:
    base, layout = shutil.copytree(tiny.model("causal-lm"), tmp_path / "base"), Layout(tmp_path / "runs")
    found = space(tiny, model_name_or_path=str(base))
    began = preflight(found).digests
    study = open_study(found, layout, began)
    next_trial(study)
    study.release()
    check_study(found, layout, True, preflight(found).digests)
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, base / "model.safetensors")
    now = preflight(found).digests
    was, given = (digests[f"model {base}"] for digests in (began, now))
    with pytest.raises(UserError) as caught:
        check_study(found, layout, True, now)
    line = f"study 's' began with other base model: {base} was '{was}', is '{given}'"
    assert str(caught.value) == f"{line}; {ONLY}"
    # A study of 0.1.0 says nothing of its base.
    study.study.set_user_attr("digests", {key: value for key, value in began.items() if not key.startswith("model ")})
    check_study(found, layout, True, now)


def test_every_base_that_is_searched_is_known_from_the_start(tiny: Tiny) -> None:
    names = [str(tiny.model("causal-lm")), "builtin:quickstart/model"]
    given = tiny.config("causal-lm").model_dump(exclude_unset=True) | {"model_name_or_path": f"{{choice: {names}}}"}
    texts = [f"{key}={value}" for key, value in given.items()]
    digests = preflight(load_space(None, [*texts, "study.name=s"])).digests
    assert [key for key in digests if key.startswith("model ")] == [f"model {name}" for name in names]


def test_every_data_that_is_searched_is_read_at_the_start(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"prompt": "say red 1 times:", "completion": "red"}] * 4
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    base = str(tiny.model("causal-lm"))
    found = space(tiny, model_name_or_path=base, train_data=f"{{choice: [{', '.join(map(str, files))}]}}")
    look(found)
    began, layout = preflight(found).digests, Layout(tmp_path / "runs")
    assert {str(file) for file in files} <= began.keys()
    study = open_study(found, layout, began)
    next_trial(study)
    study.release()
    write_rows(files[1], rows * 2)
    with pytest.raises(UserError, match=f"^study 's' began with other data: {files[1]} was "):
        check_study(found, layout, True, preflight(found).digests)
    # A study of 0.1.0 knows of the first one alone.
    study.study.set_user_attr("digests", {key: value for key, value in began.items() if key != str(files[1])})
    check_study(found, layout, True, preflight(found).digests)
    write_rows(files[1], [*rows, {"prompt": "a"}])
    for refuses in (preflight, look):
        with pytest.raises(UserError) as caught:
            refuses(found)
        line = f"{files[1]}, line 5: no column 'completion' (completion_template); columns: prompt"
        assert str(caught.value) == line


def test_every_template_that_is_searched_is_filled_at_the_start(tiny: Tiny) -> None:
    templates = '{choice: ["{prompt}", "{question}"]}'
    found = space(tiny, model_name_or_path=str(tiny.model("causal-lm")), prompt_template=templates)
    for refuses in (preflight, look):
        with pytest.raises(UserError, match=r", line 1: no column 'question'; columns: prompt, completion"):
            refuses(found)


def test_a_model_in_parts_is_not_looked_at_and_that_is_told(tiny: Tiny) -> None:
    local = {"model_name_or_path": str(tiny.model("causal-lm"))}
    told = preflight(space(tiny, "resources.workers=2", "resources.parallelism=fsdp", **local)).notes
    assert [note.partition(":")[0] for note in told] == ["parallelism"]
    assert preflight(space(tiny, "resources.workers=2", **local)).notes == ()


def test_trials_of_a_kernel_are_asked_for_each_precision_that_they_may_get(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def answer(*words: str) -> str | None:
        asked.append(words[1:])
        return "precision: bf16" if words[-1] == "fp32" else ""

    monkeypatch.setattr(gpus, "_answer", answer)
    texts = ["attn_implementation={choice: [eager, varlen]}", "resources.gpus_per_worker=1"]
    check_kernels(space(tiny, *texts), apart=True)
    assert asked == [("varlen", "auto")]
    with pytest.raises(UserError, match=r"^attn_implementation: varlen needs precision: bf16$"):
        check_kernels(space(tiny, *texts, "precision={choice: [bf16, fp32]}"), apart=True)
    assert asked[1:] == [("varlen", "bf16"), ("varlen", "fp32")]


def test_torch_is_not_imported_for_a_kernel_that_is_not_looked_for() -> None:
    line = (
        "import sys; from bilora_ray.search.preflight import check_kernels\n"
        "from bilora_ray.search.space_file import load_space\n"
        "check_kernels(load_space(None, sys.argv[1:]), apart=True); print('torch' in sys.modules)"
    )
    trial = {"model_name_or_path": "a/b", "task": "causal-lm", "train_data": "a/b", "attn_implementation": "sdpa"}
    texts = ["study.name=s", *(f"trial.{key}={value}" for key, value in trial.items())]
    done = subprocess.run([sys.executable, "-c", line, *texts], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_finalists_train_beside_the_budgets_of_their_search_is_told(tiny: Tiny) -> None:
    local = {"model_name_or_path": str(tiny.model("causal-lm"))}
    budget = "study.max_device_hours=2"
    (note,) = preflight(space(tiny, budget, "study.finalists=2", "study.finalist_seeds=4", **local)).notes
    more = "then come 8 trainings of its finalists, each as long as a whole trial"
    assert note == f"max_device_hours ends the search alone; {more}"
    assert preflight(space(tiny, budget, **local)).notes == ()


def test_retention_data_are_checked_and_known(tiny: Tiny, tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "the sky"}])
    rows = write_rows(tmp_path / "test.jsonl", [{"prompt": "say red", "completion": "red"}] * 3)
    given, model = ("study.finalists=2", f"test_data={rows}"), str(tiny.model("causal-lm"))
    checked = preflight(space(tiny, *given, f"retention_data={texts}", model_name_or_path=model))
    assert checked.digests[str(texts)] == hashlib.sha256(texts.read_bytes()).hexdigest()[:16]
    with pytest.raises(UserError, match="retention_data: org/wiki is no file here"):
        preflight(space(tiny, *given, "retention_data=org/wiki", model_name_or_path=model))


def test_test_data_are_checked_and_known_and_what_was_trained_on_is_told(tiny: Tiny, tmp_path: Path) -> None:
    rows = tmp_path / "test.jsonl"
    rows.write_text((tiny.folder / "texts-train.jsonl").read_text())
    checked = preflight(
        space(tiny, "study.finalists=2", f"test_data={rows}", model_name_or_path=str(tiny.model("causal-lm")))
    )
    digests = checked.digests
    assert str(rows) in digests
    (line,) = (line for line in checked.notes if line.startswith("test_data"))
    assert line == "test_data: 44 of 44 test rows are training or validation rows too"
    wrong = tiny.folder / "labels-train.jsonl"
    with pytest.raises(UserError, match=f"{wrong}, line 1"):
        preflight(
            space(tiny, "study.finalists=2", f"test_data={wrong}", model_name_or_path=str(tiny.model("causal-lm")))
        )
