"""Tasks with a head: what is read, what is lost and what is measured, against the same counted by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef, mean_squared_error
from sklearn.utils.class_weight import compute_class_weight
from tiny_trials import Tiny, reproducible, run_fit, write_rows
from torch.nn import functional

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import Task
from bilora_ray.method import primary_parameters
from bilora_ray.training.distributed.workers import Workers
from bilora_ray.training.evaluate import evaluate
from bilora_ray.training.folder import TrialFolder
from bilora_ray.training.loop import Run
from bilora_ray.training.metrics import F1, number_metrics, set_metrics
from bilora_ray.training.rows import about, load_rows, notes
from bilora_ray.training.tasks.base import balanced

NAMES = {"sequence-classification": ("bad", "good"), "multi-label-classification": ("blue", "green", "red")}


# Metrics


TEXTS: tuple[Task, ...] = ("sequence-classification", "multi-label-classification", "regression")


@dataclass(frozen=True)
class Told(Workers):
    """One of several workers, in one process: it is given what those before it found."""

    parts: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.parts.append(value)
        if len(self.parts) < self.world_size:
            raise InterruptedError
        return self.parts


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A trial of each task with a head, after some steps."""
    runs = {}
    for task in TEXTS:
        runs[task] = Run(tiny.config(task, max_steps=12), TrialFolder(tmp_path_factory.mktemp(task)))
        for _ in range(12):
            runs[task].train_step()
        runs[task].model.eval()
    return runs


def alone(run: Run) -> torch.Tensor:
    """The logits of each validation row, alone in its batch."""
    rows = (torch.tensor([example.input_ids.tolist()]) for example in run.data.validation)
    with torch.no_grad():
        return torch.cat([run.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in rows])


def by_hand(run: Run, logits: torch.Tensor, **settings: Any) -> dict[str, float]:
    """The metrics, by scikit-learn and scipy from all predictions at once."""
    labels = [json.loads(line)["label"] for line in Path(run.config.validation_data or "").read_text().splitlines()]
    if run.config.task == "regression":
        numbers = logits[:, 0].tolist()
        error = mean_squared_error(labels, numbers)
        found = {"eval_loss": error, "eval_mse": error, "eval_pearson": pearsonr(labels, numbers).statistic}
        return found | {"eval_spearman": spearmanr(labels, numbers).statistic}
    names = NAMES[run.config.task]
    if run.config.task == "sequence-classification":
        given, wanted = [names[i] for i in logits.argmax(-1).tolist()], labels
        average = settings.get("f1_average", "binary")
        positive = {"pos_label": settings.get("positive_label", "good")} if average == "binary" else {}
        return {
            "eval_loss": log_loss(wanted, logits.double().softmax(-1), labels=names),
            "eval_accuracy": accuracy_score(wanted, given),
            "eval_f1": f1_score(wanted, given, average=average, **positive),
            "eval_matthews_correlation": matthews_corrcoef(wanted, given),
        }
    sets = torch.tensor([[float(name in row) for name in names] for row in labels])
    found = (logits.sigmoid() > 0.5).int()
    return {
        "eval_loss": float(functional.binary_cross_entropy(logits.double().sigmoid(), sets.double())),
        "eval_accuracy": accuracy_score(sets, found),
        "eval_f1": f1_score(sets, found, average=settings.get("f1_average", "micro"), zero_division=0),
    }


@pytest.mark.parametrize("task", TEXTS)
@pytest.mark.parametrize("size", [1, 5, 18, 40])
def test_the_metrics_are_those_of_all_predictions_at_once(task: Task, size: int, trained: dict[str, Run]) -> None:
    run = trained[task]
    expected = by_hand(run, alone(run))
    assert 0.2 < expected.get("eval_f1", 0.5) < 1  # neither all right nor all wrong would hide little
    config = run.config.model_copy(update={"per_device_eval_batch_size": size})
    assert evaluate(run.model, run.data.validation, config, run.data.tokenizer) == pytest.approx(expected, rel=1e-4)
    parts: list[Any] = []
    first, second, last = (Told(3, False, rank, 3, parts) for rank in range(3))
    for worker in (first, second):  # who would wait for the others
        with pytest.raises(InterruptedError):
            evaluate(run.model, run.data.validation, config, run.data.tokenizer, worker)
    found = evaluate(run.model, run.data.validation, config, run.data.tokenizer, last)
    assert found == evaluate(run.model, run.data.validation, config, run.data.tokenizer)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("sequence-classification", {"positive_label": "bad"}),
        *(("sequence-classification", {"f1_average": average}) for average in ("macro", "micro", "weighted")),
        *(("multi-label-classification", {"f1_average": average}) for average in ("macro", "weighted")),
    ],
)
def test_each_f1_of_a_trial_is_scikit_learns(task: Task, settings: Any, trained: dict[str, Run]) -> None:
    run = trained[task]
    config = run.config.model_copy(update={**settings, "label_names": NAMES[task]})
    found = evaluate(run.model, run.data.validation, config, run.data.tokenizer)
    assert found == pytest.approx(by_hand(run, alone(run), **settings), rel=1e-4)


