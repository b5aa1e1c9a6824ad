"""Studies to make pages of: real ones in all but their trials, whose curves are made up.

python tests/report/studies.py 1000 runs      then: bilora-ray report simulated --storage-path runs
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from bilora_ray.config import TrialConfig
from bilora_ray.search.simulated import Metrics, simulate
from bilora_ray.search.space_file import load_space
from bilora_ray.search.study.layout import Layout
from bilora_ray.search.study.studies import load_study, open_study
from bilora_ray.search.study.study import SearchStudy
from bilora_ray.search.study.view import StudyView
from bilora_ray.training.folder import STATE

SPACE = (
    "trial.model_name_or_path=org/model",
    "trial.task=causal-lm",
    "trial.train_data=org/data",
    "trial.rank={choice: [4, 8, 16]}",
    "trial.auxiliary_rank={choice: [2, 4, 8]}",
    "trial.rho={low: 0.005, high: 1.0, log: true}",
    "trial.learning_rate={low: 3e-4, high: 3e-2, log: true}",
    "study.grace_period=1",
    "study.rung_unit=epochs",
    "study.sampler=random",
)
EPOCHS = 9


def curve(config: TrialConfig) -> list[Metrics]:
    """Nine epochs: a learning rate and a radius are the best, ranks hardly matter, and there is noise."""
    noise = Random(f"{config.learning_rate} {config.rho} {config.seed}")
    off = 0.5 * math.log10(config.learning_rate / 4e-3) ** 2 + 0.15 * math.log10(config.rho / 0.05) ** 2
    diverges = config.learning_rate > 2e-2 and noise.random() < 0.5
    told: list[Metrics] = []
    for step in range(1, EPOCHS + 1):
        loss = 0.6 + off + 0.9 / step + 0.02 * noise.gauss(0, 1) - 0.01 * config.rank / 16
        loss = loss * 20.0**step if diverges else loss
        seconds = step * (3.0 + config.rank / 8 + noise.random())
        told.append(
            {
                "step": 10.0 * step,
                "max_steps": 10.0 * EPOCHS,
                "epoch": float(step),
                "eval_loss": loss,
                "eval_accuracy": max(0.0, min(1.0, 1.2 - loss / 1.5)),
                "auxiliary_norm": float(config.rho) * (1 - 0.3**step),
                **(adversity(step, noise) if step % 3 == 0 else {}),
                "train_runtime": seconds,
                "tokens_per_second": 9000.0 - 100 * config.rank,
                "gpu_memory_gib": 4.0 + config.rank / 10,
                "adapter_mb": config.rank / 4,
            }
        )
    return told


def adversity(step: int, noise: Random) -> Metrics:
    """What every third evaluation tells."""
    captured, stale = 0.2 / step + 0.02 * noise.gauss(0, 1), 0.1 + 0.02 * noise.gauss(0, 1)
    return {"captured_sharpness": captured, "stale_captured_sharpness": stale, "auxiliary_cosine": 0.8 * captured}


def simulated(storage_path: Path, *settings: str, name: str = "simulated", trials: int = 12) -> StudyView:
    """A study whose trials have had their curves; their folders hold what a reader looks for."""
    given = [*SPACE, f"study.name={name}", f"study.num_trials={trials}", *settings]
    layout = Layout(storage_path)
    study = open_study(load_space(None, given), layout, {})
    try:
        moments = simulate(study, curve)
        histories: dict[int, list[Metrics]] = {}
        for moment in moments:
            histories.setdefault(moment.number, []).append(moment.metrics)
        for number, history in histories.items():
            keep(study, number, history)
    finally:
        study.release()
    return load_study(layout, name)


def keep(study: SearchStudy, number: int, history: Sequence[Metrics]) -> None:
    """What a trial's folder tells of its evaluations, at the last of them."""
    folder, best = study.folder(number), None
    for metrics in history:
        best = metrics if study.objective.improves(metrics, best) else best
    assert best is not None
    checkpoint = folder.checkpoint_at(int(history[-1]["step"]))
    checkpoint.mkdir(parents=True)
    state: dict[str, Any] = {"step": int(history[-1]["step"]), "history": [dict(one) for one in history]}
    (checkpoint / STATE).write_text(json.dumps({**state, "best_step": int(best["step"])}), encoding="utf-8")


if __name__ == "__main__":
    simulated(Path(sys.argv[2]).resolve(), trials=int(sys.argv[1]))
