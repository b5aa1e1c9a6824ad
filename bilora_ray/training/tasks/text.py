"""What the tasks that write text share, and how all tasks tokenize a text."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig, template_columns
from bilora_ray.errors import UserError
from bilora_ray.training.data.batches import eval_batches, in_row_order
from bilora_ray.training.data.columns import filled, label_of, listed, text_of
from bilora_ray.training.data.sources import Record
from bilora_ray.training.metrics import (
    F1,
    IGNORED,
    NO_LABEL,
    LossSum,
    answer,
    exact_match,
    label_index,
    label_metrics,
)
from bilora_ray.training.tasks.base import Dataset, Example, Labels, Model, Prediction, on_device, padded, stacked

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from bilora_ray.training.distributed.workers import Workers


@dataclass(frozen=True, slots=True)
class TextRow:
    """A prompt and its completion, templates filled; `where` is the row's place for errors."""

    prompt: str
    completion: str
    where: str


def text_row(record: Record, config: TrialConfig, names: Labels) -> TextRow:
    """The record in the templates, its label by name where the labels are given."""
    templates = (config.prompt_template, config.completion_template)
    values = {column: text_of(record, column) for template in templates for column in template_columns(template)}
    if names is not None and config.label_column in values:
        values[config.label_column] = names[label_of(record, config, names)]
    prompt, completion = (filled(template, values) for template in templates)
    return TextRow(prompt, completion, record.where)


def check_answers(rows: Iterable[Any], config: TrialConfig) -> None:
    """Where what is written is judged, each completion must have an answer, or no model could be right about it."""
    for row in rows if config.predict_with_generate else ():
        if config.label_names is None:
            if answer(row.completion, config.answer_pattern) is None:
                raise UserError(f"{row.where}: answer_pattern matches nothing in the completion")
        elif label_index(row.completion, config.label_names, config.answer_pattern) == NO_LABEL:
            labels = listed(config.label_names)
            raise UserError(f"{row.where}: the completion's answer is not among the labels ({labels})")


def text_notes(dataset: Dataset, config: TrialConfig, validation_data: str) -> Iterator[str]:
    """Completions that teach nothing."""
    if config.messages_column is None and not template_columns(config.completion_template):
        yield "completion_template: names no column, so that every row has the same completion"
    splits = (("train_data", "training", dataset.train), (validation_data, "validation", dataset.validation))
    for setting, kind, rows in splits:
        if empty := _empty(rows):
            yield f"{setting}: {empty} of {len(rows)} {kind} rows have an empty completion"


def _empty(rows: Iterable[Any]) -> int:
    return sum(not row.completion.strip() for row in rows)


