"""What there is to say of the labels of rows before anything is learned: counts, near-equal names, a baseline.

Nothing here imports torch.
"""

from __future__ import annotations

import math
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal, TypeVar

from bilora_ray.config import TrialConfig
from bilora_ray.measures import EXACT_MATCH
from bilora_ray.training.data.columns import MOST_NAMES, listed, plain
from bilora_ray.training.data.sources import Reread
from bilora_ray.training.metrics import F1, label_metrics, usual_average

T = TypeVar("T")

# More labels than these that are whole numbers, of few rows each, are measurements as a rule.
MANY, FEW_ROWS = 20, 5
# The answer of least loss that needs no learning.
SHARES = "each label is as likely as it is often"


@dataclass(frozen=True)
class RowLabels:
    """The labels of many rows, in 4 bytes for each.

    Attributes:
        of_row: the number of each row's set of labels.
        sets: the indices of the labels of each set, by its number.
    """

    of_row: array[int]
    sets: Sequence[tuple[int, ...]]

    @classmethod
    def of(cls, each: Iterable[tuple[int, ...]]) -> RowLabels:
        """Of rows of which `each` has these labels."""
        numbers: dict[tuple[int, ...], int] = {}
        of_row = array("i", (numbers.setdefault(labels, len(numbers)) for labels in each))
        return cls(of_row, tuple(numbers))

    def chosen(self, is_chosen: bytearray) -> RowLabels:
        """Those of the rows that are marked."""
        return RowLabels(array("i", compress(self.of_row, is_chosen)), self.sets)

    def counts(self) -> Counter[tuple[int, ...]]:
        """How many rows have each set."""
        return Counter({self.sets[number]: count for number, count in Counter(self.of_row).items()})

    def rarest(self) -> array[int]:
        """Of each row's labels that of the fewest rows, of no labels -1."""
        counts = by_label(self.counts())
        rarest = [min(labels, key=lambda label: (counts[label], label), default=-1) for labels in self.sets]
        return array("i", (rarest[number] for number in self.of_row))


class Labelled(Reread[T]):
    """The rows of a large source with the labels that they had as they were checked: no pass is made for those.

    Args:
        read: see `Reread`.
        labels: of each row.
    """

    def __init__(self, read: Callable[[], Iterator[T]], labels: RowLabels) -> None:
        super().__init__(read, len(labels.of_row))
        self.labels = labels


def labels_of_rows(rows: Collection[Any], labels: Callable[[Any], tuple[int, ...]]) -> RowLabels:
    """Those of `rows`, each of which has the `labels`."""
    return rows.labels if isinstance(rows, Labelled) else RowLabels.of(map(labels, rows))


@dataclass(frozen=True)
class LabelCounts:
    """How many rows have which labels: each row one, as a rule.

    Attributes:
        names: by label index.
        train: training rows, by the indices of their labels.
        validation: validation rows, likewise.
    """

    names: Sequence[str]
    train: Counter[tuple[int, ...]]
    validation: Counter[tuple[int, ...]]

    @classmethod
    def of(cls, dataset: Any, labels: Callable[[Any], tuple[int, ...]]) -> LabelCounts:
        """Those of a `tasks.base.Dataset`, whose rows have the `labels`."""
        train, validation = (labels_of_rows(rows, labels).counts() for rows in (dataset.train, dataset.validation))
        return cls(dataset.label_names, train, validation)

    def lines(self) -> Iterator[str]:
        """For each split the most frequent labels: all of them, or the first ten."""
        for split, sets in (("train", self.train), ("validation", self.validation)):
            counts = by_label(sets).most_common()
            parts = [f"'{self.names[label]}' {count}" for label, count in counts[:MOST_NAMES]]
            parts += [f"... {len(counts)} labels in all"] if len(counts) > MOST_NAMES else []
            parts += [f"none {sets[()]}"] if sets[()] else []
            yield f"{split} labels: {', '.join(parts)}"


def by_label(sets: Counter[tuple[int, ...]]) -> Counter[int]:
    """How many rows have each label."""
    found = Counter[int]()
    for labels, count in sorted(sets.items()):
        for label in labels:
            found[label] += count
    return found


def most_frequent(sets: Counter[tuple[int, ...]]) -> tuple[int, ...]:
    """What most rows have; of equals the first."""
    return min(sets, key=lambda labels: (-sets[labels], labels))


