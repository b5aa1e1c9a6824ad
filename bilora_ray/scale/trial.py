"""The function that Ray Tune runs for a trial: `fit` in the Tune process, reporting to Tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune

from bilora_ray.config import TrialConfig
from bilora_ray.errors import TrialFailure, UserError
from bilora_ray.training.folder import TrialFolder

# The key of a report: an evaluation's metrics, or why the trial, or the whole search, cannot go on.
EVALUATION, FAILURE, BAD_INPUT = "evaluation", "failure", "bad_input"
# A killed search's worker may write for some seconds more; its successor waits for that.
ORPHAN_WAIT_S = 60.0


def run_trial(task: dict[str, Any]) -> None:
    """Train one trial, going on from its checkpoint if there is one.

    Args:
        task: `settings` (those of a TrialConfig) and `folder` (the trial's, an absolute path).
    """
    from bilora_ray.training.loop import fit
    from bilora_ray.training.quiet import quiet

    quiet()
    folder = TrialFolder(Path(task["folder"]))
    with folder.lock(ORPHAN_WAIT_S):
        try:
            fit(TrialConfig(**task["settings"]), folder, lambda metrics: tune.report({EVALUATION: metrics}))
        except TrialFailure as error:
            tune.report({FAILURE: str(error)})
        except UserError as error:
            tune.report({BAD_INPUT: str(error)})
