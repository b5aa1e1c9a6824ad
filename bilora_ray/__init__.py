"""bilora-ray: fine-tuning of LLMs with sharpness-aware LoRA adapters, and the search for their settings.

Bi-LoRA (arXiv 2508.19564) is sharpness-aware minimization (SAM) for LoRA: it looks for flat minima by an adversarial
weight perturbation that is a second low-rank adapter. Adapters are PEFT's, the hyperparameter search is Ray Tune's and
Optuna's, on a laptop or a cluster, and every run is in MLflow. `bilora_ray.method` is the method alone, for any loop.

    import bilora_ray

    study = bilora_ray.tune("my_space.yaml")
    study.best.sampled                     # the settings that were found
    study.trials()                         # a pandas DataFrame: a row a trial
    study.export("my-adapter")             # an ordinary PEFT adapter

Nothing heavy is imported before one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bilora_ray.errors import MachineError, UserError
    from bilora_ray.library.study import Study
    from bilora_ray.library.verbs import compare, load_study, train, tune
    from bilora_ray.records import Status, TrialRecord

__all__ = [
    "MachineError",
    "Status",
    "Study",
    "TrialRecord",
    "UserError",
    "__version__",
    "compare",
    "load_study",
    "train",
    "tune",
]
# Name -> the module that has it.
PLACES = {
    "MachineError": "errors",
    "Status": "records",
    "Study": "library.study",
    "TrialRecord": "records",
    "UserError": "errors",
    "compare": "library.verbs",
    "load_study": "library.verbs",
    "train": "library.verbs",
    "tune": "library.verbs",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'bilora_ray' has no attribute '{name}'")
    return getattr(importlib.import_module(f"bilora_ray.{PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
