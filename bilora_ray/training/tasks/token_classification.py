"""token-classification: a head on the model learns a tag of each word, such as the entity that it is part of.

`text_column` holds the words of a row, `label_column` a tag for each. The model reads the words with spaces between
them. A word's first token learns its tag, and its other tokens nothing; nor does a blank word, or one with the tag
-100. A row with more than `max_length` tokens loses its end: those words are neither learned nor measured.

`eval_f1` is that of whole entities where the tags begin and end some (`B-PER`, `I-PER`, `O`), and else the mean over
the tags. See `tag_f1`.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.training.data.columns import label_of, text_of, value_of
from bilora_ray.training.data.labels import SHARES, Unlearned
from bilora_ray.training.data.sources import Record
from bilora_ray.training.metrics import IGNORED, LossSum
from bilora_ray.training.tasks import sequence_classification, text
from bilora_ray.training.tasks.base import (
    Answer,
    Cut,
    Dataset,
    Encoded,
    Example,
    Labels,
    Model,
    Prediction,
    Processor,
    Task,
    cross_entropy,
    known_labels,
    named,
    on_device,
    with_label,
)

if TYPE_CHECKING:
    from torch import Tensor

    from bilora_ray.training.distributed.workers import Workers

OUTSIDE = "O"
# A tag of an entity: where in it the word is, as IOB, BIOES or BILOU have it, and what it is.
OF_ENTITY = re.compile(r"[BIELSU]-.+")
FIRST, LAST = "BSU", "ELSU"


@dataclass(frozen=True, slots=True)
class TaggedRow:
    """Words, and the index of the tag of each; IGNORED where it has none."""

    words: tuple[str, ...]
    tags: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Measured:
    """Of the rows of one batch: their loss, and for each row the tags that were found and those that are right."""

    loss: LossSum
    predicted: list[list[int]]
    reference: list[list[int]]


def _items(record: Record, column: str) -> list[Record]:
    """Each item of the list in `column` as a record of its own, so that an error names the word."""
    items = value_of(record, column)
    if not isinstance(items, list):
        kind = type(items).__name__
        raise UserError(f"{record.where}: column '{column}' must be a list with an item for each word, not {kind}")
    return [Record({column: item}, f"{record.where}, word {number}") for number, item in enumerate(items, start=1)]


def _label_names(records: Iterable[Record], config: TrialConfig) -> Labels:
    column = config.label_column
    tags = (item for record in records for item in _items(record, column) if item.columns[column] != IGNORED)
    return sequence_classification.TASK.label_names(tags, config)


def _row(record: Record, config: TrialConfig, names: Labels) -> TaggedRow:
    assert names is not None
    text_column, column = config.text_column, config.label_column
    words = tuple(text_of(word, text_column) for word in _items(record, text_column))
    items = _items(record, column)
    if len(words) != len(items):
        raise UserError(f"{record.where}: {len(words)} words in '{text_column}' and {len(items)} tags in '{column}'")
    tags = (
        label_of(item, config, names) if item.columns[column] != IGNORED and word.strip() else IGNORED
        for word, item in zip(words, items, strict=True)
    )
    return TaggedRow(words, tuple(tags), record.where)


def _asked(record: Record, config: TrialConfig) -> TaggedRow:
    names, words = known_labels(config), record.columns.get(config.text_column)
    tags = [names[0]] * (len(words) if isinstance(words, list) else 0)
    return _row(with_label(record, config, tags), config, names)


def _notes(dataset: Dataset, config: TrialConfig, validation_data: str) -> Iterator[str]:
    names = dataset.label_names or ()
    if all(name.isdecimal() for name in names):
        yield "label_names: the tags are numbers; with names such as O, B-PER, I-PER eval_f1 would be that of entities"
    for key in ("f1_average", "positive_label"):
        if getattr(config, key) is not None:
            yield f"{key}: changes nothing; eval_f1 is that of all entities, or the mean over tags that mark none"


def _unlearned(dataset: Dataset, config: TrialConfig) -> Unlearned:
    names = dataset.label_names or ()
    train, wanted = ([_tags(row) for row in rows] for rows in (dataset.train, dataset.validation))
    counts = Counter(tag for row in train for tag in row)
    if config.metric == "eval_loss":
        losses = [-math.log(counts[tag] / counts.total()) if counts[tag] else math.inf for row in wanted for tag in row]
        return Unlearned("majority", SHARES, math.fsum(losses) / len(losses))
    usual = min(counts, key=lambda tag: (-counts[tag], tag))
    found = [[usual] * len(row) for row in wanted]
    right = LossSum(count=sum(map(len, wanted)), correct=sum(row.count(usual) for row in wanted))
    metrics = _metrics([Measured(right, found, wanted)], config.model_copy(update={"label_names": tuple(names)}))
    return Unlearned("majority", f"every word is '{names[usual]}'", metrics[config.metric])


def _tags(row: Any) -> list[int]:
    return [tag for tag in row.tags if tag != IGNORED]


def _examples(
    rows: Sequence[TaggedRow], config: TrialConfig, tokenizer: Processor, keep_prompts: bool
) -> Iterator[Encoded]:
    if not tokenizer.is_fast:
        raise UserError(f"model_name_or_path: the tokenizer of {config.model_name_or_path} can't say where a word is")
    texts = [" ".join(row.words) for row in rows]
    found = tokenizer(
        texts,
        truncation=True,
        max_length=config.max_length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    each = zip(rows, texts, found.encodings, found["offset_mapping"], found["special_tokens_mask"], strict=True)
    for row, read, encoding, spans, special in each:
        tags = array("i", _first_tokens(row, spans, special))
        cut = Cut.PROMPT if encoding.overflowing else Cut.NOTHING
        example = Example(array("i", encoding.ids), tags, reference=read)
        yield [] if cut and config.truncation == "drop" else [(example, cut)]


def _first_tokens(row: TaggedRow, spans: Sequence[tuple[int, int]], special: Sequence[int]) -> Iterator[int]:
    """For each token the tag of the word that it is the first one of, or IGNORED.

    Args:
        row: the words, which are read with spaces between them.
        spans: where in that text a token begins and ends. It may begin with the space before a word.
        special: which tokens are of no text.
    """
    word_at = [number for number, word in enumerate(row.words) for _ in range(len(word) + 1)]
    seen = -1
    for (_, end), of_no_text in zip(spans, special, strict=True):
        word = -1 if of_no_text or end == 0 else word_at[end - 1]
        yield row.tags[word] if word > seen else IGNORED
        seen = max(seen, word)


def _target_count(examples: Sequence[Example]) -> int:
    return text.target_count(example.labels for example in examples)


def _forward(model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return model(**{key: tensor for key, tensor in batch.items() if key != "labels"}).logits, batch["labels"]


def _loss(model: Model, batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy(*_forward(model, batch))


def _measure(logits: Tensor, targets: Tensor) -> Measured:
    loss = LossSum()
    loss.add(logits, targets)
    rows = list(zip(logits.argmax(-1), targets, strict=True))
    predicted = [found[wanted != IGNORED].tolist() for found, wanted in rows]
    return Measured(loss, predicted, [wanted[wanted != IGNORED].tolist() for _, wanted in rows])


def _metrics(parts: Sequence[Measured], config: TrialConfig) -> dict[str, float]:
    loss = LossSum.of([part.loss for part in parts])
    assert config.label_names is not None, "the names of the tags say what an entity is"
    predicted, reference = (
        [[config.label_names[tag] for tag in row] for part in parts for row in side(part)]
        for side in (lambda part: part.predicted, lambda part: part.reference)
    )
    return {
        "eval_loss": loss.mean,
        "eval_accuracy": loss.correct / loss.count,
        "eval_f1": tag_f1(predicted, reference, config.label_names),
    }


def tag_f1(predicted: Sequence[Sequence[str]], reference: Sequence[Sequence[str]], names: Sequence[str]) -> float:
    """F1 of whole entities, over all kinds of them; or where `names` mark none, its mean over the tags that occur.

    An entity is right if its kind, its first word and its last are: that is the measure of CoNLL, and of seqeval.

    Args:
        predicted: the tags of each row.
        reference: the right ones.
        names: of all tags.
    """
    if not all(name == OUTSIDE or OF_ENTITY.fullmatch(name) for name in names):
        return _mean_f1([tag for row in predicted for tag in row], [tag for row in reference for tag in row])
    ours, theirs = (
        {(number, *entity) for number, row in enumerate(rows) for entity in entities(row)}
        for rows in (predicted, reference)
    )
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours or theirs else 0.0


def _mean_f1(predicted: Sequence[str], reference: Sequence[str]) -> float:
    right = Counter(given for given, wanted in zip(predicted, reference, strict=True) if given == wanted)
    both = Counter(predicted) + Counter(reference)
    return sum(2 * right[tag] / both[tag] for tag in both) / len(both)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The kind of each entity in a row, its first word and the one after its last.

    One goes on for as long as the kind is the same, no tag says that another begins and none has said that it ends.
    """
    found = set()
    start = 0
    for place, (tag, following) in enumerate(pairwise([*tags, OUTSIDE]), start=1):
        kind = tag[2:]
        if following[2:] == kind and following[0] not in FIRST and tag[0] not in LAST:
            continue
        if tag != OUTSIDE:
            found.add((kind, start, place))
        start = place
    return found


