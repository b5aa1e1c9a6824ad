"""What trials are judged by: the tasks with what each measures, and the metrics with which way is better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bilora_ray.records import Objective

Task = Literal[
    "causal-lm",
    "seq2seq-lm",
    "sequence-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
    "image-classification",
]

LOSS_METRICS = ("eval_loss",)
LM_METRICS = ("eval_loss", "eval_perplexity", "eval_token_accuracy")
EXACT_MATCH = "eval_exact_match"
LABEL_METRICS = ("eval_accuracy", "eval_f1", "eval_matthews_correlation")
SET_METRICS = ("eval_accuracy", "eval_f1")
NUMBER_METRICS = ("eval_mse", "eval_pearson", "eval_spearman")
SHARES = frozenset({"eval_accuracy", "eval_f1", "eval_token_accuracy", EXACT_MATCH})
CORRELATIONS = frozenset({"eval_matthews_correlation", "eval_pearson", "eval_spearman"})
SHARPNESS = "sharpness"
MINIMIZED = frozenset({"eval_loss", "eval_mse", "eval_perplexity", SHARPNESS})
# What every evaluation tells of the cost of an adapter, and what it is; the last is known on GPUs only.
COSTS = {
    "train_runtime": "seconds of training until the adapter",
    "adapter_mb": "MB of the exported adapter's weights",
    "gpu_memory_gib": "GiB of GPU memory that a worker's torch took",
}

# What is told now and then of a method's perturbation -> what it is. `adversary_steps` says how often.
ADVERSITY = {
    "auxiliary_norm": "norm of the perturbation: of s2 B2 A2 over all layers, which every evaluation of Bi-LoRA tells; "
    "of LoRA-SAM, of what its moves of A1 and B1 change of the weights",
    "auxiliary_cosine": "cosine of the perturbation and the gradient of the next batch at W, over all layers",
    "captured_sharpness": "how much the perturbation raises the loss of the next batch, as a share of what a move by "
    "that batch's whole gradient does, of norm `rho`; of `auxiliary_norm` where `rho` is of something else",
    "captured_sharpness_held_out": "the same on a batch of validation rows, the same ones each time",
    "stale_cosine": "cosine of the gradients of the last batch and the next one at W",
    "stale_captured_sharpness": "what such a move along the last batch's whole gradient captures of the next batch's "
    "sharpness: what the last batch alone tells, of any rank",
    "stale_captured_sharpness_held_out": "the same on the batch of validation rows",
    "subspace_overlap": "mean squared cosine of the principal angles between the rows of A1 and A2, and the columns of "
    "B1 and B2, over all layers: 1 where they span the same; of LoRA-SAM, between A1 and B1 and their moves",
}

# About what CUDA takes of a GPU for each process, beside what torch allocates: an estimate, not measured here.
CUDA_GIB = 0.5


@dataclass(frozen=True)
class TaskFacts:
    """What the settings of a task are checked by. All else of it is in its file in `training/tasks`.

    Attributes:
        model_class: what transformers calls its models.
        metrics: what every evaluation measures.
        generates: whether its models write text, which `predict_with_generate` judges.
        has_classes: whether each prediction is of one class, which `class_weights` weighs.
        reads_images: whether its rows are images, so that there is an image processor instead of a tokenizer.
    """

    model_class: str
    metrics: tuple[str, ...]
    generates: bool = False
    has_classes: bool = False
    reads_images: bool = False


TASK_FACTS: dict[Task, TaskFacts] = {
    "causal-lm": TaskFacts("AutoModelForCausalLM", LM_METRICS, generates=True),
    "seq2seq-lm": TaskFacts("AutoModelForSeq2SeqLM", LM_METRICS, generates=True),
    "sequence-classification": TaskFacts(
        "AutoModelForSequenceClassification", LOSS_METRICS + LABEL_METRICS, has_classes=True
    ),
    "multi-label-classification": TaskFacts("AutoModelForSequenceClassification", LOSS_METRICS + SET_METRICS),
    "regression": TaskFacts("AutoModelForSequenceClassification", LOSS_METRICS + NUMBER_METRICS),
    "token-classification": TaskFacts(
        "AutoModelForTokenClassification", (*LOSS_METRICS, "eval_accuracy", "eval_f1"), has_classes=True
    ),
    "image-classification": TaskFacts(
        "AutoModelForImageClassification", LOSS_METRICS + LABEL_METRICS, has_classes=True, reads_images=True
    ),
}


def range_of(metric: str) -> tuple[float, float]:
    """The least and the greatest value that a `metric` can have, of one that has both; else infinities."""
    if metric in SHARES:
        return 0.0, 1.0
    return (-1.0, 1.0) if metric in CORRELATIONS else (-math.inf, math.inf)


def objective(metric: str) -> Objective:
    """How `metric`, one that an evaluation reports, is judged."""
    return Objective(metric, metric not in MINIMIZED and metric not in COSTS)
