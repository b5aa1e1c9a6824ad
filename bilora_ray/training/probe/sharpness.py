"""How flat an adapter is on rows: what `method.sharpness` measures, of the loss of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, TypeVar

from peft.tuners.lora import LoraLayer
from torch import Tensor

from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.method.sharpness import Eigenvalue, adversarial_rises, m_sharpness, random_rises, top_eigenvalue
from bilora_ray.method.spaces import FullSpace, LoraSpace, Pass, Space
from bilora_ray.training.compute.cutting import Budget, cut, positions
from bilora_ray.training.compute.memory import ONE_ROW, Shortage, current_room, failure, is_out_of_memory, release
from bilora_ray.training.compute.varlen import batch_of, is_flat, placed
from bilora_ray.training.distributed.workers import ALONE
from bilora_ray.training.tasks import TASKS
from bilora_ray.training.tasks.base import Example, Model, Processor, Task

T = TypeVar("T")
# How many random directions, and what an interval of their mean covers.
DIRECTIONS, LEVEL = 10, 0.95
# Of the top eigenvalue: the error that is good enough, as a share of it, and how often it is tried to get there.
TOLERANCE, PRODUCTS = 0.01, 30


@dataclass(frozen=True)
class Band:
    """A mean over random directions, by radius, and the ends of its 95 % interval."""

    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Flatness:
    """What is measured in one space, by radius. All rises are in the unit of the loss.

    Attributes:
        adversarial: L(W + a g / ||g||) - L(W), of all rows together.
        m_sharpness: the mean of the same of each batch by itself, by its rows.
        random: along random directions normalised by filter, of which a radius is a share of the weights.
        top_eigenvalue: of the Hessian.
    """

    adversarial: list[float]
    m_sharpness: list[float]
    random: Band
    top_eigenvalue: Eigenvalue


class Rows:
    """Rows whose loss is looked at, in passes that have room for a gradient.

    Args:
        model: with the primary adapter, on its device.
        examples: the rows.
        config: the task, and how many rows a pass has.
        processor: makes batches.
        task: whose loss is looked at; None: that of `config`, not weighted.
    """

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        config: TrialConfig,
        processor: Processor,
        task: Task | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.processor = processor
        self.task = task or TASKS[config.task]
        # Of what holds nothing to predict there is no mean loss.
        self.examples = [example for example in examples if self.task.target_count([example])]
        self.padded = not is_flat(self.task, model)
        self.proven = current_room(config, ALONE).proven.training

    def measured(self, measure: Callable[[Sequence[Sequence[Pass]]], T], batch: int | None = None) -> T:
        """What `measure` says of the passes of each batch of so many rows; None: all rows are one batch.

        Where a pass has no room all is measured anew in smaller ones: how rows are cut decides roundings only.

        Raises:
            OutOfMemory: there is no room for one row.
        """
        size = batch or len(self.examples)
        batches = [self.examples[start : start + size] for start in range(0, len(self.examples), size)]
        return self.measured_of(batches, measure)

    def measured_of(self, batches: Sequence[Sequence[Example]], measure: Callable[[Sequence[Sequence[Pass]]], T]) -> T:
        """As `measured`, of `batches` that are given."""
        while True:
            cuts = [self._cut(examples) for examples in batches]
            try:
                return measure([[self._pass(part) for part in parts] for parts in cuts])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                shortage = Shortage.of(error)
            release()
            parts = [part for parts in cuts for part in parts]
            if max(map(len, parts)) == 1:
                raise failure(ONE_ROW["training"], shortage, self.config)
            self.proven = max(1, max(positions(self._sides(part), self.padded) for part in parts if len(part) > 1) // 2)

    def loss(self) -> float:
        """Their mean loss at W."""
        return self.measured(lambda batches: FullSpace(self.model).loss(batches[0]))

    def gradient(self) -> list[Tensor]:
        """dL/dW of their mean loss, of each adapted layer in order: m x n, in host memory."""
        return self.measured(lambda batches: FullSpace(self.model).gradient(batches[0]))

    def _cut(self, examples: Sequence[Example]) -> list[list[Example]]:
        sides, config = self._sides(examples), self.config
        budget = Budget(config.per_device_train_batch_size, config.tokens_per_pass, self.proven, self.padded)
        return [[examples[row] for row in part] for part in cut(sides, budget, self.model.device.type)]

    def _sides(self, examples: Sequence[Example]) -> list[Any]:
        return [self.task.sides(example) for example in examples]

    def _pass(self, part: Sequence[Example]) -> Pass:
        batch = batch_of(self.task, self.model, part, self.processor)

        def loss() -> Tensor:
            return self.task.loss(self.model, placed(batch, self.model.device))

        return Pass(loss, float(self.task.target_count(part)), len(part))


def sharpness(model: Model, examples: Sequence[Example], config: TrialConfig, processor: Processor) -> dict[str, float]:
    """The metric of an evaluation: the adversarial rise at `sharpness_radius`, in the full space.

    Nothing of a model without an adapter. Of several workers each measures all rows.

    Args:
        model: on its device.
        examples: validation rows.
        config: the settings.
        processor: makes batches.
    """
    if config.sharpness_radius is None or not any(isinstance(module, LoraLayer) for module in model.modules()):
        return {}
    space, radii = FullSpace(model), [config.sharpness_radius]
    (rise,) = Rows(model, examples, config, processor).measured(lambda all_: adversarial_rises(space, all_[0], radii))
    return {"sharpness": rise}


def survey(rows: Rows, radii: Sequence[float], kind: type[Space], m: int, telling: Callable[[str], None]) -> Flatness:
    """All that there is to measure in a space.

    Args:
        rows: to measure on.
        radii: of the rises.
        kind: the space.
        m: rows of each batch of m-sharpness; the last may have fewer.
        telling: is told what is measured next.

    Raises:
        UserError: the adapter has no such space.
    """
    try:
        space = kind(rows.model)
        telling("rise along the gradient")
        adversarial = rows.measured(lambda batches: adversarial_rises(space, batches[0], radii))
        telling(f"the same of each {m} rows")
        of_batches = rows.measured(lambda batches: m_sharpness(space, batches, radii), m)
        telling(f"mean rise along {DIRECTIONS} random directions")
        drawn = rows.measured(lambda batches: random_rises(space, batches[0], radii, DIRECTIONS))
    except ValueError as error:
        raise UserError(f"sharpness: {error}") from None
    telling("top eigenvalue of the Hessian")
    top = rows.measured(lambda batches: top_eigenvalue(space, batches[0], PRODUCTS, TOLERANCE))
    return Flatness(adversarial, of_batches, band(drawn), top)


def band(drawn: Sequence[Sequence[float]]) -> Band:
    """The mean of what was found along each direction, by radius, with Student's interval.

    Args:
        drawn: for each of two or more directions its rises.
    """
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(drawn) - 1, (1 + LEVEL) / 2))
    means, widths = [], []
    for rises in zip(*drawn, strict=True):
        means.append(fmean(rises))
        widths.append(quantile * stdev(rises) / math.sqrt(len(rises)))
    ends = list(zip(means, widths, strict=True))
    return Band(means, [mean - width for mean, width in ends], [mean + width for mean, width in ends])


SPACES: dict[str, type[Space]] = {"full_space": FullSpace, "lora_space": LoraSpace}
