"""A trial without its weights and its steps: most of what it would refuse shows in seconds."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel

from bilora_ray.config import TrialConfig
from bilora_ray.training import model as models
from bilora_ray.training.data import Truncation, prepare
from bilora_ray.training.rows import load_rows


def rehearse(config: TrialConfig) -> Mapping[str, Truncation]:
    """Tokenize the data, and put the method's adapters on the base model's shape.

    Returns:
        How many rows there are and what `max_length` takes from them, by split: `train` and `validation`.

    Raises:
        UserError: the data, the tokenizer, the model, `max_length` or a target module is not as the settings say.
    """
    rows = load_rows(config)
    tokenizer = models.load_tokenizer(config)
    truncation = prepare(rows, config, tokenizer).truncation
    model = models.add_primary(models.load_shape(config, rows.label_names), config, fresh=())
    models.build_optimizer(model, config, _nowhere)
    return truncation


def _nowhere(_: PeftModel) -> None:
    """Leave the parameters, which have no values, where they are not."""