@dataclass(frozen=True)
class Unlearned:
    """What the metric of the settings is without learning, where the answer is always the same.

    Attributes:
        kind: `majority` of labels, `mean` of numbers.
        answer: which it is, in words.
        value: of the metric.
    """

    kind: Literal["majority", "mean"]
    answer: str
    value: float

    def line(self, config: TrialConfig) -> str:
        """As a person is told it."""
        return f"without learning, where {self.answer}: {config.metric} {self.value:.4g}"


def majority(counts: LabelCounts, config: TrialConfig) -> Unlearned:
    """What the metric of the settings is without learning, where each row has one label.

    Of a metric of labels that is to say the most frequent training label of every row, or the one that a binary F1 is
    of; of the loss, to give each label the probability that its share of the training rows is.
    """
    if config.metric == "eval_loss":
        rows, measured = counts.train.total(), counts.validation.items()
        losses = [n * -math.log(counts.train[one] / rows) if one in counts.train else math.inf for one, n in measured]
        return Unlearned("majority", SHARES, math.fsum(losses) / counts.validation.total())
    # A completion may be no label.
    (label,) = most_frequent(Counter({labels: count for labels, count in counts.train.items() if labels}))
    reference = [found for (found,) in counts.validation.elements()]
    named = config.model_copy(update={"label_names": tuple(counts.names)})
    f1 = F1.of(named, usual_average(len(counts.names)))
    if config.metric == "eval_f1" and f1.average == "binary":
        label = f1.positive  # to say another one always has no F1 at all
    metrics = label_metrics([label] * len(reference), reference, len(counts.names), f1)
    # What is written is right where it is the label.
    metrics[EXACT_MATCH] = metrics["eval_accuracy"]
    return Unlearned("majority", f"every row is '{counts.names[label]}'", metrics[config.metric])


def label_notes(counts: LabelCounts, config: TrialConfig, validation_data: str) -> Iterator[str]:
    """What is seldom meant of labels: see `tasks.base.Task.notes`."""
    names, train, validation = counts.names, by_label(counts.train), by_label(counts.validation)
    if config.label_names is None:
        yield from _notes_on_names(names, counts.train.total() + counts.validation.total())
    single = [label for label in range(len(names)) if train[label] + validation[label] == 1]
    if single:
        yield f"label_column: one row each for {_quoted(single, names)}"
    for setting, kind, found in (("train_data", "training", train), (validation_data, "validation", validation)):
        missing = [label for label in range(len(names)) if not found[label] and label not in single]
        if missing:
            yield f"{setting}: no {kind} row for {_quoted(missing, names)}"


def positive_notes(names: Sequence[str], config: TrialConfig) -> Iterator[str]:
    """Which label a binary F1 is of, where it decides and nobody said."""
    if config.metric != "eval_f1" or config.positive_label is not None:
        return
    if F1.of(config, usual_average(len(names))).average == "binary":
        yield f"positive_label: eval_f1 is that of '{names[1]}', the second label, unless it names the other"


def _notes_on_names(names: Sequence[str], rows: int) -> Iterator[str]:
    for alike in near_equal(names):
        yield f"label_column: {', '.join(map(repr, alike))} are different labels; they are written almost alike"
    if look_like_numbers(names, rows):
        numbers = f"the {len(names)} labels are numbers, such as {names[0]}, and each is learned as a word of its own"
        yield f"label_column: {numbers}; task: regression learns numbers"


def _quoted(labels: Iterable[int], names: Sequence[str]) -> str:
    quoted = [repr(names[label]) for label in labels]
    return f"the label{'s' if len(quoted) > 1 else ''} {listed(quoted)}"


def near_equal(names: Iterable[str]) -> list[list[str]]:
    """The names that differ in case, space, invisible characters and Unicode's ways to write a character alone.

    So too 1 and 1.0, which are one label if they are in different files.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        visible = "".join(c for c in unicodedata.normalize("NFKC", plain(name)) if unicodedata.category(c) != "Cf")
        alike.setdefault(" ".join(visible.casefold().split()), []).append(name)
    return [same for same in alike.values() if len(same) > 1]


def look_like_numbers(names: Sequence[str], rows: int) -> bool:
    """Whether labels are rather measured than named: numbers that are not all whole, or many of few rows each."""
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return False
    whole = all(number.is_integer() for number in numbers)
    return not whole or (len(names) > MANY and rows < FEW_ROWS * len(names))
