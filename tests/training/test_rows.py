"""Rows: what the settings make of the records, and each error as a user sees it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.rows import check_first_rows, load_rows
from bilora_ray.training.tasks.base import Dataset
from bilora_ray.training.tasks.causal_lm import ChatRow
from bilora_ray.training.tasks.sequence_classification import LabelledRow
from bilora_ray.training.tasks.text import TextRow

ROOT = Path(__file__).resolve().parents[2]

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}


class Folder:
    """Data files as a user writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, rows: list[Any], name: str = "train.jsonl") -> str:
        path = self.path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def load(self, rows: list[Any], validation: list[Any] | None = None, **settings: Any) -> Dataset:
        settings = {"model_name_or_path": "m", "task": "causal-lm", **settings}
        if validation is not None:
            settings["validation_data"] = self.write(validation, "dev.jsonl")
        return load_rows(TrialConfig(train_data=self.write(rows), **settings))

    def error(self, rows: list[Any], validation: list[Any] | None = None, **settings: Any) -> str:
        """The error's text with the folder's path taken out."""
        with pytest.raises(UserError) as caught:
            self.load(rows, validation, **settings)
        return str(caught.value).replace(f"{self.path}/", "")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(count)]


def classified(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]


def labels_of(dataset: Dataset) -> list[int]:
    return [row.label for row in dataset.train if isinstance(row, LabelledRow)]


# Templates


def test_templates_are_filled_literally(folder: Folder) -> None:
    rows = [{"a b": "{x}", "0": 3, "n-n": 2.5, "x": True, "unused": None}]
    dataset = folder.load(rows, rows, prompt_template="{{}} {a b} {0}", completion_template="{n-n} {x}")
    where = f"{folder.path}/train.jsonl, line 1"
    assert dataset.train == [TextRow("{} {x} 3", "2.5 true", where)]
    assert dataset.label_names is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*numbered(2), {"question": "a", "answer": "b"}],
            "train.jsonl, line 3: no column 'prompt' (prompt_template); columns: question, answer",
        ),
        (
            [{"Prompt": "a", "completion": "b"}],
            "train.jsonl, line 1: no column 'prompt' (prompt_template); did you mean 'Prompt'? "
            "columns: Prompt, completion",
        ),
        ([{}], "train.jsonl, line 1: no column 'prompt' (prompt_template); columns: none"),
        (
            [{"0": "a", "It rained.": "b"}],
            "train.jsonl, line 1: no column 'prompt' (prompt_template); columns: 0, It rained.; "
            "if the file has no header, column_names names them",
        ),
        (
            [{"prompt": ["a"], "completion": "b"}],
            "train.jsonl, line 1: column 'prompt' must be text or a number, not list",
        ),
        (
            [{"prompt": "a \ud83d", "completion": "b"}],
            "train.jsonl, line 1: column 'prompt' holds half a character (a lone surrogate)",
        ),
    ],
)
def test_wrong_columns(folder: Folder, rows: list[Any], message: str) -> None:
    assert folder.error(rows) == message
    assert folder.error(numbered(2), rows) == message.replace("train.jsonl", "dev.jsonl")


# Labels


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        (["10", "9", "-5"], ("-5", "9", "10"), [2, 1, 0]),
        (["1", "-1"], ("-1", "1"), [1, 0]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        ([1.0, 0.0, 1], ("0", "1"), [1, 0, 1]),
        ([1.5, "x", "1"], ("1", "1.5", "x"), [1, 2, 0]),
        ([True, False, True], ("false", "true"), [1, 0, 1]),
    ],
)
def test_labels_are_found_in_the_training_data(
    folder: Folder, labels: list[Any], names: tuple[str, ...], indices: list[int]
) -> None:
    dataset = folder.load(classified(*labels), classified(labels[0]), task="sequence-classification")
    assert dataset.label_names == names
    assert labels_of(dataset) == indices


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["neg", "pos", 0, 1, "0", "1", False, True, 1.0], ("neg", "pos"), [0, 1, 0, 1, 0, 1, 0, 1, 1]),
        (["1", 0, "2"], ("1", "0"), [0, 1]),
    ],
)
def test_given_labels_by_name_or_index(
    folder: Folder, labels: list[Any], names: tuple[str, ...], indices: list[int]
) -> None:
    rows = classified(*labels)[: len(indices)]
    dataset = folder.load(rows, rows, task="sequence-classification", label_names=names)
    assert (dataset.label_names, labels_of(dataset)) == (names, indices)


