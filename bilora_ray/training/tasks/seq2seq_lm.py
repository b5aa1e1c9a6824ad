"""seq2seq-lm: an encoder reads the prompt, and a decoder learns the completion.

Of a row with more than `max_length` tokens in either, prompt and completion each lose their end, whatever `truncation`
says but `drop`: then the row is left out.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from bilora_ray.config import TrialConfig
from bilora_ray.training.tasks.base import Cut, Encoded, Example, Model, Task, cross_entropy
from bilora_ray.training.tasks.text import (
    TextRow,
    check_answers,
    check_tokenizer,
    collate,
    generated,
    measure,
    metrics,
    predict,
    target_count,
    text_notes,
    text_row,
    with_special_tokens,
    without_special_tokens,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def _examples(
    rows: Sequence[TextRow], config: TrialConfig, tokenizer: PreTrainedTokenizerBase, keep_prompts: bool
) -> Iterator[Encoded]:
    check_tokenizer(config, tokenizer)
    inputs = with_special_tokens([row.prompt for row in rows], None, config.max_length, tokenizer)
    completions = without_special_tokens([row.completion for row in rows], tokenizer)
    for row, (ids, _, cut), completion in zip(rows, inputs, completions, strict=True):
        target = [*completion, tokenizer.eos_token_id]
        example = Example(
            input_ids=ids,
            labels=array("i", target[: config.max_length]),
            prompt_ids=ids if keep_prompts else None,
            reference=row.completion,
        )
        taken = Cut.PROMPT if cut else Cut.NOTHING
        if len(target) > config.max_length:
            taken |= Cut.COMPLETION
        yield [] if taken and config.truncation == "drop" else [(example, taken)]


def _target_count(examples: Sequence[Example]) -> int:
    return target_count(example.labels for example in examples)


def _loss(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """The model's own, with what the routers of experts may add to it, unless that is not float32."""
    output = model(**batch)
    exact = output.loss.dtype == output.loss.float().dtype
    return output.loss if exact else cross_entropy(output.logits, batch["labels"])


def _forward(model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The model makes the decoder's input of the labels, so that it needs them."""
    return model(**batch).logits, batch["labels"]


TASK = Task(
    peft_type="SEQ_2_SEQ_LM",
    row=text_row,
    examples=_examples,
    collate=collate,
    target_count=_target_count,
    forward=_forward,
    loss=_loss,
    measure=measure,
    metrics=metrics,
    predict=partial(predict, continues=False),
    check=check_answers,
    notes=text_notes,
    generated=partial(generated, continues=False),
)
