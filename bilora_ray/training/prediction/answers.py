"""What an adapter, or its base model, makes of questions: texts, or labels with how likely each is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.measures import TASK_FACTS
from bilora_ray.recipe import is_whole
from bilora_ray.training.compute.varlen import batch_of
from bilora_ray.training.data.batches import in_row_order
from bilora_ray.training.distributed.workers import ALONE
from bilora_ray.training.evaluate import in_passes, load_model
from bilora_ray.training.model import load_processor
from bilora_ray.training.prediction.sampling import Sampling
from bilora_ray.training.probe.passes import check_tokens
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Answer, Cut, Example, Model, Processor, Row, on_device
from bilora_ray.training.tasks.text import predict

Told = Callable[[int], None]


@dataclass(frozen=True)
class Asked:
    """A model that is asked, and its base model beside it.

    Attributes:
        config: the settings: those of `questions.asking`.
        processor: the base's tokenizer, or its image processor.
        model: with the adapter, or merged.
        base: the base model, where `model` is merged and so has none in it.
        notes: what to tell who asks it.
    """

    config: TrialConfig
    processor: Processor
    model: Model
    base: Model | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, exported: Path, config: TrialConfig, of_base: TrialConfig | None = None) -> Asked:
        """An exported adapter on its base model, or a merged model.

        Args:
            exported: the folder.
            config: the settings.
            of_base: the same with the base model in the place of a merged one; None: it is not asked.

        Raises:
            UserError: base model and adapter are not as `config` says.
        """
        processor, whole = load_processor(config), is_whole(exported)
        model, told, random = load_model(None if whole else exported, config, processor, config.label_names)
        base = None
        if whole and of_base is not None:
            base, _, random = load_model(None, of_base, load_processor(of_base), config.label_names)
            base.eval()
        return cls(config, processor, model.eval(), base, (*told, *(random if of_base is not None else ())))

    def examples(self, rows: Sequence[Row]) -> tuple[list[Example], int]:
        """What is read of each row; and how many lost a part to `max_length`.

        Raises:
            UserError: the tokenizer leaves nothing of a row, or the model has no embedding of one of its tokens.
        """
        found, cut = [], 0
        encoded = TASKS[self.config.task].examples(rows, self.config, self.processor, True)
        for row, parts in zip(rows, encoded, strict=True):
            example, lost = parts[-1]  # a chat is asked for its last turn
            if not example.length or (example.prompt_ids is not None and not example.prompt_ids):
                raise UserError(f"{row.where}: there is no text to read")
            found.append(example)
            cut += self._is_cut(example, lost)
        check_tokens(self.model, self.config, self.processor, found)
        return found, cut

    def _is_cut(self, example: Example, lost: Cut) -> bool:
        """Whether what is read lost a part, and not only what would be learned beside an answer that is known."""
        if example.prompt_ids is not None and TASKS[self.config.task].continues:
            fills = len(example.prompt_ids) >= self.config.max_length - self.config.max_new_tokens
            return fills and bool(lost & (Cut.PROMPT | Cut.WHOLE_PROMPT))
        return bool(lost & Cut.PROMPT)

    def answers(
        self,
        examples: Sequence[Example],
        sampling: Sampling | None = None,
        first: int = 0,
        told: Told = lambda rows: None,
        base_model: bool = False,
    ) -> list[Answer]:
        """What the model makes of `examples`, in their order: exactly what an evaluation of these rows makes of them.

        Args:
            examples: what is asked.
            sampling: how a text is drawn; None: greedily.
            first: the number of the first row, by which it is drawn.
            told: is called with how many rows more have an answer.
            base_model: have the base model answer instead.
        """
        with self._asked(base_model) as model, torch.no_grad():
            if TASK_FACTS[self.config.task].generates:
                return self._texts(model, examples, sampling, first, told)
            return self._labels(model, examples, told)

    def log_likelihoods(self, example: Example, text: str, base_model: bool = False) -> list[float]:
        """For each token of a `text` its log-probability behind the prompt of `example`, in nats.

        What is longer than a text may be is left out.
        """
        prompt = list(example.prompt_ids or ())
        tokens = self.processor(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = tokens[: self.config.max_new_tokens]
        ids = torch.tensor([[*prompt, *tokens]], device=self.model.device)
        with self._asked(base_model) as model, torch.no_grad():
            scores = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        return [float(score[token]) for score, token in zip(scores, tokens, strict=True)]

    def _texts(
        self, model: Model, examples: Sequence[Example], sampling: Sampling | None, first: int, told: Told
    ) -> list[Answer]:
        def drawn(rows: Sequence[int]) -> Any:
            assert sampling is not None
            return sampling.of([first + row for row in rows])

        predictions = predict(
            model,
            examples,
            self.config,
            self.processor,
            self.config.label_names,
            ALONE,
            continues=TASKS[self.config.task].continues,
            draw=None if sampling is None else drawn,
            told=told,
        )
        return [Answer(found.prediction) for found in predictions]

    def _labels(self, model: Model, examples: Sequence[Example], told: Told) -> list[Answer]:
        task = TASKS[self.config.task]
        assert task.answers is not None
        answers = task.answers

        def compute(rows: Sequence[int]) -> list[Answer]:
            batch = on_device(batch_of(task, model, [examples[row] for row in rows], self.processor), model)
            found = answers(*task.forward(model, batch), self.config.label_names)
            told(len(rows))
            return found

        return in_row_order(*in_passes(model, examples, self.config, compute))

    @contextmanager
    def _asked(self, base_model: bool) -> Iterator[Model]:
        if not base_model:
            yield self.model
        elif isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.model
        else:
            assert self.base is not None, "it was not asked for as the model was loaded"
            yield self.base
