"""What is learned: a file a task, and here a line a task. `base` says what a task is."""

from __future__ import annotations

from bilora_ray import measures
from bilora_ray.training.tasks import (
    causal_lm,
    image_classification,
    multi_label_classification,
    regression,
    seq2seq_lm,
    sequence_classification,
    token_classification,
)
from bilora_ray.training.tasks.base import Task

TASKS: dict[measures.Task, Task] = {
    "causal-lm": causal_lm.TASK,
    "seq2seq-lm": seq2seq_lm.TASK,
    "sequence-classification": sequence_classification.TASK,
    "multi-label-classification": multi_label_classification.TASK,
    "regression": regression.TASK,
    "token-classification": token_classification.TASK,
    "image-classification": image_classification.TASK,
}
