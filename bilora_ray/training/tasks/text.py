"""What the tasks that write text share, and how all tasks tokenize a text."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig, template_columns
from bilora_ray.errors import UserError, nearest
from bilora_ray.measures import EXACT_MATCH, LABEL_METRICS
from bilora_ray.training.compute.generation import Draw, Read, begun, greedy, is_whole, preferences, write
from bilora_ray.training.data.chat import Template, all_special
from bilora_ray.training.data.columns import filled, label_of, label_text_of, listed, names_of, text_of
from bilora_ray.training.data.formats import prompt_and_completion
from bilora_ray.training.data.labels import LabelCounts, by_label, majority, positive_notes
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
    usual_average,
)
from bilora_ray.training.tasks.base import Cut, Dataset, Example, Labels, Model, Prediction, on_device, padded, stacked

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from bilora_ray.training.distributed.workers import Workers

# What a GenerationConfig calls the token that a text begins with, such as a language code.
FORCED = "forced_bos_token_id"


@dataclass(frozen=True, slots=True)
class TextRow:
    """A prompt and its completion, templates filled; `where` is the row's place for errors."""

    prompt: str
    completion: str
    where: str


def text_label_names(records: Iterable[Record], config: TrialConfig) -> Labels:
    """The labels that the settings name, if they do; see `names_of` for how rows give one that a template shows."""
    column = config.label_column
    shown = any(column in template_columns(text) for text in (config.prompt_template, config.completion_template))
    if config.label_names is None or config.chat_column is not None or not shown:
        return config.label_names
    return names_of(((label_text_of(record, column), record.where) for record in records), config)


def text_row(record: Record, config: TrialConfig, names: Labels) -> TextRow:
    """The record in the templates, its label by name where the labels are given."""
    templates = (config.prompt_template, config.completion_template)
    record = prompt_and_completion(record, config)
    values = {column: text_of(record, column) for template in templates for column in template_columns(template)}
    if names is not None and config.label_column in values:
        values[config.label_column] = names[label_of(record, config, names)]
    prompt, completion = (filled(template, values) for template in templates)
    return TextRow(prompt, completion, record.where)


def asked_row(record: Record, config: TrialConfig) -> TextRow:
    """The record in the prompt's template, which is all that is read of it; with its completion if it has one."""
    if config.format == "alpaca":
        record = Record({"output": "", **record.columns}, record.where)
    row = text_row(record, config.model_copy(update={"completion_template": ""}), config.label_names)
    with suppress(UserError):
        return replace(row, completion=text_row(record, config, config.label_names).completion)
    return row


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
    """Completions that teach nothing, and what of a base is left out of account where its texts are judged."""
    if config.predict_with_generate and (other := preferences(config)):
        yield f"predict_with_generate: texts are written greedily, without the base's own {other}"
    if config.chat_column is None and not template_columns(config.completion_template):
        yield "completion_template: names no column, so that every row has the same completion"
    if config.label_names is not None:
        yield from positive_notes(config.label_names, config)
    splits = (("train_data", "training", dataset.train), (validation_data, "validation", dataset.validation))
    for setting, kind, rows in splits:
        if empty := _empty(rows):
            yield f"{setting}: {empty} of {len(rows)} {kind} rows have an empty completion"


def text_about(dataset: Dataset, config: TrialConfig) -> Iterator[str]:
    """The labels that the completions are, where the settings name them and texts are judged by them."""
    if config.label_names is None or not config.predict_with_generate:
        return
    counts = LabelCounts.of(dataset, partial(_answered, config=config))
    yield from counts.lines()
    if config.metric in (EXACT_MATCH, *LABEL_METRICS) and by_label(counts.train):
        yield majority(counts, config).line(config)


def _answered(row: Any, config: TrialConfig) -> tuple[int, ...]:
    found = label_index(row.completion, config.label_names or (), config.answer_pattern)
    return () if found == NO_LABEL else (found,)


def _empty(rows: Iterable[Any]) -> int:
    return sum(not row.completion.strip() for row in rows)


