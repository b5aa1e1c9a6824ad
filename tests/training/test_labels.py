"""Labels as people have them: what they are called, which are told of, and what each metric makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tiny_trials import write_rows

from bilora_ray.checking import build
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.data.labels import look_like_numbers, near_equal
from bilora_ray.training.rows import about, load_rows, notes
from bilora_ray.training.tasks.base import Dataset

Read = Callable[..., tuple[Dataset, TrialConfig]]
SECOND = "positive_label: eval_f1 is that of '{}', the second label, unless it names the other"


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The rows of a trial whose labels are given, and its settings."""

    def rows_of(train: Any, validation: Any, **settings: Any) -> tuple[Dataset, TrialConfig]:
        for split, labels in (("train", train), ("validation", validation)):
            rows = [{"text": f"{split} {number}", "label": label} for number, label in enumerate(labels)]
            settings[f"{split}_data"] = str(write_rows(tmp_path / f"{split}.jsonl", rows))
        settings = {"model_name_or_path": "m", "task": "sequence-classification", **settings}
        config = build(TrialConfig, settings, "w")
        return load_rows(config), config

    return rows_of


def told(read: Read, train: Any, validation: Any, **settings: Any) -> list[str]:
    """The notes on the labels."""
    dataset, config = read(train, validation, per_device_train_batch_size=1, **settings)
    return list(notes(dataset, config, 1))


