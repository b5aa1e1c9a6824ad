"""Sources: local paths become absolute once, names of other places stay as they are, a missing file is told."""

import os
from pathlib import Path
from typing import Any

import pytest

from bilora_ray.builtin import path as built_in
from bilora_ray.errors import UserError
from bilora_ray.paths import cached_commit, have_home, kind_by_name, kind_of, loadable, locate_here
from bilora_ray.search.space_file import absolute_sources
from bilora_ray.settings import SOURCES

DATA = ("train_data", "validation_data")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "spaces"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text("{}\n")
    (folder / "model").mkdir()
    (tmp_path / "beside.csv").write_text("a\n")
    return folder


def refused(settings: dict[str, Any], base: Path) -> str:
    with pytest.raises(UserError) as caught:
        absolute_sources(settings, base, "W")
    return str(caught.value)


@pytest.mark.parametrize("setting", DATA)
@pytest.mark.parametrize("name", ["data/train.jsonl", "./data/train.jsonl", "data/../data/train.jsonl"])
def test_a_relative_path_starts_at_the_given_folder_wherever_the_process_is(
    setting: str, name: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert absolute_sources({setting: name}, base, "W") == {setting: str(base / "data" / "train.jsonl")}


def test_a_path_may_lead_out_of_the_folder(base: Path) -> None:
    assert absolute_sources({"train_data": "../beside.csv"}, base, "W")["train_data"] == str(base.parent / "beside.csv")


def test_an_absolute_path_does_not_care_for_the_folder(base: Path) -> None:
    file = str(base / "data" / "train.jsonl")
    assert absolute_sources({"train_data": file}, Path("/nowhere"), "W") == {"train_data": file}


def test_a_tilde_is_the_home_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(base))
    assert absolute_sources({"train_data": "~/data/train.jsonl"}, Path("/nowhere"), "W") == {
        "train_data": str(base / "data" / "train.jsonl")
    }


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("model_name_or_path", "builtin:quickstart/model"),
        *((setting, "builtin:quickstart/test.jsonl") for setting in DATA),
    ],
)
def test_a_builtin_name_stays(setting: str, name: str, base: Path) -> None:
    assert absolute_sources({setting: name}, base, "W") == {setting: name}


@pytest.mark.parametrize(
    ("setting", "name", "problem"),
    [
        (
            "model_name_or_path",
            "builtin:quickstart/modle",
            "no built-in 'quickstart/modle'; did you mean 'quickstart/model'?",
        ),
        ("model_name_or_path", "builtin:quickstart/test.jsonl", "'builtin:quickstart/test.jsonl' is data"),
        ("train_data", "builtin:quickstart/model", "'builtin:quickstart/model' is a model"),
        ("train_data", ".", "{base} is a folder without data files; it holds the folders data, model"),
        ("train_data", "data/*.csv", "no file matches {base}/data/*.csv"),
        ("model_name_or_path", "data/train.jsonl", "{base}/data/train.jsonl is a file; a model is a folder"),
    ],
)
def test_what_cannot_be_such_a_source_is_refused(setting: str, name: str, problem: str, base: Path) -> None:
    assert refused({setting: name}, base) == f"W.{setting}: {problem.format(base=base)}"


@pytest.mark.parametrize("setting", SOURCES)
@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "nyu-mll/glue", "gpt2", "tatsu-lab/alpaca_v1.0"])
def test_a_hub_name_stays(setting: str, name: str, base: Path) -> None:
    assert absolute_sources({setting: name}, base, "W") == {setting: name}


@pytest.mark.parametrize("name", ["data", "data/*.jsonl", "d*/tr?in.[j]sonl"])
def test_a_folder_and_a_pattern_of_data_are_absolute_too(name: str, base: Path) -> None:
    assert absolute_sources({"train_data": name}, base, "W") == {"train_data": str(base / name)}


def test_a_link_to_a_shard_that_is_gone_is_not_passed_over(base: Path) -> None:
    (base / "data" / "part-1.jsonl").symlink_to(base / "gone")
    folder = base / "data"
    problem = f"holds what is not read (part-1.jsonl); name what is, as in {folder}/*.jsonl"
    assert refused({"train_data": "data"}, base) == f"W.train_data: {folder} {problem}"


def test_a_local_folder_goes_before_a_hub_name(base: Path) -> None:
    assert absolute_sources({"model_name_or_path": "model"}, base, "W") == {"model_name_or_path": str(base / "model")}


@pytest.mark.parametrize("setting", DATA)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "owner/x.csv", "x.tsv", "x.parquet", "./x", "a/b/c", "a b"])
def test_a_missing_data_file_is_told_with_the_path_that_was_tried(setting: str, name: str, base: Path) -> None:
    assert refused({setting: name}, base) == f"W.{setting}: no such file: {base / name}"


@pytest.mark.parametrize("name", ["./gone", "../gone", "/gone", "a/b/c", "-x", "a b"])
def test_a_missing_model_folder_is_told_with_the_path_that_was_tried(name: str, base: Path) -> None:
    assert refused({"model_name_or_path": name}, base) == f"W.model_name_or_path: no such folder: {base / name}"


