"""What a first search of each task begins with: FIRSTS, a line a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bilora_ray.measures import Task

# Of the values of a column: a text that differs from row to row, a label that comes again, a number, a list, an image,
# or what no model reads: identifiers, dates, nothing.
Kind = Literal["text", "label", "number", "list", "image", "other"]
BUILT_IN = "builtin:quickstart/model"
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class First:
    """What a first search of a task begins with.

    Attributes:
        on_gpu: the base model where there is a GPU.
        on_cpu: the one where there is none.
        without_hub: the one where the Hub does not answer; None: it must be named.
        reads: the setting that names the column of what is read; a template where texts are written.
        inputs: what that column may hold.
        labels: what is learned, likewise, the likeliest first.
        learns: that, in words.
        metric: what it is judged by; None: rows tell.
        why: that metric, in words.
    """

    on_gpu: str
    on_cpu: str
    without_hub: str | None
    reads: str
    inputs: tuple[Kind, ...]
    labels: tuple[Kind, ...]
    learns: str = "the label"
    metric: str | None = None
    why: str = ""


FIRSTS: dict[Task, First] = {
    "causal-lm": First(
        "Qwen/Qwen2.5-0.5B", BUILT_IN, BUILT_IN, "prompt_template", ("text",), ("text", "label", "number")
    ),
    "seq2seq-lm": First(
        "google-t5/t5-base", "google-t5/t5-small", None, "prompt_template", ("text",), ("text", "label", "number")
    ),
    "sequence-classification": First(ENCODER, ENCODER, BUILT_IN, "text_column", ("text",), ("label",)),
    "multi-label-classification": First(
        *(ENCODER, ENCODER, BUILT_IN, "text_column", ("text",), ("list", "label", "text")),
        learns="any number of labels",
        metric="eval_f1",
        why="labels are found, and no others",
    ),
    "regression": First(
        *(ENCODER, ENCODER, BUILT_IN, "text_column", ("text",), ("number", "label")),
        learns="the number",
        metric="eval_spearman",
        why="whether the numbers come into the right order",
    ),
    "token-classification": First(
        *("google-bert/bert-base-cased", "distilbert/distilbert-base-cased", BUILT_IN),
        *("text_column", ("list",), ("list",)),
        learns="a tag for each word",
        metric="eval_f1",
        why="tags are found, and no others",
    ),
    "image-classification": First(
        *("google/vit-base-patch16-224-in21k", "google/vit-base-patch16-224-in21k", None),
        *("image_column", ("image",), ("label",)),
    ),
}
