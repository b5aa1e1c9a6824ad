"""The tables of docs/space-file.md and docs/metrics.md: every key of a space file, and every metric.

python tests/reference_tables.py    writes them anew, between the comments that begin and end each
"""

from __future__ import annotations

import math
from pathlib import Path

from data_table import page_with

from bilora_ray.cli.settings import SECTIONS
from bilora_ray.cli.settings import rows as settings
from bilora_ray.facts import methods_in_words
from bilora_ray.measures import ADVERSITY, COSTS, EXACT_MATCH, SHARPNESS, TASK_FACTS, objective, range_of
from bilora_ray.settings import FACTS

DOCS = Path(__file__).resolve().parents[1] / "docs"
# What each metric is, in a word more than its name. `labels` of a causal-lm are those of `label_names`.
MEANINGS = {
    "eval_loss": "mean loss of a prediction, in nats; of regression the squared error",
    "eval_perplexity": "e to the power of `eval_loss`",
    "eval_token_accuracy": "share of an answer's tokens that are the likeliest after the right ones before them",
    EXACT_MATCH: "share of the texts that the model writes whose answer, as `answer_pattern` finds it, is "
    "right; needs `predict_with_generate: true`",
    "eval_accuracy": "share of right labels; where a text has several, of texts with just the right ones; of tags, of "
    "words",
    "eval_f1": "F1 as `f1_average` has it: of two labels that of `positive_label`, of more the mean over labels; where "
    "a text has several, over all of them; of tags, of whole entities",
    "eval_matthews_correlation": "of predicted and right labels; 0 where one of them never changes",
    "eval_mse": "mean squared error",
    "eval_pearson": "linear correlation of predictions and numbers",
    "eval_spearman": "correlation of their ranks",
    SHARPNESS: "rise of `eval_loss` when the adapted weights move along its gradient by "
    "`sharpness_radius`, which it needs",
}


def pages() -> dict[Path, dict[str, str]]:
    """The tables of each page, by name."""
    return {
        DOCS / "space-file.md": {section: _keys(section) for section in SECTIONS},
        DOCS / "metrics.md": {"metrics": _metrics(), "tasks": _tasks(), "costs": _costs(), "adversity": _adversity()},
    }


def _keys(section: str) -> str:
    rows = []
    for row in settings():
        if row["section"] != section:
            continue
        allowed = f" ({', '.join(f'`{word}`' for word in row['allowed'].split(', '))})" if row["allowed"] else ""
        default = f"`{row['default']}`" if row["default"] not in ("required", "-") else row["default"]
        rows.append((f"`{row['key']}`", default, f"{row['description']}{allowed}{_of(section, row['key'])}"))
    return _table(("key", "default", "what it says"), rows)


def _of(section: str, key: str) -> str:
    """The methods that read a setting, if not all do."""
    of = methods_in_words(FACTS[key].of, "`") if section == "trial" else ""
    return of and f"; of {of}"


def _metrics() -> str:
    return _table(
        ("metric", "better", "from", "to", "what it is"),
        [(f"`{name}`", _better(name), *map(_end, range_of(name)), meaning) for name, meaning in MEANINGS.items()],
    )


def _tasks() -> str:
    rows = []
    for task, facts in TASK_FACTS.items():
        names = (*facts.metrics, *([EXACT_MATCH] if facts.generates else []), SHARPNESS)
        rows.append((f"`{task}`", ", ".join(f"`{name}`" for name in names)))
    return _table(("task", "metrics"), rows)


def _costs() -> str:
    return _table(("metric", "what it is"), [(f"`{name}`", meaning) for name, meaning in COSTS.items()])


def _adversity() -> str:
    return _table(("metric", "what it is"), [(f"`{name}`", meaning) for name, meaning in ADVERSITY.items()])


def _better(metric: str) -> str:
    return "more" if objective(metric).greater_is_better else "less"


def _end(value: float) -> str:
    return "" if math.isinf(value) else f"{value:g}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    for page, tables in pages().items():
        page.write_text(page_with(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
