"""seq2seq-lm: an encoder reads the prompt, and a decoder learns the completion.

Of a row with more than `max_length` tokens in either, prompt and completion each lose their end, whatever `truncation`
says but `drop`: then the row is left out.

A completion is learned in the form that the tokenizer gives what a decoder writes, which some begin with a token of
their own or a language code. The model shifts it by itself, and generation begins where that begins.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bilora_ray.config import TrialConfig
from bilora_ray.training.compute.generation import stops
from bilora_ray.training.compute.targets import (
    TARGETS,
    decoder_inputs,
    mean_loss,
    target_logits,
    with_targets,
    without_targets,
)
from bilora_ray.training.tasks.base import Cut, Encoded, Example, Model, Task, cross_entropy
from bilora_ray.training.tasks.text import (
    TextRow,
    answers_lost,
    asked_row,
    check_answers,
    check_tokenizer,
    collate,
    generated,
    measure,
    metrics,
    predict,
    set_languages,
    target_count,
    target_ids,
    text_about,
    text_label_names,
    text_notes,
    text_row,
    with_special_tokens,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def _examples(
    rows: Sequence[TextRow], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, keep_prompts: bool
) -> Iterator[Encoded]:
    check_tokenizer(config, tokenizer)
    set_languages(config, tokenizer)
    inputs = with_special_tokens([row.prompt for row in rows], None, config.max_length, tokenizer)
    targets = target_ids([row.completion for row in rows], tokenizer)
    lost = answers_lost(rows, config, tokenizer, keep_prompts, continues=False)
    for row, (ids, _, cut), target, unjudged in zip(rows, inputs, targets, lost, strict=True):
        example = Example(
            input_ids=ids,
            labels=array("i", _shortened(target, config.max_length, tokenizer)),
            prompt_ids=ids if keep_prompts else None,
            reference=row.completion,
        )
        taken = Cut.PROMPT if cut else Cut.NOTHING
        if len(target) > config.max_length:
            taken |= Cut.COMPLETION
        yield [] if taken and config.truncation == "drop" else [(example, taken | unjudged)]


def _shortened(target: list[int], max_length: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`target` less its end; but a language code that follows the end of sequence is what some decoders start with."""
    if len(target) <= max_length or target[-1] == tokenizer.eos_token_id:
        return target[:max_length]
    return [*target[: max_length - 1], target[-1]]


def _target_count(examples: Sequence[Example]) -> int:
    return target_count(example.labels for example in examples)


def _sides(example: Example) -> tuple[int, ...]:
    return example.length, len(example.labels)


def _collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    return with_targets(collate(examples, tokenizer), shift=0)


def _loss(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """The model's own, with what the routers of experts may add to it, unless that is not float32."""
    if (shifted := decoder_inputs(model)) is not None:
        return mean_loss(target_logits(model, _read(batch, shifted), batch), batch)
    output = model(**without_targets(batch))
    exact = output.loss.dtype == output.loss.float().dtype
    return output.loss if exact else cross_entropy(output.logits, batch["labels"])


def _forward(model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if (shifted := decoder_inputs(model)) is not None:
        return target_logits(model, _read(batch, shifted), batch), batch[TARGETS]
    # The model makes the decoder's input of the labels, so that it needs them.
    return model(**without_targets(batch)).logits, batch["labels"]


def _read(batch: dict[str, Tensor], shifted: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    read = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return {**read, "decoder_input_ids": shifted(batch["labels"]), "use_cache": False}


TASK = Task(
    peft_type="SEQ_2_SEQ_LM",
    row=text_row,
    examples=_examples,
    collate=_collate,
    target_count=_target_count,
    forward=_forward,
    loss=_loss,
    measure=measure,
    metrics=metrics,
    predict=partial(predict, continues=False),
    asked=asked_row,
    label_names=text_label_names,
    check=check_answers,
    about=text_about,
    notes=text_notes,
    sides=_sides,
    generated=partial(generated, continues=False),
    stops=stops,
)
