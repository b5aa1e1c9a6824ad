"""Passes over rows that are made up: whether a model reads ahead, minds padding, or computes what another one does."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError, comes_again, first_line
from bilora_ray.measures import TASK_FACTS
from bilora_ray.training.compute.precision import dtype_of
from bilora_ray.training.metrics import IGNORED
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Example, Model, on_device, padded, stacked

# Tokens of a long row and of a short one, beside their special ones.
LONG, SHORT = 12, 5
# So many rows tell what is done with a row where that is a number or two: of one they may be anything by chance.
MANY = 16
# By how much two passes over the same may differ, as a share as in `difference`: sums in another order, no more.
EXACT, COARSE = 5e-3, 0.1


@dataclass(frozen=True)
class Probe:
    """A model, and what it takes to let it read.

    Attributes:
        model: in evaluation mode.
        config: the settings that it was loaded for.
        tokenizer: its own, with a padding token.
    """

    model: Model
    config: TrialConfig
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def words(self) -> list[int]:
        """Tokens that are not special, the same for each model of this vocabulary."""
        special = set(self.tokenizer.all_special_ids)
        known = min(len(self.tokenizer), _embeddings(self.model, self.tokenizer))
        return Random(0).choices([token for token in range(known) if token not in special], k=MANY * SHORT)

    @cached_property
    def short(self) -> list[list[int]]:
        """Texts of SHORT tokens: one, or MANY where a row has but a few logits."""
        count = MANY if TASKS[self.config.task].heads else 1
        return [self.words[start : start + SHORT] for start in range(0, count * SHORT, SHORT)]

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before a text and after it."""
        text = self.tokenizer("a", return_special_tokens_mask=True)
        marked = list(zip(text["input_ids"], text["special_tokens_mask"], strict=True))
        head, tail = (list(takewhile(lambda token: token[1], side)) for side in (marked, reversed(marked)))
        return [token for token, _ in head], [token for token, _ in reversed(tail)]

    def logits(self, *texts: Sequence[int]) -> list[Tensor]:
        """What the model makes of `texts` in one batch: of each its logits, less those of padding; float32."""
        head, tail = self.frame
        rows = [array("i", [*head, *text, *tail]) for text in texts]
        batch = padded(rows, self.tokenizer.pad_token_id)
        if self.model.config.is_encoder_decoder and TASK_FACTS[self.config.task].generates:
            rows = [array("i", text) for text in texts]
            batch["labels"] = stacked(rows, IGNORED)
        logits = self.model(**on_device(batch, self.model)).logits.float().cpu()
        return [logits[number][: len(row)] if logits.dim() == 3 else logits[number] for number, row in enumerate(rows)]

    def next_tokens(self, *prompts: Sequence[int]) -> Tensor:
        """(prompts, vocabulary), float32: what the model would write after each of `prompts`, padded as for a text."""
        head, _ = self.frame
        left = TASKS[self.config.task].continues
        batch = padded([array("i", [*head, *prompt]) for prompt in prompts], self.tokenizer.pad_token_id, left)
        written = self.model.generate(
            **on_device(batch, self.model),
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return written.logits[0].float().cpu()

    def reads_ahead(self) -> bool:
        """Whether a later token changes what is made of an earlier one."""
        first, second = self.logits(self.words[:LONG], self.words[:SHORT] + self.words[LONG + SHORT : 2 * LONG])
        known = len(self.frame[0]) + SHORT
        return self._apart(first[:known], second[:known])

    def minds_padding(self) -> bool:
        """Whether rows are other ones beside a longer row."""
        alone, (*beside, _) = self.logits(*self.short), self.logits(*self.short, self.words[:LONG])
        return self._apart(torch.stack(alone), torch.stack(beside))

    def writes_by_padding(self) -> bool:
        """Whether a prompt is gone on with in another way beside a longer one."""
        short = self.words[:SHORT]
        return self._apart(self.next_tokens(short)[0], self.next_tokens(short, self.words[:LONG])[0])

    def writes_as_it_reads(self) -> bool:
        """Whether a prompt is gone on with as a pass over it and a text behind it says."""
        prompt, end = self.words[:LONG], len(self.frame[0]) + LONG
        return not self._apart(self.logits(self.words[: 2 * LONG])[0][end - 1], self.next_tokens(prompt)[0])

    def _apart(self, one: Tensor, other: Tensor) -> bool:
        return not difference(one, other, self.config) <= tolerance(self.config)


def tolerance(config: TrialConfig) -> float:
    """The `difference` of two computations that is no more than rounding."""
    return EXACT if _is_exact(config) else COARSE


def difference(one: Tensor, other: Tensor, config: TrialConfig) -> float:
    """How far logits are from those of `one`, as a share of the spread of these: roots of mean squares.

    What a head says of rows may be far from 0 and hardly spread, and rounding takes its share of what there is: where
    that is not little, the share is of the logits' size.
    """
    middle = 0.0 if TASKS[config.task].heads and not _is_exact(config) else one.mean()
    return float((one - other).norm() / (one - middle).norm().clamp_min(torch.finfo(torch.float32).tiny))


def _is_exact(config: TrialConfig) -> bool:
    return dtype_of(config) == torch.float32 and config.quantization is None


def logits_of(model: Model, config: TrialConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All that `model` makes of rows that are made up, as one row of numbers: float32, on the CPU.

    The rows are the same for each model with one vocabulary, or one image processor.
    """
    model.eval()
    with torch.no_grad():
        if reads_tokens(model):
            probe = Probe(model, config, tokenizer)
            return torch.cat([part.flatten() for part in probe.logits(probe.words[:LONG], *probe.short)])
        noise = torch.randint(256, (MANY, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        batch = tokenizer(images=[image.numpy() for image in noise], return_tensors="pt")
        return model(pixel_values=batch["pixel_values"].to(model.device)).logits.float().cpu().flatten()


def check_passes(model: Model, config: TrialConfig, tokenizer: PreTrainedTokenizerBase, training: bool = True) -> None:
    """Look at how `model`, in evaluation mode, reads rows that are made up; what reads no tokens is not looked at.

    Args:
        model: as it is loaded.
        config: the settings.
        tokenizer: the model's own.
        training: whether it is to learn; else it is measured only, and what is learned from is not looked at.

    Raises:
        UserError: it can read none, or no padding; it is to go on with a text and sees what comes; or a row is another
            one when it is padded, and the batch sizes let that happen.
    """
    if not reads_tokens(model):
        return
    check_tokens(model, config, tokenizer, ())
    with reading(config):
        problem = _problem(Probe(model, config, tokenizer), training)
    if problem is not None:
        setting, line = problem
        raise UserError(f"{setting}: '{config.model_name_or_path}' {line}")


def check_tokens(
    model: Model, config: TrialConfig, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example]
) -> None:
    """UserError if there is a token in `examples`, or the padding's, that `model` has no embedding of."""
    if not reads_tokens(model) or len(tokenizer) <= (known := _embeddings(model, tokenizer)):
        return
    learned = TASK_FACTS[config.task].generates  # else labels are indices, or numbers
    ids = (
        ids
        for example in examples
        for ids in (example.input_ids, example.labels if learned else None, example.prompt_ids)
        if ids
    )
    highest = max(map(max, ids), default=0)
    for token in (tokenizer.pad_token_id, highest):
        if token >= known:
            raise UserError(
                f"model_name_or_path: the tokenizer of {config.model_name_or_path} makes token {token} "
                f"('{tokenizer.convert_ids_to_tokens(token)}'), and the model has embeddings of {known}; save it with "
                "model.resize_token_embeddings(len(tokenizer)) in a folder, and name that"
            )


def reads_tokens(model: Model) -> bool:
    """Whether `model` is one of texts."""
    return bool(model.main_input_name == "input_ids")


def _embeddings(model: Model, tokenizer: PreTrainedTokenizerBase) -> int:
    """Of how many tokens `model` has embeddings; of all, where it makes them in another way."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return len(tokenizer)


@contextmanager
def reading(config: TrialConfig) -> Iterator[None]:
    """Turns what the model's own code raises at a row into one line, for it would raise it each time."""
    try:
        with torch.no_grad():  # of what a model keeps from a pass in inference mode, nothing could be learned later
            yield
    except Exception as error:  # a model's own code may raise any; what another start may mend is raised again
        if not comes_again(error):
            raise
        line = f"model_name_or_path: '{config.model_name_or_path}' cannot read a row ({first_line(error)})"
        raise UserError(line) from error


def _problem(probe: Probe, training: bool) -> tuple[str, str] | None:
    config = probe.config
    continues = TASKS[config.task].continues
    if training and continues and probe.reads_ahead():
        return "model_name_or_path", (
            f"sees the tokens that it is to predict, as an encoder does; {config.task} needs a decoder "
            "(a BERT is one with is_decoder: true in its config.json)"
        )
    evaluated = "per_device_eval_batch_size"
    sizes = ["per_device_train_batch_size", evaluated] if training else [evaluated]
    several = [key for key in sizes if getattr(config, key) > 1]
    if training and config.tokens_per_pass is not None:
        several.append("tokens_per_pass")
    # What a row that is padded at its right holds is not seen from before it.
    if not continues and several and probe.minds_padding():
        line = f"reads a row in another way beside a longer one; needs {' and '.join(sizes)} of 1"
        return several[0], line + (", and no tokens_per_pass" if "tokens_per_pass" in several else "")
    if config.predict_with_generate and config.writes_several and probe.writes_by_padding():
        written = "per_device_generation_batch_size"
        return written, f"goes on in another way beside a longer prompt; predict_with_generate needs {written} of 1"
    return None
