"""The function that Ray Tune runs for a trial: `fit` in the Tune process, reporting to Tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune
from safetensors import SafetensorError

from bilora_ray.config import TrialConfig
from bilora_ray.errors import TrialFailure, UserError, first_line
from bilora_ray.training.folder import ORPHAN_WAIT_S, TrialFolder

# The key of a report: an evaluation's metrics; or why this trial cannot go on; or what is wrong with its settings or
# data; or what is wrong with the machine, so that the trial may go on another time.
EVALUATION, FAILURE, BAD_INPUT, BROKEN = "evaluation", "failure", "bad_input", "broken"


def run_trial(task: dict[str, Any]) -> None:
    """Train one trial, going on from its checkpoint if there is one.

    Args:
        task: `settings` (those of a TrialConfig) and `folder` (the trial's, an absolute path).
    """
    from bilora_ray.training.loop import fit
    from bilora_ray.training.quiet import quiet

    quiet()
    folder = TrialFolder(Path(task["folder"]))
    try:
        with folder.lock(ORPHAN_WAIT_S):
            fit(TrialConfig(**task["settings"]), folder, lambda metrics: tune.report({EVALUATION: metrics}))
    except TrialFailure as error:
        tune.report({FAILURE: str(error)})
    except UserError as error:
        tune.report({BAD_INPUT: str(error)})
    except (OSError, SafetensorError) as error:
        tune.report({BROKEN: f"{type(error).__name__}: {first_line(error)}"})
