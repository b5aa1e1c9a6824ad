"""How long rows are: in tokens where the base model's tokenizer can be had, else in characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import ceil
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.measures import TASK_FACTS
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Dataset

# So many rows tell.
MEASURED = {"max_train_samples": 2000, "max_eval_samples": 500}
# Tokens; longer than any row. No tokenizer minds.
ENDLESS = 10_000_000
# Characters of a token: few enough that a row is seldom longer than is guessed by them.
CHARACTERS = 3
# Lengths are rounded up to a multiple of it.
STEP = 8


@dataclass(frozen=True)
class Lengths:
    """Of rows, each list with the longest last; of images there are none.

    Attributes:
        whole: tokens of a row, or about so many.
        prompts: of what is read before a text is written.
        answers: of what is written.
        guessed: whether they come of characters.
    """

    whole: Sequence[int] = ()
    prompts: Sequence[int] = ()
    answers: Sequence[int] = ()
    guessed: bool = False

    @property
    def line(self) -> str:
        """All of it, for people."""
        kinds = {"rows": self.whole, "prompts": self.prompts, "answers": self.answers}
        parts = [f"{len(values)} {kind} have {_spread(values)}" for kind, values in kinds.items() if values]
        unit = f"tokens, guessed at {CHARACTERS} characters each" if self.guessed else "tokens"
        return f"lengths in {unit}: {', '.join(parts)}"


def lengths_of(config: TrialConfig, rows: Dataset, has_tokenizer: bool) -> Lengths:
    """Those of `rows`, which are the ones that `config` names.

    Raises:
        UserError: the tokenizer cannot be loaded, or lacks what the task needs.
    """
    if TASK_FACTS[config.task].reads_images:
        return Lengths()
    return _in_tokens(config) if has_tokenizer else _guessed(rows, TASK_FACTS[config.task].generates)


def _in_tokens(config: TrialConfig) -> Lengths:
    from bilora_ray.quiet import quiet

    quiet()
    from bilora_ray.training.loading import load_data

    uncut = {**MEASURED, "max_length": ENDLESS, "truncation": "both"}
    data = load_data(config.model_copy(update=uncut), beginning=True)
    task, examples = TASKS[config.task], [*data.train, *data.validation]
    if not TASK_FACTS[config.task].generates:
        return Lengths(sorted(example.length for example in examples))
    return Lengths(
        sorted(max(example.length, len(example.labels)) for example in examples),
        sorted(len(example.prompt_ids or ()) for example in data.validation),
        sorted(int(task.target_count([example])) for example in examples),
    )


def _guessed(rows: Dataset, writes: bool) -> Lengths:
    first = list(islice(chain(rows.train, rows.validation), MEASURED["max_train_samples"]))
    prompts, answers = [_read(row) for row in first], [_tokens(getattr(row, "completion", "")) for row in first]
    if not writes:
        return Lengths(sorted(prompts), guessed=True)
    whole = sorted(prompt + answer for prompt, answer in zip(prompts, answers, strict=True))
    return Lengths(whole, sorted(prompts), sorted(answers), guessed=True)


def _read(row: Any) -> int:
    texts = [getattr(row, key, None) or "" for key in ("prompt", "text", "text_pair")]
    # Of a chat all turns, the last one too.
    turns = [str(message.get("content", "")) for message in getattr(row, "messages", ())]
    return _tokens(" ".join([*texts, *turns, *getattr(row, "words", ())]))


def _tokens(text: str) -> int:
    return ceil(len(text) / CHARACTERS)


def _spread(values: Sequence[int]) -> str:
    return f"{values[0]} to {values[-1]} (median {values[len(values) // 2]})"


def rounded_up(length: float) -> int:
    """To the next multiple of STEP."""
    return ceil(length / STEP) * STEP