def test_a_trial_reports_the_f1_of_the_positive_label_it_found(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "eval_steps": 3, "metric": "eval_f1"}
    values = [
        run_fit(tiny.config("sequence-classification", positive_label=name, **settings), tmp_path / str(name))[0][-1]
        for name in (None, "good", "bad")
    ]
    assert values[0]["eval_f1"] == values[1]["eval_f1"] != values[2]["eval_f1"]


def test_numbers_that_do_not_vary_correlate_with_nothing() -> None:
    for predicted, reference in (([1.0, 1.0], [0.0, 2.0]), ([0.0, 2.0], [1.0, 1.0]), ([3.0], [4.0])):
        found = number_metrics(predicted, reference)
        assert (found["eval_mse"], found["eval_pearson"], found["eval_spearman"]) == (1.0, 0.0, 0.0)
    assert number_metrics([float("nan"), 1.0], [0.0, 1.0])["eval_pearson"] == 0.0


@pytest.mark.filterwarnings("error")
def test_sets_without_any_label_have_an_f1_of_nothing() -> None:
    assert set_metrics([[0, 0]], [[0, 0]], F1("micro")) == {"eval_accuracy": 1.0, "eval_f1": 0.0}
    assert set_metrics([[0, 1]], [[0, 1]], F1("macro")) == {"eval_accuracy": 1.0, "eval_f1": 1.0}
    assert set_metrics([[1, 1]], [[0, 1]], F1("binary", 0)) == {"eval_accuracy": 0.0, "eval_f1": 0.0}


# Weights of classes


@dataclass(frozen=True)
class Counted(Workers):
    """One of several workers, in one process, whose sums are its own part."""

    def total(self, value: torch.Tensor) -> torch.Tensor:
        return value


def weighted_trial(tiny: Tiny, folder: Path, **settings: Any) -> Run:
    """A trial on 25 rows of three labels that are not alike frequent, of which one step takes all."""
    folder.mkdir()
    labels = ["a"] * 16 + ["b"] * 7 + ["c"] * 2
    rows = [{"text": f"{label} {'red ' * (number % 5)}", "label": label} for number, label in enumerate(labels)]
    data = str(write_rows(folder / "rows.jsonl", rows))
    settings = {"class_weights": "balanced", "method": "lora", "max_steps": 2, "eval_steps": 1, **settings}
    config = tiny.config("sequence-classification", train_data=data, validation_data=data, **settings)
    return Run(config, TrialFolder(folder / "trial"))


def gradient_of(run: Run, workers: Workers) -> tuple[float, torch.Tensor]:
    run.gradients.workers = workers
    loss = run.gradients.of(list(run.data.train))
    grads = [parameter.grad for parameter in primary_parameters(run.model).values()]
    return float(loss), torch.cat([grad.flatten().clone() for grad in grads if grad is not None])