@pytest.mark.parametrize("kind", ["sequence-classification", "multi-label-classification", "causal-lm"])
def test_given_labels_are_all_by_name_or_all_by_index(folder: Folder, kind: str) -> None:
    """Of these names three are an index of another one."""
    names = ("1", "2", "3", "7", "x")
    settings = {"task": kind, "label_names": names, "prompt_template": "{text}", "completion_template": "{label}"}

    def found(train: Sequence[Any], validation: Sequence[Any]) -> list[str]:
        data = folder.load(classified(*train), classified(*validation), **settings)
        if kind == "causal-lm":
            return [row.completion for row in data.validation]  # type: ignore[attr-defined]
        labels = [row.label for row in data.validation]  # type: ignore[attr-defined]
        return [names[label if isinstance(label, int) else label[0]] for label in labels]

    assert found([0, 1, 2, 3, 4], [1, 2, 3]) == ["2", "3", "7"]
    assert found([1, 2, 3], ["0", 1, 2.0]) == ["1", "2", "3"]
    assert found([1, 2, 3, 7, "x"], [1, "2", 3.0]) == ["1", "2", "3"]
    assert found([4, 4], [4, 0]) == ["x", "1"]
    rest = "train.jsonl, line 3 is none; all rows give names, or all indices"
    line = f"label '0' is an index of label_names and no name, and 'x' of {rest}"
    assert folder.error(classified(1, 0, "x"), classified(1), **settings) == f"train.jsonl, line 2: {line}"
    assert folder.error(classified(1, 2, "x"), classified(0), **settings) == f"dev.jsonl, line 1: {line}"


@pytest.mark.parametrize(
    ("train", "validation", "settings", "message"),
    [
        ("ab", "abx", {}, "dev.jsonl, line 3: label 'x' is not among the labels (a, b)"),
        ([0, 1], [2], {}, "dev.jsonl, line 1: label '2' is not among the labels (0, 1)"),
        ("ab", "a0", {}, "dev.jsonl, line 2: label '0' is not among the labels (a, b)"),
        ([0, 2], "a", {"label_names": "ab"}, "train.jsonl, line 2: label '2' is not among the labels (a, b)"),
        (
            [0, -1],
            "a",
            {"label_names": "ab"},
            "train.jsonl, line 2: label '-1' is not among the labels (a, b); -1 stands for no label",
        ),
        (["a", ""], "a", {}, "train.jsonl, line 2: column 'label' has no value"),
        (["a", None], "a", {}, "train.jsonl, line 2: column 'label' has no value"),
        (["a", {}], "a", {}, "train.jsonl, line 2: column 'label' must be text or a number, not dict"),
        ("aaa", "a", {}, "train_data: every label in train.jsonl is 'a'; two or more are needed"),
        (
            range(12),
            "x",
            {},
            "dev.jsonl, line 1: label 'x' is not among the labels (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... 12 in all)",
        ),
    ],
)
def test_wrong_labels(folder: Folder, train: Any, validation: Any, settings: dict[str, Any], message: str) -> None:
    settings = {key: tuple(value) for key, value in settings.items()}
    rows, dev = classified(*train), classified(*validation)
    assert folder.error(rows, dev, task="sequence-classification", **settings) == message


def test_pairs_and_other_column_names(folder: Folder) -> None:
    rows = [{"a": "x", "b": 1, "c": label} for label in "yn"]
    columns = {"text_column": "a", "text_pair_column": "b", "label_column": "c"}
    dataset = folder.load(rows, rows, task="sequence-classification", **columns)
    assert dataset.train[0] == LabelledRow("x", "1", 1, f"{folder.path}/train.jsonl, line 1")


def test_a_label_index_becomes_its_name_in_a_template(folder: Folder) -> None:
    rows = [{"text": "x", "label": 1}, {"text": "y", "label": "neg"}]
    templates = {"prompt_template": "{text}:", "completion_template": " {label}"}
    dataset = folder.load(
        rows, rows, label_names=("neg", "pos"), predict_with_generate=True, **templates, task="seq2seq-lm"
    )
    assert [row.completion for row in dataset.train if isinstance(row, TextRow)] == [" pos", " neg"]
    assert dataset.label_names == ("neg", "pos")
    assert folder.load(rows, rows, **templates).train[0].completion == " 1"  # type: ignore[union-attr]


def test_a_validation_completion_must_have_an_answer(folder: Folder) -> None:
    rows = [{"prompt": "a", "completion": "#### x"}, {"prompt": "b", "completion": "y"}]
    settings: dict[str, Any] = {"predict_with_generate": True, "answer_pattern": "#### (.+)"}
    assert folder.error(rows, rows, **settings) == (
        "dev.jsonl, line 2: answer_pattern matches nothing in the completion"
    )
    assert folder.error(rows, rows, label_names=("y", "z"), **settings) == (
        "dev.jsonl, line 1: the completion's answer is not among the labels (y, z)"
    )
    assert len(folder.load(rows, rows[:1], **settings).train) == 2


# Conversations


