"""The options of `predict` that say what is done, and whether they go together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bilora_ray.cli.options import absolute
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError

if TYPE_CHECKING:
    from bilora_ray.training.prediction.sampling import Sampling

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Choices:
    """The options that say what is done."""

    data: str | None
    output: Path | None
    base_model: bool
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    server: str | None
    model: str | None

    @property
    def is_drawn(self) -> bool:
        return self.temperature is not None or self.top_p is not None

    def check(self, prompt: str | None) -> None:
        """UserError unless the options go together."""
        if prompt is not None and self.data is not None:
            raise UserError("--data: is asked instead of a prompt; leave one out")
        if self.output is not None:
            self._check_output()
        for name, number in (("--temperature", self.temperature), ("--top-p", self.top_p)):
            if number is not None and not math.isfinite(number):
                raise UserError(f"{name} {number}: must be a finite number")
        if self.seed is not None and not self.is_drawn:
            raise UserError("--seed: decides nothing of greedy texts; give --temperature or --top-p")
        if self.model is not None and self.server is None:
            raise UserError("--model: is what a server calls the adapter; give --server")
        if self.server is not None:
            given = {"--output": self.output, "--temperature": self.temperature, "--top-p": self.top_p}
            for option, value in {**given, "--base-model": self.base_model or None}.items():
                if value is not None:
                    raise UserError(f"{option}: says nothing beside --server, whose greedy answers are compared")

    def _check_output(self) -> None:
        assert self.output is not None
        if self.data is None:
            raise UserError("--output: is for the rows of --data; a prompt's answer is printed")
        if self.output.suffix != SUFFIX:
            raise UserError(f"--output {self.output}: is written as JSON lines; its name must end with {SUFFIX}")
        if self.output.exists():
            raise UserError(f"--output {self.output}: exists already")
        if not absolute(self.output).parent.is_dir():
            raise UserError(f"--output {self.output}: no such folder: {absolute(self.output).parent}")

    def sampling(self, config: TrialConfig) -> Sampling | None:
        """How a text is drawn; None: greedily."""
        if not self.is_drawn:
            return None
        from bilora_ray.training.prediction.sampling import Sampling

        return Sampling(self.temperature or 1.0, self.top_p or 1.0, self.seed or 0, config.max_new_tokens)
