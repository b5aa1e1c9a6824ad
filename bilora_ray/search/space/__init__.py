"""What a space file says, checked: one file is one study.

    study:      how to search                      (StudyConfig)
    trial:      settings of every trial; any of them may be a distribution
    resources:  what one trial gets                (ResourceConfig)

A distribution is `{choice: [a, b]}` or `{low: x, high: y}` with `log: true` or `step: s` if wanted, and with
`prior: {mean: m, sigma: 2x}` if something is known of it beforehand. A number may be derived, as `2 * rank`. With
`when: {method: bilora}` a setting has its distribution, or its `{value: v}`, where that is so, and its default
elsewhere; a list of such gives it one in each case. Nothing here imports torch, Ray or Optuna, so that a space file is
checked in a moment. `space_file` reads one.
"""

from bilora_ray.search.space.parts import (
    Choice,
    Distribution,
    Given,
    Part,
    Prior,
    Range,
    Value,
    When,
    is_expression,
    named,
    setting_of,
)
from bilora_ray.search.space.space import Space
from bilora_ray.search.space.study import (
    BUDGETS,
    FINALISTS_OF,
    LIMITED,
    PARTED,
    READ_BY,
    RUNS_OF,
    SEEDS,
    STUDY_NAME,
    ObjectiveConfig,
    ResourceConfig,
    StudyConfig,
)

__all__ = [
    "BUDGETS",
    "FINALISTS_OF",
    "LIMITED",
    "PARTED",
    "READ_BY",
    "RUNS_OF",
    "SEEDS",
    "STUDY_NAME",
    "Choice",
    "Distribution",
    "Given",
    "ObjectiveConfig",
    "Part",
    "Prior",
    "Range",
    "ResourceConfig",
    "Space",
    "StudyConfig",
    "Value",
    "When",
    "is_expression",
    "named",
    "setting_of",
]
