"""What an adapter is worth: loss and metrics over the validation rows, with the auxiliary out of the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bilora_ray.config import TrialConfig
from bilora_ray.training import model as models
from bilora_ray.training.data.batches import eval_batches, in_row_order
from bilora_ray.training.distributed.workers import ALONE, Workers
from bilora_ray.training.loading import Loaded, load_data
from bilora_ray.training.metrics import LossSum, exact_match, label_index, label_metrics
from bilora_ray.training.tasks.base import Example, collate, collate_prompts

# A transformers model or a PEFT model around one: neither's stubs know what the other adds.
Model = Any


def evaluate(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    workers: Workers = ALONE,
) -> dict[str, float]:
    """The metrics of `config.available_metrics`, at the weights that are exported: those of evaluation mode.

    Several workers share the batches, which are those of one worker: the metrics are the same, to the last bit.

    Args:
        model: on the device where it shall compute. It is left in the mode it came in.
        examples: validation rows, with prompts if `config.predict_with_generate`.
        config: task, batch size and what to measure.
        tokenizer: decodes generated text.
        workers: who share the work; each gets the metrics.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            metrics = _losses(model, examples, config, tokenizer, workers)
            if config.predict_with_generate:
                metrics |= _generated(model, examples, config, tokenizer, workers)
    finally:
        model.train(was_training)
    return metrics


@dataclass(frozen=True)
class Prediction:
    """What a model makes of a row.

    Attributes:
        input: the row as the model reads it, with special tokens.
        prediction: what it writes then, or the label that it finds most likely.
        reference: the row's completion or label.
    """

    input: str
    prediction: str
    reference: str


def load_adapted(adapter: Path | None, config: TrialConfig) -> tuple[Model, Loaded]:
    """The base model of `config` with an exported adapter, or alone, and the data.

    Raises:
        UserError: the data or the base model are not as `config` says, or the adapter is not the base model's.
    """
    data = load_data(config)
    model: Model = models.load_base(config, data.tokenizer, data.label_names)[0]
    return model if adapter is None else models.load_adapter(model, adapter), data


def predict(model: Model, data: Loaded, config: TrialConfig, count: int) -> list[Prediction]:
    """What `model` makes of the first `count` validation rows; text is decoded greedily, as for `eval_exact_match`.

    Args:
        model: as `load_adapted` gives it.
        data: the same.
        config: the settings.
        count: rows, or fewer if there are not so many.
    """
    examples, tokenizer = data.validation[:count], data.tokenizer
    model.eval()
    with torch.no_grad():
        if config.task == "sequence-classification":
            names = data.label_names or ()
            batches = [collate([example], config.task, tokenizer.pad_token_id) for example in examples]
            predicted = [names[int(model(**_on_device(batch, model)).logits.argmax())] for batch in batches]
            references = [names[example.labels[0]] for example in examples]
            inputs = [example.input_ids for example in examples]
        else:
            examples = [
                example for example in examples if example.prompt_ids
            ]  # without one there is nothing to go on from
            predicted = _texts(model, examples, config, tokenizer)
            references = [example.reference for example in examples]
            inputs = [example.prompt_ids or example.input_ids for example in examples]
    texts = [str(tokenizer.decode(ids.tolist())) for ids in inputs]
    return [Prediction(*row) for row in zip(texts, predicted, references, strict=True)]


def _losses(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    workers: Workers,
) -> dict[str, float]:
    def measure(rows: Sequence[int]) -> tuple[LossSum, list[int]]:
        batch = _on_device(collate([examples[row] for row in rows], config.task, tokenizer.pad_token_id), model)
        # The model would compute its own mean loss from labels. Only an encoder-decoder needs them: for its input.
        labels = batch["labels"] if config.task == "seq2seq-lm" else batch.pop("labels")
        logits, loss = model(**batch).logits, LossSum()
        if config.task == "causal-lm":  # position i predicts token i + 1
            loss.add(logits[:, :-1], labels[:, 1:])
        else:
            loss.add(logits, labels)
        return loss, logits.argmax(-1).tolist() if config.task == "sequence-classification" else []

    batches = eval_batches([len(example.input_ids) for example in examples], config.per_device_eval_batch_size)
    measured = workers.map(measure, batches)
    total = LossSum.of([loss for loss, _ in measured])
    if config.task != "sequence-classification":
        return total.metrics()
    predicted = in_row_order(batches, [label for _, labels in measured for label in labels])
    reference = [example.labels[0] for example in examples]
    return {"eval_loss": total.mean, **label_metrics(predicted, reference, model.config.num_labels)}


def _generated(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    workers: Workers,
) -> dict[str, float]:
    texts = _texts(model, examples, config, tokenizer, workers)
    references = [example.reference for example in examples]
    metrics = {"eval_exact_match": exact_match(texts, references, config.answer_pattern)}
    if config.label_names is not None:
        names, pattern = config.label_names, config.answer_pattern
        given, wanted = ([label_index(text, names, pattern) for text in side] for side in (texts, references))
        metrics |= label_metrics(given, wanted, len(names))
    return metrics


def _texts(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
    workers: Workers = ALONE,
) -> list[str]:
    """What `model` writes after the prompt of each example, which must have one."""

    def generate(rows: Sequence[int]) -> list[str]:
        prompts = collate_prompts([examples[row] for row in rows], config.task, tokenizer.pad_token_id)
        prompts = _on_device(prompts, model)
        output = model.generate(
            **prompts,
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            num_beams=1,
            # A model's own defaults for generation are for chatting, and need not know the end that was trained.
            repetition_penalty=1.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=_ends(model, tokenizer),
            # Every forward pass gathers the weights, so whose texts are done goes on with those whose aren't.
            synced_gpus=workers.sharded and workers.world_size > 1,
        )
        start = prompts["input_ids"].shape[1] if config.task == "causal-lm" else 0
        return tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)

    lengths = [len(example.prompt_ids or ()) for example in examples]
    batches = eval_batches(lengths, config.per_device_eval_batch_size)
    return in_row_order(batches, [text for part in workers.map(generate, batches) for text in part])


def _ends(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, which training appends, and the model's own."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def _on_device(batch: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    return {key: tensor.to(model.device) for key, tensor in batch.items()}