@pytest.mark.parametrize(("size", "passes"), [(25, 1), (4, 7), (1, 25)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_weighted_loss_is_the_weighted_mean_however_rows_are_shared(
    size: int, passes: int, count: int, tiny: Tiny, tmp_path: Path
) -> None:
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
    run = weighted_trial(tiny, tmp_path / "run", **settings)
    run.model.eval()  # which draws nothing
    labels = torch.tensor([example.labels[0] for example in run.data.train])
    weights = torch.tensor(compute_class_weight("balanced", classes=numpy.arange(3), y=labels.numpy()))
    counted = [run.gradients.task.target_count([example]) for example in run.data.train]
    assert counted == pytest.approx(weights[labels].tolist())
    rows = (torch.tensor([example.input_ids.tolist()]) for example in run.data.train)
    logits = torch.cat([run.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in rows])
    losses = functional.cross_entropy(logits, labels, reduction="none").double()
    expected = (losses * weights[labels]).sum() / weights[labels].sum()
    run.model.zero_grad()
    expected.backward()
    primary = primary_parameters(run.model).values()
    wanted = torch.cat([parameter.grad.flatten().clone() for parameter in primary if parameter.grad is not None])
    parts = [gradient_of(run, Counted(1, False, rank, count)) for rank in range(count)]
    assert sum(loss for loss, _ in parts) == pytest.approx(float(expected), rel=1e-5)
    total = torch.stack([gradient for _, gradient in parts]).sum(0)
    assert torch.allclose(total, wanted, rtol=1e-3, atol=1e-6)


def test_weights_change_the_training_loss_and_not_what_is_measured(tiny: Tiny, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 25, "learning_rate": 1e-12}
    losses = {}
    for words in ("balanced", None):
        run = weighted_trial(tiny, tmp_path / str(words), class_weights=words, **settings)
        run.train_step()
        losses[words] = run.window.train_loss, run.evaluate()["eval_loss"]
    assert losses["balanced"][0] != pytest.approx(losses[None][0], rel=1e-3)
    assert losses["balanced"][1] == pytest.approx(losses[None][1])


def test_labels_alike_frequent_have_the_loss_without_weights(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "label": "ab"[number % 2]} for number in range(16)]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    settings = {"train_data": data, "validation_data": data, "max_steps": 4, "per_device_train_batch_size": 3}
    reports = [
        run_fit(tiny.config("sequence-classification", class_weights=words, **settings), tmp_path / str(words))[0]
        for words in ("balanced", None)
    ]
    for weighted, plain in zip(*map(reproducible, reports), strict=True):
        assert weighted == pytest.approx(plain, rel=1e-4)


def test_balanced() -> None:
    assert balanced([0, 0, 0, 2], 4) == [4 / (2 * 3), 0.0, 2.0, 0.0]


# What is read


def rows_of(tmp_path: Path, task: Task, labels: list[Any], **settings: Any) -> Any:
    rows = [{"text": f"row {number}", "label": label} for number, label in enumerate(labels)]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    config = TrialConfig(model_name_or_path="m", task=task, train_data=data, validation_data=data, **settings)
    return load_rows(config), config


def refused(tmp_path: Path, task: Task, labels: list[Any], **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, task, labels, **settings)
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    "labels",
    [
        [["b", "a"], ["b"], []],
        ["b,a", "b", ""],
        [" b , a,", "b", " "],
        ['["b", "a"]', ["b"], "[]"],
        [["b", "a"], "b", []],
    ],
)
def test_sets_of_labels_are_lists_or_texts_with_commas(labels: list[Any], tmp_path: Path) -> None:
    dataset, _ = rows_of(tmp_path, "multi-label-classification", labels)
    assert dataset.label_names == ("a", "b")
    assert [row.label for row in dataset.train] == [(0, 1), (1,), ()]


def test_sets_of_labels_by_another_delimiter_by_index_and_as_numbers(tmp_path: Path) -> None:
    task: Task = "multi-label-classification"
    assert rows_of(tmp_path, task, ["a|b, c", "a"], label_delimiter="|")[0].label_names == ("a", "b, c")
    given = rows_of(tmp_path, task, [[1, 0], [1]], label_names=("x", "y"))[0]
    assert [row.label for row in given.train] == [(0, 1), (1,)]
    assert rows_of(tmp_path, task, [[10, 9.0], 9])[0].label_names == ("9", "10")


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (
            [["a"], [0, 1, 1]],
            "rows.jsonl, line 2: column 'label': label '1' stands 2 times; "
            "it holds the names of a row's labels, not 0 or 1 for each",
        ),
        (
            ["['a', 'b']"],
            'rows.jsonl, line 1: column \'label\': begins as a list, and is none as JSON has it, such as ["a", "b"]',
        ),
        ([["a", None]], "rows.jsonl, line 1: column 'label' must be text or a number, not NoneType"),
        ([None], "rows.jsonl, line 1: column 'label' has no value"),
        ([[], ""], "train_data: rows.jsonl has no label; two or more are needed"),
        ([["a"], "a"], "train_data: every label in rows.jsonl is 'a'; two or more are needed"),
        (
            [[0, 1], [-1]],
            "rows.jsonl, line 2: label '-1' beside labels from 0 on stands for a row without a label: leave it out, "
            'or set label_names: ["-1", "0", "1"]',
        ),
    ],
)
def test_sets_of_labels_that_are_none(labels: list[Any], line: str, tmp_path: Path) -> None:
    assert refused(tmp_path, "multi-label-classification", labels) == line