def test_a_missing_file_at_home_is_told_with_its_whole_path(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(base))
    assert refused({"train_data": "~/gone"}, base) == f"W.train_data: no such file: {base}/gone"


def test_a_home_that_does_not_exist_is_told_without_a_traceback(base: Path) -> None:
    name = "~no-such-user-here/x.jsonl"
    assert refused({"train_data": name}, base) == f"W.train_data: {name}: Could not determine home directory."


def test_a_path_that_the_system_refuses_is_told_without_a_traceback(base: Path) -> None:
    name = "x" * 300
    assert refused({"train_data": name}, base) == f"W.train_data: {name}: File name too long"


def test_every_value_of_a_choice_is_treated(base: Path) -> None:
    choice = {"choice": ["data/train.jsonl", "builtin:quickstart/train.jsonl", "nyu-mll/glue", "../beside.csv"]}
    assert absolute_sources({"train_data": choice}, base, "W")["train_data"] == {
        "choice": [
            str(base / "data" / "train.jsonl"),
            "builtin:quickstart/train.jsonl",
            "nyu-mll/glue",
            str(base.parent / "beside.csv"),
        ]
    }


def test_a_missing_file_in_a_choice_is_told(base: Path) -> None:
    choice = {"choice": ["data/train.jsonl", "gone.csv"]}
    assert refused({"validation_data": choice}, base) == f"W.validation_data: no such file: {base / 'gone.csv'}"


def test_only_sources_are_paths(base: Path) -> None:
    settings = {"prompt_template": "data/train.jsonl", "metric": "./x", "rank": 8, "text_column": "model"}
    assert absolute_sources(settings, base, "W") == settings


@pytest.mark.parametrize("value", [None, "", 7, ["data/train.jsonl"], {"choice": 3}, {"low": 1, "high": 2}])
def test_what_is_no_path_is_left_for_the_check_of_types(value: Any, base: Path) -> None:
    assert absolute_sources({"train_data": value}, base, "W") == {"train_data": value}


def test_the_given_settings_are_not_changed(base: Path) -> None:
    choice = {"choice": ["data/train.jsonl"]}
    settings = {"train_data": choice, "model_name_or_path": "model"}
    absolute_sources(settings, base, "W")
    assert settings == {"train_data": {"choice": ["data/train.jsonl"]}, "model_name_or_path": "model"}
    assert settings["train_data"] is choice


# Local, built in or on the Hub


@pytest.mark.parametrize(
    ("name", "model", "data"),
    [
        ("builtin:quickstart/model", "built in", "built in"),
        ("/gone", "local", "local"),
        ("./gone", "local", "local"),
        ("../gone", "local", "local"),
        ("~/gone", "local", "local"),
        ("gone.jsonl", "hub", "local"),
        ("gone.TSV.gz", "hub", "local"),
        ("gone/part-*", "hub", "local"),
        ("gone.parquet.gz", "hub", "hub"),
        ("owner/gone.csv", "hub", "local"),
        ("gpt2", "hub", "hub"),
        ("nyu-mll/glue", "hub", "hub"),
    ],
)
def test_a_name_says_where_a_source_is(name: str, model: str, data: str) -> None:
    assert (kind_by_name(name, is_data=False), kind_by_name(name, is_data=True)) == (model, data)
    assert (kind_of(name, is_data=False), kind_of(name, is_data=True)) == (model, data)


def test_what_is_here_goes_before_what_the_hub_may_have(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    (base / "rows").write_text("{}\n")
    assert (kind_by_name("model", is_data=False), kind_of("model", is_data=False)) == ("hub", "local")
    assert (kind_of("rows", is_data=True), kind_of("rows", is_data=False)) == ("local", "hub")  # a model is a folder
    assert cached_commit("model", None) is None


def test_a_library_takes_a_path_for_what_is_built_in_and_other_names_as_they_are() -> None:
    assert loadable("builtin:quickstart/model") == str(built_in("quickstart/model"))
    assert [loadable(name) for name in ("./x", "~/x", "owner/x")] == ["./x", "~/x", "owner/x"]
    with pytest.raises(UserError, match="no built-in 'quickstart/modle'"):
        loadable("builtin:quickstart/modle")


def test_a_process_without_a_home_is_given_one_in_which_nobody_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/mine")
    have_home()
    assert os.environ["HOME"] == "/mine"
    monkeypatch.delenv("HOME")

    def unknown(_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    have_home()
    assert os.environ["HOME"] == "/"


def test_a_misspelt_suffix_is_no_name_of_the_hub_where_the_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text("{}")
    with pytest.raises(UserError) as caught:
        locate_here("chat.jsnol", tmp_path, "W", True)
    assert str(caught.value) == f"W: no such file: {tmp_path}/chat.jsnol; did you mean 'chat.jsonl'?"
    assert locate_here("org/chat.jsnol", tmp_path, "W", True) == "org/chat.jsnol"
    assert locate_here("squad", tmp_path, "W", True) == "squad"
    assert locate_here("other.data", tmp_path, "W", True) == "other.data"