def _predict(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: Processor,
    label_names: Labels,
    workers: Workers,
) -> list[Prediction]:
    predictions, names = [], label_names or ()
    for example in examples:
        row = _measure(*_forward(model, on_device(text.collate([example], tokenizer), model)))
        found, wanted = (" ".join(names[tag] for tag in tags) for tags in (row.predicted[0], row.reference[0]))
        predictions.append(Prediction(example.reference, found, wanted))
    return predictions


def _answers(logits: Tensor, targets: Tensor, label_names: Labels) -> list[Answer]:
    """Of the words that were read: a tag each, and how likely each tag is."""
    names, found = label_names or (), []
    for scores, wanted in zip(logits.float(), targets, strict=True):
        words = scores[wanted != IGNORED]
        likely = [named(word, names) for word in words.softmax(-1)]
        found.append(Answer([names[tag] for tag in words.argmax(-1).tolist()], likely))
    return found


def _learned(example: Example, tokenizer: Processor, label_names: Labels) -> str:
    assert label_names is not None
    return " ".join(label_names[tag] for tag in example.labels if tag != IGNORED)


def _model_arguments(label_names: Labels) -> dict[str, Any]:
    arguments = sequence_classification.TASK.model_arguments(label_names)
    return {key: value for key, value in arguments.items() if key != "problem_type"}


TASK = Task(
    peft_type="TOKEN_CLS",
    row=_row,
    examples=_examples,
    collate=text.collate,
    target_count=_target_count,
    forward=_forward,
    loss=_loss,
    measure=_measure,
    metrics=_metrics,
    predict=_predict,
    asked=_asked,
    answers=_answers,
    of_prompt=str.split,
    learned=_learned,
    label_names=_label_names,
    notes=_notes,
    unlearned=_unlearned,
    model_arguments=_model_arguments,
    heads=("classifier", "score"),
)