def refused(read: Read, train: Any, validation: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(train, validation, **settings)
    return str(caught.value)


# Names


def test_every_kind_of_file_with_types_gives_a_label_the_same_name(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def names(file: Path) -> tuple[str, ...] | None:
        config = TrialConfig(
            model_name_or_path="m", task="sequence-classification", train_data=str(file), validation_data=str(file)
        )
        return load_rows(config).label_names

    kinds: dict[str, list[Any]] = {"0,1,10": [1, 0, 10], "0,0.5,1": [1, 0.5, 0], "false,true": [True, False, True]}
    kinds["no,yes"] = ["yes", "no", "yes"]
    for number, (expected, labels) in enumerate(kinds.items()):
        wanted = tuple(expected.split(","))
        rows = [{"text": "x", "label": label} for label in labels]
        assert names(write_rows(tmp_path / f"{number}.jsonl", rows)) == wanted
        types = {int: (pa.int8(), pa.float64(), pa.decimal128(9, 3)), float: (pa.float64(), pa.decimal128(9, 3))}
        kind = float if float in map(type, labels) else type(labels[0])
        for place, arrow in enumerate(types.get(kind, (None,))):
            values = [Decimal(str(label)) for label in labels] if str(arrow).startswith("decimal") else labels
            path = tmp_path / f"{number}-{place}.parquet"
            pq.write_table(pa.table({"text": ["x"] * 3, "label": pa.array(values, arrow)}), path)
            assert names(path) == wanted


def test_labels_of_texts_are_named_and_ordered_as_they_are_written(read: Read) -> None:
    """So they were in 0.1.0, and a study that goes on has its indices."""
    for labels in (["10.0", "2.0"], ["0.0", "1.0", "10.0"], ["False", "True"], ["2", "10"], ["1.0", "2"], ["02", "2"]):
        assert read(labels[::-1], labels)[0].label_names == tuple(labels)
    dataset, _ = read(["2.0", "10.0"], [2, 10.0, "2", "10.00"])
    assert [row.label for row in dataset.validation] == [1, 0, 1, 0]  # type: ignore[attr-defined]
    dataset, _ = read(["2", "2.0", "3"], [2.0, "2.0", "2.00"])
    assert [row.label for row in dataset.validation] == [0, 1, 0]  # type: ignore[attr-defined]


def test_validation_labels_of_another_kind_of_file_are_the_same_labels(read: Read) -> None:
    dataset, _ = read(["1", "0"], [1.0, "0.0", 0, "1.00"])
    assert [row.label for row in dataset.validation] == [1, 0, 0, 1]  # type: ignore[attr-defined]
    dataset, _ = read([True, False], ["True", "FALSE", "true"])
    assert [row.label for row in dataset.validation] == [1, 0, 1]  # type: ignore[attr-defined]


def test_a_stored_name_of_a_whole_float_is_no_index(read: Read) -> None:
    """Adapters of 0.1.0 name labels as a CSV file has them."""
    dataset, _ = read(["1.0", "2.0"], ["2.0", 1], label_names=["1.0", "2.0"])
    assert [row.label for row in dataset.validation] == [1, 0]  # type: ignore[attr-defined]


def test_words_that_yaml_reads_as_others_are_refused_unless_quoted(read: Read) -> None:
    line = 'yes, no, on and off are true or false to YAML: a text needs quotes, as in "no"'
    assert refused(read, ["no"], ["yes"], label_names=[False, True]) == (
        f"w: label_names.0: should be a valid string, got False; {line}"
    )
    dataset, _ = read(["no", "yes"], ["yes", True], label_names=["no", "yes"])
    assert [row.label for row in dataset.validation] == [1, 1]  # type: ignore[attr-defined]
    assert read(["1", "2"], [2], label_names=[1.0, 2])[0].label_names == ("1", "2")


def test_minus_one_is_no_label_unless_it_is_named(read: Read, tmp_path: Path) -> None:
    line = f"{tmp_path}/train.jsonl, line 3: label '-1' beside labels from 0 on stands for a row without a label"
    assert refused(read, [0, 1, -1, -1], [0]) == f'{line}: leave it out, or set label_names: ["-1", "0", "1"]'
    long = refused(read, [0, 1, -1.0, *range(2, 30)], [0])
    assert long == f'{line}: leave it out, or set label_names: ["-1", "0", ...]'
    assert refused(read, [0, 1], [-1]) == (
        f"{tmp_path}/validation.jsonl, line 1: label '-1' is not among the labels (0, 1); -1 stands for no label"
    )
    written = refused(read, ["0.0", "1.0", "-1.0"], [0])
    assert written == line.replace("'-1'", "'-1.0'") + ': leave it out, or set label_names: ["-1.0", "0.0", "1.0"]'
    assert read([0, 1, -1], [0], label_names=["-1", "0", "1"])[0].label_names == ("-1", "0", "1")
    assert read([1, -1], [1])[0].label_names == ("-1", "1")
    assert read(["a", "b", "-1"], ["a"])[0].label_names == ("-1", "a", "b")


def test_a_label_of_space_is_no_label(read: Read, tmp_path: Path) -> None:
    assert refused(read, ["a", "b", " "], ["a"]) == f"{tmp_path}/train.jsonl, line 3: column 'label' has no value"


# What is told


def test_nothing_is_told_of_common_labels(read: Read) -> None:
    assert told(read, "aabb", "ab") == []
    assert told(read, "aabbcc", "abc", metric="eval_f1") == []
    assert told(read, [1, 2, 3, 4, 5] * 9, [1, 2, 3, 4, 5]) == []


def test_labels_that_are_written_almost_alike_are_told(read: Read) -> None:
    labels = ["ham", "HAM", "Ham ", "spam"]
    line = "label_column: 'HAM', 'Ham ', 'ham' are different labels; they are written almost alike"
    assert told(read, labels * 2, labels) == [line]
    assert told(read, labels * 2, labels, label_names=labels) == []


@pytest.mark.parametrize(
    "alike",
    [["1", "1.0"], ["a b", "a  b"], ["ﬁne", "fine"], ["café", "cafe\u0301"], ["a", "a\u200b"], ["STRASSE", "straße"]],
)
def test_near_equal(alike: list[str]) -> None:
    assert near_equal([*alike, "other"]) == [alike]


def test_labels_that_look_like_numbers_are_told(read: Read) -> None:
    labels = [number / 8 for number in range(40)]
    line = (
        "label_column: the 40 labels are numbers, such as 0, and each is learned as a word of its own; "
        "task: regression learns numbers"
    )
    assert told(read, labels, labels) == [line]
    assert told(read, labels, labels, label_names=[str(label) for label in labels]) == []


def test_look_like_numbers() -> None:
    assert look_like_numbers(["0.5", "1"], 1000)
    assert look_like_numbers([str(number) for number in range(30)], 100)
    assert not look_like_numbers([str(number) for number in range(30)], 1000)
    assert not look_like_numbers(["0", "1"], 2)
    assert not look_like_numbers(["0.5", "x"], 1000)


def test_rare_and_missing_labels_are_told(read: Read) -> None:
    assert told(read, "aabbc", "ab") == ["label_column: one row each for the label 'c'"]
    assert told(read, "aabbcd", "ab") == ["label_column: one row each for the labels 'c', 'd'"]
    assert told(read, "aabbcc", "ab") == ["validation_data: no validation row for the label 'c'"]
    names = list("abc")
    assert told(read, "aabb", "abcc", label_names=names) == ["train_data: no training row for the label 'c'"]


def test_which_label_eval_f1_is_of_is_told(read: Read) -> None:
    fraud = ["fraud", "legit"]
    assert told(read, fraud * 2, fraud, metric="eval_f1") == [SECOND.format("legit")]
    assert told(read, fraud * 2, fraud, metric="eval_f1", positive_label="fraud") == []
    assert told(read, fraud * 2, fraud, metric="eval_f1", f1_average="macro") == []


def test_labels_are_listed_with_their_counts_and_a_baseline(read: Read) -> None:
    def lines(train: Any, validation: Any, **settings: Any) -> list[str]:
        return about(*read(train, validation, **settings))

    counts = ["train labels: 'b' 3, 'a' 1", "validation labels: 'a' 2, 'b' 2"]
    always = "without learning, where every row is 'b':"
    assert lines("abbb", "aabb", metric="eval_accuracy") == [*counts, f"{always} eval_accuracy 0.5"]
    assert lines("abbb", "aabb", metric="eval_f1") == [*counts, f"{always} eval_f1 0.6667"]
    other = lines("abbb", "aabb", metric="eval_f1", positive_label="a")
    assert other == [*counts, "without learning, where every row is 'a': eval_f1 0.6667"]
    assert lines("abbb", "aabb", metric="eval_f1", f1_average="macro")[-1] == f"{always} eval_f1 0.3333"
    assert lines("abbb", "aabb", metric="eval_matthews_correlation")[-1] == f"{always} eval_matthews_correlation 0"
    loss = -(2 * math.log(1 / 4) + 2 * math.log(3 / 4)) / 4
    assert lines("abbb", "aabb")[-1] == (
        f"without learning, where each label is as likely as it is often: eval_loss {loss:.4g}"
    )
    many = lines([f"{number:02}" for number in range(12)], ["00"])
    assert many[0].endswith("'09' 1, ... 12 labels in all")


def test_labels_that_are_written_are_listed_too(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "completion": f"it is # {word}"} for word in ("legit", "legit", "fraud", "unknown")]
    files = {"train_data": rows, "validation_data": rows[:3]}
    config = TrialConfig(
        model_name_or_path="m",
        task="causal-lm",
        **{key: str(write_rows(tmp_path / f"{key}.jsonl", found)) for key, found in files.items()},
        label_names=("fraud", "legit"),
        predict_with_generate=True,
        answer_pattern="# (.+)",
        metric="eval_f1",
    )
    lines = ["train labels: 'legit' 2, 'fraud' 1, none 1", "validation labels: 'legit' 2, 'fraud' 1"]
    dataset = load_rows(config)
    assert about(dataset, config) == [*lines, "without learning, where every row is 'legit': eval_f1 0.8"]
    assert SECOND.format("legit") in list(notes(dataset, config, 1))
    exact = config.model_copy(update={"metric": "eval_exact_match"})
    assert about(dataset, exact)[-1] == "without learning, where every row is 'legit': eval_exact_match 0.6667"
    assert about(dataset, config.model_copy(update={"predict_with_generate": False})) == []


# Which F1


@pytest.mark.parametrize(
    ("names", "settings", "line"),
    [
        ("ab", {"positive_label": "c"}, "positive_label: 'c' is not among the labels; allowed: a, b"),
        ("abc", {"f1_average": "binary"}, "f1_average: binary is of one of 3 labels; positive_label says of which"),
    ],
)
def test_an_f1_that_there_is_not_is_refused(names: str, settings: Any, line: str, read: Read) -> None:
    assert refused(read, names, names, **settings) == line
    assert refused(read, names, names, label_names=list(names), **settings) == f"w: {line}"
