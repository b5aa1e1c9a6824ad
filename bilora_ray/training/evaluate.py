"""What an adapter is worth: loss and metrics over the validation rows, with the auxiliary out of the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bilora_ray.config import TrialConfig
from bilora_ray.training import model as models
from bilora_ray.training.data import collate, collate_prompts, eval_batches, in_row_order, prepare
from bilora_ray.training.examples import Example
from bilora_ray.training.metrics import LossSum, exact_match, label_index, label_metrics
from bilora_ray.training.rows import load_rows

# A transformers model or a PEFT model around one: neither's stubs know what the other adds.
Model = Any


def evaluate(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:
    """The metrics of `config.available_metrics`, at the weights that are exported: those of evaluation mode.

    Args:
        model: on the device where it shall compute. It is left in the mode it came in.
        examples: validation rows, with prompts if `config.predict_with_generate`.
        config: task, batch size and what to measure.
        tokenizer: decodes generated text.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            metrics = _losses(model, examples, config, tokenizer)
            if config.predict_with_generate:
                metrics |= _generated(model, examples, config, tokenizer)
    finally:
        model.train(was_training)
    return metrics


def evaluate_adapter(adapter: Path | None, config: TrialConfig) -> dict[str, float]:
    """The metrics of an exported adapter, or of the base model alone, on the validation rows of `config`.

    Raises:
        UserError: the data or the base model are not as `config` says.
    """
    rows = load_rows(config)
    tokenizer = models.load_tokenizer(config)
    examples = prepare(rows, config, tokenizer).validation
    model: Model = models.load_base(config, tokenizer, rows.label_names)[0]
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return evaluate(model, examples, config, tokenizer)


def _losses(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:
    total = LossSum()
    batches = eval_batches([len(example.input_ids) for example in examples], config.per_device_eval_batch_size)
    predicted: list[int] = []
    for rows in batches:
        batch = _on_device(collate([examples[row] for row in rows], config.task, tokenizer.pad_token_id), model)
        # The model would compute its own mean loss from labels. Only an encoder-decoder needs them: for its input.
        labels = batch["labels"] if config.task == "seq2seq-lm" else batch.pop("labels")
        logits = model(**batch).logits
        if config.task == "causal-lm":  # position i predicts token i + 1
            total.add(logits[:, :-1], labels[:, 1:])
        else:
            total.add(logits, labels)
        if config.task == "sequence-classification":
            predicted += logits.argmax(-1).tolist()
    if config.task != "sequence-classification":
        return total.metrics()
    reference = [example.labels[0] for example in examples]
    num_labels = model.config.num_labels
    return {"eval_loss": total.mean, **label_metrics(in_row_order(batches, predicted), reference, num_labels)}


def _generated(
    model: Model,
    examples: Sequence[Example],
    config: TrialConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:
    lengths = [len(example.prompt_ids or ()) for example in examples]
    batches = eval_batches(lengths, config.per_device_eval_batch_size)
    texts: list[str] = []
    for rows in batches:
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
        )
        start = prompts["input_ids"].shape[1] if config.task == "causal-lm" else 0
        texts += tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
    texts = in_row_order(batches, texts)
    references = [example.reference for example in examples]
    metrics = {"eval_exact_match": exact_match(texts, references, config.answer_pattern)}
    if config.label_names is not None:
        names, pattern = config.label_names, config.answer_pattern
        given, wanted = ([label_index(text, names, pattern) for text in side] for side in (texts, references))
        metrics |= label_metrics(given, wanted, len(names))
    return metrics


def _ends(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, which training appends, and the model's own."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def _on_device(batch: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    return {key: tensor.to(model.device) for key, tensor in batch.items()}
