"""A trial without its weights and its steps: most of what it would refuse shows in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from bilora_ray.config import TrialConfig
from bilora_ray.training import model as models
from bilora_ray.training.loading import Truncation, load_data
from bilora_ray.training.metrics import IGNORED


@dataclass(frozen=True)
class Rehearsal:
    """What a trial would begin with.

    Attributes:
        rows: how many there are and what `max_length` takes from them, by split: `train` and `validation`.
        input: text of the first training row, as the model reads it, with special tokens.
        target: the part of it, or the completion or label, that the model learns.
    """

    rows: Mapping[str, Truncation]
    input: str
    target: str


def rehearse(config: TrialConfig, here: bool = True) -> Rehearsal:
    """Tokenize the data, and put the method's adapters on the base model's shape.

    Args:
        config: the settings.
        here: whether trials run on this machine, so that its packages and GPUs are theirs.

    Raises:
        UserError: the data, the tokenizer, the model, `max_length` or a target module is not as the settings say, or a
            package that they need is missing.
    """
    data = load_data(config)
    model = models.add_primary(models.load_shape(config, data.label_names, here), config, fresh=())
    models.build_optimizer(model, config, _nowhere)
    first = data.train[0]
    target = _text(first.labels, data.tokenizer)
    if config.task == "sequence-classification" and data.label_names is not None:
        target = data.label_names[first.labels[0]]
    return Rehearsal(data.truncation, _text(first.input_ids, data.tokenizer), target)


def _text(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([token for token in ids if token != IGNORED]))


def _nowhere(_: PeftModel) -> None:
    """Leave the parameters, which have no values, where they are not."""