def check_tokenizer(config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError unless a text that is learned can have an end."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"model_name_or_path: the tokenizer of {config.model_name_or_path} has no end of sequence")


def without_special_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text alone."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def with_special_tokens(
    texts: list[str], pairs: list[str] | None, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[array[int], array[int] | None, bool]]:
    """Ids with the tokenizer's special tokens, token types of pairs, and whether `max_length` took something.

    A text that is too long loses its end; of a pair, the longer text first.
    """
    has_types = pairs is not None and "token_type_ids" in tokenizer.model_input_names
    options: dict[str, Any] = {"return_token_type_ids": has_types, "verbose": False}
    batch = tokenizer(texts, pairs, **options)
    for row, ids in enumerate(batch["input_ids"]):
        types = batch["token_type_ids"][row] if has_types else None
        cut = len(ids) > max_length
        if cut:
            pair = None if pairs is None else pairs[row]
            shorter = tokenizer(texts[row], pair, truncation=True, max_length=max_length, **options)
            ids, types = shorter["input_ids"], shorter.get("token_type_ids")
        yield array("i", ids), None if types is None else array("i", types), cut


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (batch, length), and `labels` (batch, target length) padded with IGNORED."""
    batch = padded([example.input_ids for example in examples], pad_token_id)
    return {**batch, "labels": stacked([example.labels for example in examples], IGNORED)}


def collate_prompts(examples: Sequence[Example], pad_token_id: int, left: bool) -> dict[str, Tensor]:
    """A batch to generate from: `input_ids` and `attention_mask` (batch, length), int64."""
    prompts = [example.prompt_ids for example in examples if example.prompt_ids is not None]
    assert len(prompts) == len(examples), "only validation examples have prompts"
    return padded(prompts, pad_token_id, left)


def target_count(labels: Iterable[array[int]]) -> int:
    """How many of all `labels` are to be predicted."""
    return sum(len(tokens) - tokens.count(IGNORED) for tokens in labels)


def measure(logits: Tensor, targets: Tensor) -> LossSum:
    """The loss over the tokens of one batch."""
    loss = LossSum()
    loss.add(logits, targets)
    return loss


def metrics(parts: Sequence[LossSum], config: TrialConfig) -> dict[str, float]:
    """Loss, perplexity and accuracy over all tokens."""
    return LossSum.of(parts).metrics()


def most_new_tokens(config: TrialConfig, continues: bool) -> int:
    """How many tokens a text has at the most.

    One that `continues` its prompt shares `max_length` with it. It gets half where it would leave the prompt nothing
    but the token that many tokenizers put before a text.
    """
    if continues:
        return config.max_new_tokens if config.max_new_tokens + 2 <= config.max_length else config.max_length // 2
    return config.max_new_tokens if config.predict_with_generate else min(config.max_new_tokens, config.max_length)


def generated(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    workers: Workers,
    *,
    continues: bool,
) -> dict[str, float]:
    """How often the answer in what `model` writes is the right one, and label metrics where the labels are given."""
    texts = _texts(model, examples, config, tokenizer, workers, continues)
    references = [example.reference for example in examples]
    found = {"eval_exact_match": exact_match(texts, references, config.answer_pattern)}
    if config.label_names is not None:
        names, pattern = config.label_names, config.answer_pattern
        given, wanted = ([label_index(text, names, pattern) for text in side] for side in (texts, references))
        found |= label_metrics(given, wanted, len(names), F1.of(config, len(names)))
    return found


def predict(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Labels,
    workers: Workers,
    *,
    continues: bool,
) -> list[Prediction]:
    """What `model` writes after each prompt; without one there is nothing to go on from."""
    examples = [example for example in examples if example.prompt_ids]
    texts = _texts(model, examples, config, tokenizer, workers, continues)
    inputs = [str(tokenizer.decode(list(example.prompt_ids or ()))) for example in examples]
    references = [example.reference for example in examples]
    return [Prediction(*row) for row in zip(inputs, texts, references, strict=True)]


def _texts(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    workers: Workers,
    continues: bool,
) -> list[str]:
    """What `model` writes after the prompt of each example, which must have one.

    A model that `continues` its prompt goes on after the last position, so that prompts are padded at the left, and
    what it writes begins behind them.
    """

    def generate(rows: Sequence[int]) -> list[str]:
        prompts = collate_prompts([examples[row] for row in rows], tokenizer.pad_token_id, left=continues)
        prompts = on_device(prompts, model)
        output = model.generate(
            **prompts,
            max_new_tokens=most_new_tokens(config, continues),
            do_sample=False,
            num_beams=1,
            # A model's own defaults for generation are for chatting, and need not know the end that was trained.
            repetition_penalty=1.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=_ends(model, tokenizer),
            # Every forward pass gathers the weights, so whose texts are done goes on with those whose aren't.
            synced_gpus=workers.sharded and workers.world_size > 1,
        )
        start = prompts["input_ids"].shape[1] if continues else 0
        return tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)

    lengths = [len(example.prompt_ids or ()) for example in examples]
    batches = eval_batches(lengths, config.per_device_eval_batch_size)
    return in_row_order(batches, [text for part in workers.map(generate, batches) for text in part])


def _ends(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, which training appends, and the model's own."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})
