"""Bad input: what is typed, and the one line that comes back with exit code 2."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from tiny_trials import TASKS

from bilora_ray.cli.main import main

ROW = '{"prompt": "1 + 1 =", "completion": " 2"}\n'


@dataclass(frozen=True)
class Case:
    """A command line, what is changed before it, and the line that it must print.

    Attributes:
        typed: the command line, in a folder with `space.yaml`, `data.jsonl` and the model folder `model`.
        line: on stderr, without the leading "Error: "; {here} is the folder.
        trial: settings that replace those of the space file; None removes one.
        study: the same for its study section.
        files: text files to write first.
        before: done before all that.
    """

    typed: str
    line: str
    trial: dict[str, object] | None = None
    study: dict[str, object] | None = None
    files: dict[str, str] | None = None
    before: Callable[[Path], None] | None = None


TUNE = "tune --space space.yaml"
CASES: dict[str, Case] = {
    "missing space file": Case("tune --space nope.yaml", "nope.yaml: no such file"),
    "empty space file": Case(
        TUNE, "space.yaml: is empty; a space file has the sections study, trial, resources", files={"space.yaml": ""}
    ),
    "torn YAML": Case(
        TUNE,
        "space.yaml, line 2: not valid YAML (expected ',' or ']', but got '<stream end>')",
        files={"space.yaml": "study: {name: s}\ntrial: {rank: [1, 2"},
    ),
    "unknown section": Case(
        TUNE, "space.yaml: unknown section 'trails'; did you mean 'trial'?", files={"space.yaml": "trails: {}"}
    ),
    "unknown key": Case(TUNE, "space.yaml: trial: unknown key 'rhoo'; did you mean 'rho'?", trial={"rhoo": 1}),
    "unknown study key": Case(
        TUNE, "space.yaml: study: unknown key 'num_trails'; did you mean 'num_trials'?", study={"num_trails": 3}
    ),
    "missing key": Case(TUNE, "space.yaml: trial: 'task' is missing", trial={"task": None}),
    "wrong type": Case(
        TUNE,
        "space.yaml: trial: learning_rate: should be a valid number, unable to parse string as a number, got 'fast'",
        trial={"learning_rate": "fast"},
    ),
    "wrong range": Case(
        TUNE, "space.yaml: trial: lora_dropout: should be less than 1, got 1.5", trial={"lora_dropout": 1.5}
    ),
    "distribution outside the setting's range": Case(
        TUNE, "space.yaml: trial: rho: should be greater than 0, got -1.0", trial={"rho": {"low": -1, "high": 1}}
    ),
    "low above high": Case(
        TUNE,
        "space.yaml: trial.rho: low must be below high, got low 1 and high 0.1",
        trial={"rho": {"low": 1, "high": 0.1}},
    ),
    "unknown task": Case(
        TUNE,
        f"space.yaml: trial: task: should be {', '.join(map(repr, TASKS[:-1]))} or {TASKS[-1]!r}, got 'chat'",
        trial={"task": "chat"},
    ),
    "unknown metric": Case(
        TUNE,
        "space.yaml: trial: metric: 'eval_los' is not measured here; did you mean 'eval_loss'?",
        trial={"metric": "eval_los"},
    ),
    "metric that is not measured": Case(
        TUNE,
        "space.yaml: trial: metric: 'eval_exact_match' is not measured here; it needs predict_with_generate: true",
        trial={"metric": "eval_exact_match"},
    ),
    "space without distributions": Case(
        TUNE,
        "space.yaml: no setting has a distribution, so there is nothing to search: bilora-ray train",
        trial={"rho": 0.05},
    ),
    "study name that is a path": Case(
        TUNE,
        "space.yaml: study: name: must be up to 100 letters, digits, '.', '_' or '-', the first a letter or a digit, "
        "got '../up'",
        study={"name": "../up"},
    ),
    "missing data file": Case(
        TUNE, "space.yaml: trial.train_data: no such file: {here}/nope.jsonl", trial={"train_data": "nope.jsonl"}
    ),
    "empty data file": Case(TUNE, "train_data: no rows in {here}/data.jsonl", files={"data.jsonl": ""}),
    "torn JSON line": Case(
        TUNE,
        "{here}/data.jsonl, line 3: not valid JSON (Unterminated string starting at: column 23)",
        files={"data.jsonl": ROW + ROW + ROW[:30]},
    ),
    "missing column": Case(
        TUNE,
        "{here}/data.jsonl, line 1: no column 'question'; columns: prompt, completion",
        trial={"prompt_template": "{question}"},
    ),
    "row with a list": Case(
        TUNE,
        "{here}/data.jsonl, line 2: column 'completion' must be text or a number, not list",
        files={"data.jsonl": ROW + '{"prompt": "a", "completion": []}\n'},
    ),
    "label outside the set": Case(
        TUNE,
        "{here}/dev.csv, line 3: label '2' is not among the labels (0, 1)",
        trial={
            "task": "sequence-classification",
            "train_data": "train.csv",
            "validation_data": "dev.csv",
        },
        files={"train.csv": "text,label\ngood,1\nbad,0\n", "dev.csv": "text,label\ngood,1\nbad,2\n"},
    ),
    "torn CSV": Case(
        TUNE,
        "{here}/train.csv, line 3: 1 columns instead of 2 (prompt, completion), "
        'as read with delimiter ",", quoting csv',
        trial={"train_data": "train.csv"},
        files={"train.csv": "prompt,completion\na,b\nc\n"},
    ),
    "unknown model folder": Case(
        TUNE,
        "space.yaml: trial.model_name_or_path: no such folder: {here}/nope",
        trial={"model_name_or_path": "./nope"},
    ),
    "folder without a model": Case(
        TUNE,
        "model_name_or_path: {here}/empty holds no model: config.json is missing",
        trial={"model_name_or_path": "empty"},
        before=lambda here: (here / "empty").mkdir(),
    ),
    "unknown built-in": Case(
        TUNE,
        "space.yaml: trial.model_name_or_path: no built-in 'quickstart/modle'; did you mean 'quickstart/model'?",
        trial={"model_name_or_path": "builtin:quickstart/modle"},
    ),
    "unknown Hub model": Case(
        TUNE,
        "model_name_or_path: no folder 'no/such-model' here, and the Hub, where it may be, cannot be reached",
        trial={"model_name_or_path": "no/such-model"},
    ),
    "folder that cannot be written": Case(
        f"{TUNE} --storage-path /proc/none",
        "--storage-path /proc/none: cannot be written (No such file or directory)",
    ),
    "Ray address where nothing listens": Case(
        f"{TUNE} --ray-address 127.0.0.1:9",
        "--ray-address 127.0.0.1:9: no Ray cluster answers (Connection refused)",
    ),
    "settings that make trials incomparable": Case(
        TUNE,
        "space.yaml: trial.max_length: must have one value: trials that differ in it cannot be compared",
        trial={"max_length": {"choice": [64, 128]}},
    ),
    "--set without a value": Case(f"{TUNE} --set rho", "--set rho: must be key=value"),
    "--set of an unknown key": Case(f"{TUNE} --set rank_=4", "--set trial: unknown key 'rank_'; did you mean 'rank'?"),
    "--set of an unknown section": Case(
        f"{TUNE} --set stud.seed=4", "--set stud.seed=4: unknown section 'stud'; did you mean 'study'?"
    ),
    "too few trials": Case(
        f"{TUNE} --num-trials 0",
        "Invalid value for '--num-trials': 0 is not in the range x>=1. See 'main tune --help'.",
    ),
    "--num-trials that is no number": Case(
        f"{TUNE} --num-trials ten",
        "Invalid value for '--num-trials': 'ten' is not a valid integer range. See 'main tune --help'.",
    ),
    "unknown option": Case(
        "tune --spcae space.yaml",
        "No such option '--spcae'. (Did you mean one of: '--set', '--space'?) See 'main tune --help'.",
    ),
    "option without its verb": Case("--space space.yaml", "No such option '--space'. See 'main --help'."),
    "unknown verb": Case("tun", "no command 'tun'; did you mean 'tune'?"),
    "unknown key of settings": Case("settings rhoo", "no key 'rhoo'; did you mean 'rho'?"),
    "key that is given twice": Case(
        TUNE,
        "space.yaml, line 4: not valid YAML ('rank' is given twice)",
        files={"space.yaml": "study: {name: s}\ntrial:\n  rank: 8\n  rank: 4\n"},
    ),
    "--set that does not go with the file": Case(
        f"{TUNE} --set predict_with_generate=false",
        "space.yaml: trial, with --set: metric: 'eval_exact_match' is not measured here; it needs "
        "predict_with_generate: true",
        trial={"metric": "eval_exact_match", "predict_with_generate": True},
    ),
    "choice without values": Case(
        TUNE,
        "space.yaml: trial.rank: choice: should be a valid tuple, got None",
        files={"space.yaml": "study: {name: s}\ntrial:\n  rank: {choice: }\n"},
    ),
    "Ray Client": Case(
        f"{TUNE} --ray-address ray://127.0.0.1:10001",
        "--ray-address ray://127.0.0.1:10001: a search does not run over Ray Client; use bilora-ray submit",
    ),
    "text in braces without quotes": Case(
        f"{TUNE} --set completion_template={{answer}}",
        '--set trial.completion_template: a text that starts with a brace needs quotes: "{{answer}}"',
    ),
    "dry run of more workers than there is room for": Case(
        f"{TUNE} --dry-run --set resources.workers=999",
        "resources: a trial wants 999 workers with 1 CPUs and 0 GPUs each, "
        f"and there are {os.cpu_count()} CPUs and 0 GPUs",
    ),
    "dry run with a target module that is not there": Case(
        f"{TUNE} --dry-run --set max_length=64 --set target_modules=[qq_proj]",
        "target_modules: Target modules {{'qq_proj'}} not found in the base model. "
        "Please check the target modules and try again.",
        trial={"model_name_or_path": "builtin:quickstart/model"},
    ),
    "dry run that reads on behind the last position": Case(
        f"{TUNE} --dry-run --set max_length=100000",
        "max_length: 100000 is more than the model's 128 positions; write 128 or less",
        trial={"model_name_or_path": "builtin:quickstart/model"},
    ),
    "rows that are read on behind the last position": Case(
        f"{TUNE} --set max_length=129",
        "max_length: 129 is more than the model's 128 positions; write 128 or less",
        trial={"model_name_or_path": "builtin:quickstart/model"},
    ),
    "resume of nothing": Case(f"{TUNE} --resume", "study 'bad': nothing to resume in {here}/runs"),
    "storage path that is a file": Case(
        f"{TUNE} --storage-path data.jsonl", "--storage-path {here}/data.jsonl: cannot be written (Not a directory)"
    ),
    "train with distributions": Case(
        "train --space space.yaml", "space.yaml: one run needs one value for each setting; give --set rho=VALUE"
    ),
    "train with a distribution of each method": Case(
        "train --space space.yaml",
        "space.yaml: one run needs one value for each setting; give --set method=VALUE, --set learning_rate=VALUE, "
        "--set rho=VALUE",
        trial={
            "method": {"choice": ["lora", "bilora"]},
            "learning_rate": [
                {"low": 1e-4, "high": 1e-3, "when": {"method": "lora"}},
                {"low": 1e-5, "high": 1e-4, "when": {"method": "bilora"}},
            ],
        },
    ),
    "show without runs": Case("show", "--storage-path runs: no such folder; `bilora-ray tune` and `train` make it"),
    "train of a study and a space": Case(
        "train --space space.yaml --study s", "--study: --space says the settings already; give one of the two"
    ),
    "train of a trial of no study": Case("train --trial 3", "--trial: needs --study"),
    "train of an unknown study": Case("train --study nope", "study 'nope': not in {here}/runs"),
    "evaluate with a setting of training": Case(
        "evaluate model --set rank=4", "--set rank=4: changes nothing in an evaluation, which trains nothing"
    ),
    "evaluate on a file that is not there": Case(
        "evaluate model --data gone.jsonl", "--data: no such file: {here}/gone.jsonl"
    ),
    "show of an unknown study": Case("show nope", "study 'nope': not in {here}/runs"),
    "export of an unknown study": Case("export nope --output out", "study 'nope': not in {here}/runs"),
    "evaluate of no adapter": Case("evaluate model", "model: no adapter here (adapter_config.json is missing)"),
    "ui without runs": Case("ui", "--storage-path runs: no runs here yet; `bilora-ray tune` makes them"),
}


LABELLED = {"task": "sequence-classification", "train_data": "train.csv"}
CASES |= {
    "unknown suffix": Case(
        TUNE,
        "train_data: {here}/rows.xlsx has an unknown suffix; allowed: .jsonl, .ndjson, .json, .csv, .tsv, .txt, "
        ".parquet, .arrow, and of text .gz, .bz2, .zst after it",
        trial={"train_data": "rows.xlsx"},
        files={"rows.xlsx": "PK"},
    ),
    "split of a file": Case(
        TUNE,
        "validation_split: {here}/data.jsonl has no splits; name a file in validation_data",
        trial={"validation_split": "test"},
    ),
    "conversation for a task without": Case(
        TUNE,
        "messages_column: only causal-lm takes chat messages, not seq2seq-lm",
        trial={"task": "seq2seq-lm", "messages_column": "messages"},
    ),
    "message without a role": Case(
        TUNE,
        "{here}/data.jsonl, line 1: message 1 must have a role and a content, both text",
        trial={"messages_column": "messages"},
        files={"data.jsonl": '{"messages": [{"content": "a"}]}\n' * 2},
    ),
    "one row": Case(
        TUNE,
        "validation_data: missing, and {here}/data.jsonl has too few rows to split (1)",
        files={"data.jsonl": ROW},
    ),
    "label column that is not there": Case(
        TUNE,
        "{here}/train.csv, line 2: no column 'label' (label_column); columns: text, gold",
        trial=LABELLED,
        files={"train.csv": "text,gold\na,1\nb,0\n"},
    ),
    "text column that is not there": Case(
        TUNE,
        "{here}/train.csv, line 2: no column 'text' (text_column); columns: review, label",
        trial=LABELLED,
        files={"train.csv": "review,label\n" + "a,1\n" * 30 + "b,0\n"},
    ),
    "row without a label": Case(
        TUNE,
        "{here}/train.csv, line 3: column 'label' has no value",
        trial=LABELLED,
        files={"train.csv": "text,label\na,1\nb,\nc,0\n"},
    ),
    "label that is not among the given ones": Case(
        TUNE,
        "{here}/train.csv, line 3: label 'c' is not among the labels (a, b)",
        trial={**LABELLED, "label_names": ["a", "b"]},
        files={"train.csv": "text,label\nx,a\nx,c\n"},
    ),
    "attention kernel that is not installed": Case(
        TUNE,
        "attn_implementation: flash_attention_2 needs the package flash-attn: pip install flash-attn",
        trial={"attn_implementation": {"choice": ["sdpa", "flash_attention_2"]}},
    ),
    "attention kernel of the Hub without what loads it": Case(
        "train --space space.yaml --set rho=0.05",
        "attn_implementation: kernels-community/flash-attn2 needs the package kernels: pip install kernels",
        trial={"attn_implementation": "kernels-community/flash-attn2"},
    ),
    "attention kernel for trials without a GPU": Case(
        TUNE,
        "attn_implementation: varlen needs a GPU, and resources.gpus_per_worker is 0",
        trial={"attn_implementation": "varlen"},
    ),
    "attention kernel on a machine without a GPU": Case(
        f"{TUNE} --set resources.gpus_per_worker=1",
        "attn_implementation: varlen needs a GPU, and none can be seen here",
        trial={"attn_implementation": "varlen"},
    ),
    "attention kernel for a run without a GPU": Case(
        "train --space space.yaml --set rho=0.05",
        "attn_implementation: varlen needs a GPU, and none can be seen here",
        trial={"attn_implementation": "varlen"},
    ),
    "completion without an answer": Case(
        TUNE,
        "{here}/dev.jsonl, line 1: answer_pattern matches nothing in the completion",
        trial={"validation_data": "dev.jsonl", "predict_with_generate": True, "answer_pattern": "#(.*)"},
        files={"dev.jsonl": ROW},
    ),
}


def _prepare(case: Case, here: Path) -> None:
    space = {
        "study": {"name": "bad", "num_trials": 1},
        "trial": {
            "model_name_or_path": "model",
            "task": "causal-lm",
            "train_data": "data.jsonl",
            "rho": {"low": 0.01, "high": 0.1},
        },
    }
    for section, changes in (("trial", case.trial), ("study", case.study)):
        space[section] |= changes or {}  # type: ignore[operator]
        space[section] = {key: value for key, value in space[section].items() if value is not None}
    (here / "space.yaml").write_text(yaml.safe_dump(space))
    (here / "data.jsonl").write_text(ROW * 8)
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, text in (case.files or {}).items():
        (here / name).write_text(text)
    if case.before is not None:
        case.before(here)


def _run(typed: str) -> Result:
    return CliRunner().invoke(main, typed.split())


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_2(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _prepare(case, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = _run(case.typed)
    assert result.stderr == f"Error: {case.line.format(here=os.path.realpath(tmp_path))}\n"
    assert result.stdout == ""
    assert result.exit_code == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("http://127.0.0.1:9", "--mlflow-uri http://127.0.0.1:9: MLflow does not answer (connection refused)"),
        (
            "./mlruns",
            "--mlflow-uri ./mlruns: MLflow keeps no runs in plain folders any more; "
            "name a file, as in sqlite:///{here}/mlruns/mlflow.db",
        ),
    ],
)
def test_an_mlflow_that_cannot_be_used_is_one_line_and_begins_no_study(
    uri: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _prepare(Case("", ""), tmp_path)
    result = _run(f"train --space space.yaml --set rho=0.05 --mlflow-uri {uri}")
    assert result.stderr == f"opening MLflow\nError: {line.format(here=os.path.realpath(tmp_path))}\n"
    assert (result.stdout, result.exit_code) == ("", 2)
    assert _run("show").stdout == f"no studies in {os.path.realpath(tmp_path)}/runs\n"


# What the first rows of a file show.
AT_A_LOOK = (
    "missing data file",
    "empty data file",
    "torn JSON line",
    "missing column",
    "row without a label",
    "torn CSV",
    "unknown model folder",
    "folder without a model",
    "rows that are read on behind the last position",
    "unknown suffix",
    "split of a file",
    "conversation for a task without",
    "message without a role",
    "one row",
    "label column that is not there",
    "text column that is not there",
    "label that is not among the given ones",
    "completion without an answer",
)


@pytest.mark.parametrize("name", AT_A_LOOK)
@pytest.mark.parametrize("verb", ["tune --space", "validate"])
def test_what_tune_refuses_at_once_validate_refuses_with_the_same_line(
    verb: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    _prepare(case, tmp_path)
    result = _run(case.typed.replace("tune --space", verb))
    assert result.stderr == f"Error: {case.line.format(here=os.path.realpath(tmp_path))}\n"
    assert (result.stdout, result.exit_code) == ("", 2)


@pytest.mark.parametrize(
    ("trial", "files"),
    [
        # A file that is sorted by label begins with one.
        (LABELLED, {"train.csv": "text,label\n" + "a,1\n" * 30 + "b,0\n"}),
        # The Hub is not asked.
        ({"train_data": "no/such-data", "model_name_or_path": "no/such-model"}, {}),
        ({"train_data": "no/such-data", "validation_data": "no/other", "validation_split": "test"}, {}),
    ],
)
def test_what_only_a_whole_file_or_the_hub_could_tell_is_valid_at_a_look(
    trial: dict[str, object], files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _prepare(Case("", "", trial=trial, files=files), tmp_path)
    result = _run("validate space.yaml")
    assert (result.stderr, result.exit_code) == ("", 0)