def test_numbers_are_read_from_every_kind_of_value(tmp_path: Path) -> None:
    dataset, _ = rows_of(tmp_path, "regression", [1, 2.5, "-3e-1", " 4 "])
    assert dataset.label_names is None
    assert [row.label for row in dataset.train] == [1.0, 2.5, -0.3, 4.0]


@pytest.mark.parametrize("value", ["high", "3,5", "1_000", True, "nan", "inf", [1]])
def test_what_is_no_number_is_refused(value: Any, tmp_path: Path) -> None:
    line = f"rows.jsonl, line 2: column 'label' must be a finite number, not {value!r}"
    assert refused(tmp_path, "regression", [1, value]) == line


@pytest.mark.parametrize("value", [1e39, "-3.5e38", 10**40])
def test_a_number_that_float32_cannot_hold_is_refused(value: Any, tmp_path: Path) -> None:
    line = f"rows.jsonl, line 2: column 'label': {value!r} is more than float32 can hold; scale the labels"
    assert refused(tmp_path, "regression", [1, value]) == line


def test_each_draw_of_sets_has_the_share_of_the_rarest_labels(tmp_path: Path) -> None:
    sets = [["a"]] * 40 + [["a", "b"]] * 20 + [["a", "c"]] * 10 + [[]] * 10
    dataset, _ = rows_of(tmp_path, "multi-label-classification", sets, max_eval_samples=16, max_train_samples=8)
    assert Counter(row.label for row in dataset.validation) == {(0,): 8, (0, 1): 4, (0, 2): 2, (): 2}
    assert Counter(row.label for row in dataset.train) == {(0,): 4, (0, 1): 2, (0, 2): 1, (): 1}


# What is told


def test_sets_are_listed_with_a_baseline(tmp_path: Path) -> None:
    task: Task = "multi-label-classification"
    sets = [["a", "b"], ["a", "b"], ["a"], []]
    counts = [f"{split} labels: 'a' 3, 'b' 2, none 1" for split in ("train", "validation")]
    always = "without learning, where every row is 'a', 'b':"
    assert about(*rows_of(tmp_path, task, sets, metric="eval_accuracy")) == [*counts, f"{always} eval_accuracy 0.5"]
    expected = f1_score([[1, 1], [1, 1], [1, 0], [0, 0]], [[1, 1]] * 4, average="micro")
    assert about(*rows_of(tmp_path, task, sets, metric="eval_f1"))[-1] == f"{always} eval_f1 {expected:.4g}"
    loss = (log_loss([1, 1, 1, 0], [0.75] * 4) + log_loss([1, 1, 0, 0], [0.5] * 4)) / 2
    assert about(*rows_of(tmp_path, task, sets))[-1] == (
        f"without learning, where each label is as likely as it is often: eval_loss {loss:.4g}"
    )


def test_numbers_are_told_with_a_baseline(tmp_path: Path) -> None:
    dataset, config = rows_of(tmp_path, "regression", [0, 1, 5])
    assert about(dataset, config) == [
        "train labels: 0 to 5, mean 2, standard deviation 2.16",
        "validation labels: 0 to 5, mean 2, standard deviation 2.16",
        "without learning, where every row is 2: eval_loss 4.667",
    ]
    assert about(*rows_of(tmp_path, "regression", [0, 1], metric="eval_pearson"))[-1].endswith(": eval_pearson 0")


def test_numbers_that_cannot_be_learned_are_told(tmp_path: Path) -> None:
    def told(labels: list[Any]) -> Iterator[str]:
        dataset, config = rows_of(tmp_path, "regression", labels, per_device_train_batch_size=1)
        return (note for note in notes(replace(dataset, validation=dataset.validation[:1]), config, 1))

    assert list(told([1, 2, 3]))[-1] == "validation_data: every validation row has the label 1"
    assert "train_data: every training row has the label 3" in list(told([3, 3]))
    line = "label_column: labels as far from 0 as -250000 are learned slowly; scale them to some units"
    assert line in list(told([1, -250000]))


def test_only_tasks_with_classes_weigh_them() -> None:
    for task in ("causal-lm", "multi-label-classification", "regression"):
        with pytest.raises(ValueError, match=f"class_weights: {task} has no classes to weigh; allowed with seq"):
            TrialConfig(model_name_or_path="m", task=task, train_data="d", class_weights="balanced")