def check_tokenizer(config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError unless a text that is learned can have an end."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"model_name_or_path: the tokenizer of {config.model_name_or_path} has no end of sequence")


def without_special_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text alone."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def set_languages(config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a `tokenizer` that writes language codes write those of the settings.

    Raises:
        UserError: one is missing, which the tokenizer would make up; it knows no such language, or no languages at all.
    """
    model = config.model_name_or_path
    for key, given in (("src_lang", config.src_lang), ("tgt_lang", config.tgt_lang)):
        if not hasattr(tokenizer, "set_tgt_lang_special_tokens"):
            if given is not None:
                raise UserError(f"{key}: the tokenizer of {model} writes no language codes")
        elif given is None and tokenizer.init_kwargs.get(key) is None:
            raise UserError(f"{key}: is missing; the tokenizer of {model} writes a language code with each text")
        elif given is not None:
            known = _languages(tokenizer)
            if given not in known:
                raise UserError(f"{key}: the tokenizer of {model} knows no '{given}'; {nearest(given, known)}")
            setattr(tokenizer, key, given)


def _languages(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return sorted(getattr(tokenizer, "lang_code_to_id", None) or tokenizer.extra_special_tokens)


def target_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text in the tokenizer's own form of what a decoder writes; with an end of sequence in any case."""
    targets = tokenizer(text_target=["a", *texts], verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id in targets[0] else [tokenizer.eos_token_id]
    return [[*target, *end] for target in targets[1:]]


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


def collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (batch, length), and `labels` (batch, target length) padded with IGNORED."""
    batch = padded([example.input_ids for example in examples], tokenizer.pad_token_id)
    return {**batch, "labels": stacked([example.labels for example in examples], IGNORED)}


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
    read: Sequence[Read] | None,
    *,
    continues: bool,
) -> dict[str, float]:
    """How often the answer in what `model` writes is the right one, and label metrics where the labels are given."""
    asked = [row for row, example in enumerate(examples) if example.prompt_ids is not None]
    examples = [examples[row] for row in asked]
    told = read and [read[row] for row in asked]
    texts, ids = _texts(model, examples, config, tokenizer, workers, told, continues)
    pattern = config.answer_pattern
    written = [example.reference for example in examples]
    if config.chat_column is None:  # those of chats are what the tokenizer makes of their turns
        written = _decoded(ids, tokenizer, _special(ids, tokenizer))
    found = {"eval_exact_match": exact_match(texts, written, pattern)}
    if config.label_names is not None:
        names = [name.strip() for name in _as_written(config.label_names, tokenizer, continues)]
        given, wanted = ([label_index(text, names, pattern) for text in side] for side in (texts, written))
        found |= label_metrics(given, wanted, len(names), F1.of(config, usual_average(len(names))))
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
    draw: Draw | None = None,
    told: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """What `model` writes after each prompt; without one there is nothing to go on from.

    It is written as for an evaluation, unless there is another way to `draw` it; `told` is as for `write`.
    """
    examples = [example for example in examples if example.prompt_ids]
    texts, _ = _texts(model, examples, config, tokenizer, workers, None, continues, draw, told)
    inputs = [str(tokenizer.decode(list(example.prompt_ids or ()))) for example in examples]
    references = [example.reference for example in examples]
    return [Prediction(*row) for row in zip(inputs, texts, references, strict=True)]


def _texts(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    workers: Workers,
    read: Sequence[Read] | None,
    continues: bool,
    draw: Draw | None = None,
    told: Callable[[int], None] | None = None,
) -> tuple[list[str], list[list[int]]]:
    """What `model` writes after the prompt of each example, which must have one; and the ids of what it should.

    What a pass over the completions has `read` is not computed again.

    A model that `continues` its prompt goes on after the last position, so that prompts are padded at the left, and
    what it writes begins behind them.
    """

    def collated(prompts: Sequence[array[int]]) -> dict[str, Tensor]:
        return on_device(padded(prompts, tokenizer.pad_token_id, left=continues), model)

    beginning = {} if continues else _beginning(model, config, tokenizer)
    generation = greedy(model, config, tokenizer, most_new_tokens(config, continues), beginning)
    prompts = [example.prompt_ids or array("i") for example in examples]
    known = [[]] * len(examples) if read is None else list(map(partial(_begun, generation, continues), examples, read))
    states = None if read is None else [row.states if text else None for row, text in zip(read, known, strict=True)]
    ids = write(
        model,
        prompts,
        known,
        generation,
        collated,
        config,
        workers,
        continues=continues,
        states=states,
        draw=draw,
        told=told,
    )
    references = [example.reference for example in examples]
    wanted = _ids_alone(references, tokenizer, continues)
    # Where nobody knows an answer, none says which special tokens may be a part of one.
    kept = _special(wanted, tokenizer) if any(references) else _special(ids, tokenizer) - {beginning.get(FORCED)}
    if config.chat_column is None:
        return _decoded(ids, tokenizer, kept), wanted
    template = Template.of(tokenizer, config)
    return [template.answer(tokens, kept if any(references) else None) for tokens in ids], wanted


def _begun(generation: GenerationConfig, continues: bool, example: Example, read: Read) -> list[int]:
    """What is known of the text that follows an example's prompt; nothing where a pass read the prompt in another way.

    A model that has an encoder is not asked to go on with a text: of such a text all is known or nothing.
    """
    if not continues:
        text = begun(example.labels, read.tokens, generation)
        return text if is_whole(text, generation) else []
    prompt = example.prompt_ids or array("i")
    target = example.input_ids[len(prompt) :]
    # A prompt may be cut to leave room for the text, where the one that is learned from leaves its completion room.
    if not prompt or not target or example.input_ids[: len(prompt)] != prompt:
        return []
    if IGNORED in example.labels[len(prompt) :]:  # what was read there was not predicted
        return []
    return begun(target, read.tokens[-len(target) :], generation)


def answers_lost(
    rows: Sequence[Any], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, asked: bool, *, continues: bool
) -> list[Cut]:
    """For each row whether a text that is its completion would be cut before its answer, where texts are judged.

    Raises:
        UserError: the tokenizer leaves no answer in a completion: a pattern may want letters that it lowers.
    """
    if not (asked and config.predict_with_generate):
        return [Cut.NOTHING] * len(rows)
    ids = _ids_alone([row.completion for row in rows], tokenizer, continues)
    most, kept = most_new_tokens(config, continues), _special(ids, tokenizer)
    whole, written = (_decoded(side, tokenizer, kept) for side in (ids, [tokens[:most] for tokens in ids]))
    lost = []
    for row, reference, text in zip(rows, whole, written, strict=True):
        lost.append(answer_lost(reference, text, config, row.where))
    return lost


def answer_lost(reference: str, text: str, config: TrialConfig, where: str) -> Cut:
    """Whether the answer of a `reference` is lost in its beginning `text`. UserError if it has none."""
    wanted = answer(reference, config.answer_pattern)
    if wanted is None:
        kind = f"the completion as the tokenizer has it ('{reference}')"
        raise UserError(f"{where}: answer_pattern matches nothing in {kind}")
    return Cut.NOTHING if answer(text, config.answer_pattern) == wanted else Cut.ANSWER


def _as_written(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, continues: bool) -> list[str]:
    """What of `texts` a tokenizer keeps: some lower them, join spaces, or know no such letter."""
    ids = _ids_alone(texts, tokenizer, continues)
    return _decoded(ids, tokenizer, _special(ids, tokenizer))


def _ids_alone(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, continues: bool) -> list[list[int]]:
    """Ids of each text as it is written, without what the tokenizer puts around it."""
    if not texts:
        return []
    given = {"text" if continues else "text_target": list(texts)}
    return tokenizer(**given, add_special_tokens=False, verbose=False)["input_ids"]


def _decoded(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, kept: AbstractSet[int]) -> list[str]:
    """The text of each row, without special tokens but those that are `kept`."""
    if not kept:
        return tokenizer.batch_decode(rows, skip_special_tokens=True)
    dropped = all_special(tokenizer) - kept
    return tokenizer.batch_decode([[token for token in row if token not in dropped] for row in rows])


def _special(rows: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase) -> AbstractSet[int]:
    """The special tokens that are a part of texts, so that what is written is not judged without them."""
    around = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return {token for row in rows for token in row} & (all_special(tokenizer) - around)


def _beginning(model: Model, config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """What a decoder reads before it writes, and what it must write first: as in training, the form of a target."""
    import torch

    set_languages(config, tokenizer)  # the examples may be those that another process made
    form = tokenizer(text_target="a", return_special_tokens_mask=True)
    first = form["input_ids"][: form["special_tokens_mask"].index(0)]
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        start = model.config.decoder_start_token_id
    else:
        start = int(shift(torch.tensor(target_ids(["a"], tokenizer)))[0, 0])
    return {"decoder_start_token_id": start} | ({FORCED: first[0]} if first else {})
