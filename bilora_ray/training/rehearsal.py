"""A trial without its weights and its steps: most of what it would refuse shows in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from bilora_ray.config import TrialConfig
from bilora_ray.training import model as models
from bilora_ray.training.data import Truncation, prepare
from bilora_ray.training.metrics import IGNORED
from bilora_ray.training.rows import load_rows


@dataclass(frozen=True)
class Rehearsal:
    """What a trial would begin with.

    Attributes:
        rows: how many there are and what `max_length` takes from them, by split: `train` and `validation`.
        reads: text of the first training row, as the model reads it, with special tokens.
        learns: the part of it, or the completion or label, that the model learns.
    """

    rows: Mapping[str, Truncation]
    reads: str
    learns: str


def rehearse(config: TrialConfig) -> Rehearsal:
    """Tokenize the data, and put the method's adapters on the base model's shape.

    Raises:
        UserError: the data, the tokenizer, the model, `max_length` or a target module is not as the settings say.
    """
    rows = load_rows(config)
    tokenizer = models.load_tokenizer(config)
    prepared = prepare(rows, config, tokenizer)
    model = models.add_primary(models.load_shape(config, rows.label_names), config, fresh=())
    models.build_optimizer(model, config, _nowhere)
    first = prepared.train[0]
    learns = _text(first.labels, tokenizer) if rows.label_names is None else rows.label_names[first.labels[0]]
    return Rehearsal(prepared.truncation, _text(first.input_ids, tokenizer), learns)


def _text(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([token for token in ids if token != IGNORED]))


def _nowhere(_: PeftModel) -> None:
    """Leave the parameters, which have no values, where they are not."""