def test_a_conversation_ends_with_the_last_assistant_turn(folder: Folder) -> None:
    rows = [{"chat": [USER, ASSISTANT, USER, ASSISTANT, USER]}]
    dataset = folder.load(rows, rows, messages_column="chat")
    row = dataset.train[0]
    assert row == ChatRow([USER, ASSISTANT, USER, ASSISTANT], f"{folder.path}/train.jsonl, line 1")
    assert isinstance(row, ChatRow)
    assert row.completion == "ho"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "train.jsonl, line 1: column 'chat' must be a list of messages, not str"),
        (None, "train.jsonl, line 1: column 'chat' has no value"),
        ([], "train.jsonl, line 1: no message has the role 'assistant'"),
        ([USER], "train.jsonl, line 1: no message has the role 'assistant'"),
        ([ASSISTANT], "train.jsonl, line 1: the first message is the assistant's; there is nothing it answers"),
        (
            [{"role": "user", "content": "\udc00"}],
            "train.jsonl, line 1: message 1 holds half a character (a lone surrogate)",
        ),
        ([USER, "ho"], "train.jsonl, line 1: message 2 must have a role and a content, both text"),
        ([{"role": "user"}], "train.jsonl, line 1: message 1 must have a role and a content, both text"),
        ([{"role": "user", "content": []}], "train.jsonl, line 1: message 1 must have a role and a content, both text"),
    ],
)
def test_wrong_conversations(folder: Folder, messages: Any, message: str) -> None:
    assert folder.error([{"chat": messages}], messages_column="chat") == message


@pytest.mark.parametrize("task", ["seq2seq-lm", "sequence-classification"])
def test_other_tasks_take_no_conversation(folder: Folder, task: str) -> None:
    assert folder.error([{"chat": [USER, ASSISTANT]}], messages_column="chat", task=task) == (
        f"messages_column: only causal-lm takes chat messages, not {task}"
    )


def test_rows_are_read_without_heavy_imports(folder: Folder) -> None:
    path = folder.write(numbered(3))
    code = (
        "import sys; from bilora_ray.config import TrialConfig; from bilora_ray.training.rows import load_rows\n"
        f"load_rows(TrialConfig(model_name_or_path='m', task='causal-lm', train_data={path!r}))\n"
        "print(*{'torch', 'transformers', 'datasets', 'pyarrow', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "\n"


# At a look


def looked(folder: Folder, rows: list[Any], validation: list[Any] | None = None, **settings: Any) -> str:
    """What the first rows are refused for, the same as all of them; empty if they are not, and neither are all."""
    found = []
    for look in (check_first_rows, load_rows):
        data = {"train_data": folder.write(rows)}
        if validation is not None:
            data["validation_data"] = folder.write(validation, "dev.jsonl")
        try:
            look(TrialConfig(**{"model_name_or_path": "m", "task": "sequence-classification", **data, **settings}))
            found.append("")
        except UserError as error:
            found.append(str(error).replace(f"{folder.path}/", ""))
    assert found[0] == found[1]
    return found[0]


def test_at_a_look_a_whole_file_has_its_labels(folder: Folder) -> None:
    line = "train_data: every label in train.jsonl is 'a'; two or more are needed"
    assert looked(folder, classified(*"aaaa")) == line
    assert looked(folder, classified(*["a"] * 30, "b")) == ""
    assert looked(folder, classified(*"ab"), classified("c")) == (
        "dev.jsonl, line 1: label 'c' is not among the labels (a, b)"
    )
    assert looked(folder, classified(*["a"] * 30, "b"), classified(*"bb")) == ""
    assert looked(folder, classified(-1, 0, 1)).startswith("train.jsonl, line 1: label '-1' beside labels from 0 on")
    assert looked(folder, classified(*[-1, 0, 1] * 9, "a")) == ""
    answers = [{"prompt": "p", "completion": "c", "label": number % 2} for number in range(30)]
    assert looked(folder, answers[:9], task="causal-lm").startswith("train.jsonl, line 1: label 0 marks an answer")
    assert looked(folder, [*answers, {**answers[0], "label": 2}], task="causal-lm") == ""
    line = "positive_label: 'x' is not among the labels; allowed: a, b"
    assert looked(folder, classified(*"ab"), positive_label="x") == line
    assert looked(folder, classified(*"ab" * 10, "x"), positive_label="x", f1_average="binary") == ""


@pytest.mark.parametrize("label", ["a", "", [], ["a"], '["a"]'])
def test_at_a_look_rows_of_one_label_are_looked_at_all_the_same(folder: Folder, label: Any) -> None:
    rows = classified(*[label] * 30, ["b"], ["c"])
    settings = {"task": "multi-label-classification"}
    assert looked(folder, rows, **settings) == ""
    line = "train.jsonl, line 1: no column 'texts'; did you mean 'text'? columns: text, label"
    assert looked(folder, rows, text_column="texts", **settings) == line


def test_at_a_look_rows_that_may_not_be_drawn_are_not_judged(folder: Folder) -> None:
    answers = [{"prompt": "p", "completion": "none"}] + [{"prompt": "p", "completion": "# a"}] * 40
    judged = {"task": "causal-lm", "predict_with_generate": True, "answer_pattern": "# (.+)"}
    line = "dev.jsonl, line 1: answer_pattern matches nothing in the completion"
    assert looked(folder, answers, answers, **judged) == line
    assert looked(folder, answers, answers, max_eval_samples=3, stratify=False, **judged) == line
    assert looked(folder, answers, answers, max_eval_samples=3, **judged) == ""
