"""Make the fixture of a version: a small study, a checkpoint and an adapter, as the code of that version writes them.

    python tests/versions/make.py tests/versions/0.1.0

Run it with the code of that version, once, and commit the folder: later versions must open it. It holds

space.yaml    of the study, which `tune --resume` needs
runs/         a storage path with the study: a trial that is complete, one that was stopped early, one that failed, and
              one that SIGKILL interrupted, with its checkpoint
adapter/      the best trial's, exported
checkpoint/   the folder of a trial that `fit` began and did not end
facts.json    what that version said of all this

Sources are `builtin:` names, and the place of the package, which PEFT notes, is masked: no path of a machine is in it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bilora_ray
from bilora_ray import builtin
from bilora_ray.config import TrialConfig
from bilora_ray.training.folder import TENSORS, TrialFolder

COMMAND = Path(sys.executable).with_name("bilora-ray")
STUDY = "small"
# Each of the points ends in another way; the last one, which is killed, is better than the first at the first rung.
SPACE = """\
study:
  name: small
  num_trials: 4
  max_concurrent: 1
  grace_period: 30
  points_to_evaluate:
    - {learning_rate: 1.0e-3, rho: 0.05}
    - {learning_rate: 1.0e-9, rho: 0.05}
    - {learning_rate: 1.0e+30, rho: 0.05}
    - {learning_rate: 1.0e-2, rho: 0.05}

trial:
  model_name_or_path: builtin:quickstart/model
  task: causal-lm
  train_data: builtin:quickstart/train.jsonl
  validation_data: builtin:quickstart/validation.jsonl
  max_length: 96
  max_eval_samples: 20
  method: bilora
  rank: 1
  auxiliary_rank: 1
  target_modules: .*3.self_attn.q_proj
  learning_rate: {choice: [1.0e-9, 1.0e-3, 1.0e-2, 1.0e+30]}
  rho: {low: 0.01, high: 0.2, log: true}
  max_grad_norm: null
  per_device_train_batch_size: 4
  max_steps: 90
  eval_steps: 30
"""
KILLED, KILL_TIMEOUT_S = 3, 300
SETTINGS: dict[str, Any] = {
    "model_name_or_path": "builtin:quickstart/model",
    "task": "causal-lm",
    "train_data": "builtin:quickstart/train.jsonl",
    "max_length": 96,
    "rank": 1,
    "auxiliary_rank": 2,
    "lora_dropout": 0.1,
    "target_modules": ".*[23].self_attn.q_proj",
    "max_eval_samples": 20,
    "max_steps": 9,
    "eval_steps": 3,
}
QUESTION = "Question: 3 longboats bear 5 kegs apiece. How stood the count?\nAnswer:"


def run(*arguments: str | Path) -> str:
    """What `bilora-ray` prints."""
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trials(storage_path: Path) -> list[dict[str, Any]]:
    """What `show` says of each trial, but for where its adapter is."""
    shown = json.loads(run("show", STUDY, "--json", f"--storage-path={storage_path}"))
    return [{key: value for key, value in trial.items() if key != "adapter"} for trial in shown["trials"]]


def trial_folder(storage_path: Path, number: int) -> TrialFolder:
    """The folder of a trial of the study."""
    return TrialFolder(storage_path / "studies" / STUDY / "trials" / f"{number:04d}")


def logits(adapter: Path) -> list[float]:
    """Some of what the adapted model makes of a question, by PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = builtin.path("quickstart/model")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), str(adapter)).eval()
    with torch.no_grad():
        found = model(**AutoTokenizer.from_pretrained(path)(QUESTION, return_tensors="pt")).logits
    return found[0, -1, :8].tolist()


def fit(settings: dict[str, Any], folder: Path, evaluations: int | None = None) -> list[dict[str, float]]:
    """The first `evaluations`, or all, of a run that begins or goes on in `folder`."""
    from bilora_ray.training.loop import fit

    reports: list[dict[str, float]] = []

    def report(metrics: dict[str, float]) -> None:
        reports.append(metrics)
        if len(reports) == evaluations:
            raise KeyboardInterrupt

    try:
        fit(TrialConfig(**settings), TrialFolder(folder), report)
    except KeyboardInterrupt:
        return reports
    return reports


def make(output: Path) -> None:
    """Fill the new folder `output`."""
    output.mkdir()
    space, storage_path, adapter = (output / name for name in ("space.yaml", "runs", "adapter"))
    space.write_text(SPACE)
    _begin_and_kill(space, storage_path)
    run("export", STUDY, f"--output={adapter}", f"--storage-path={storage_path}")
    fit(SETTINGS, output / "checkpoint", 1)
    with TemporaryDirectory() as folder:
        evaluations = fit(SETTINGS, Path(folder))
    facts = {
        "version": bilora_ray.__version__,
        "trials": trials(storage_path),
        "best": json.loads(run("show", STUDY, "--json", f"--storage-path={storage_path}"))["best"]["number"],
        "adapter": {"evaluate": json.loads(run("evaluate", adapter, "--json")), "logits": logits(adapter)},
        "checkpoint": {"settings": SETTINGS, "evaluations": evaluations},
    }
    assert [t["status"] for t in facts["trials"]] == ["complete", "pruned", "failed", "interrupted"], facts["trials"]
    (output / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    _make_small(storage_path)
    _mask(output)


def _begin_and_kill(space: Path, storage_path: Path) -> None:
    """Run the search until its last trial has a checkpoint."""
    import psutil

    search = subprocess.Popen([COMMAND, "tune", f"--space={space}", f"--storage-path={storage_path}"])
    folder, deadline = trial_folder(storage_path, KILLED), time.monotonic() + KILL_TIMEOUT_S
    while not folder.state():
        assert search.poll() is None, "the search has ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # The trial's process first: it would write another checkpoint.
    for process in [*reversed(psutil.Process(search.pid).children(recursive=True)), psutil.Process(search.pid)]:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    search.wait()
    latest = folder.latest()
    assert latest is not None
    assert (latest / TENSORS).exists(), "the trial has ended"


def _make_small(storage_path: Path) -> None:
    """Remove what a resume makes anew, and room that nothing is in."""
    for path in (*storage_path.glob("mlflow*"), *storage_path.rglob("scratch")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with sqlite3.connect(storage_path / "studies.db") as database:
        database.execute("VACUUM")


def _mask(output: Path) -> None:
    """Name the place of the package as it is on no machine."""
    place = str(Path(bilora_ray.__file__).resolve().parents[1])
    for path in output.rglob("*"):
        if path.suffix in {".json", ".md"}:
            path.write_text(path.read_text().replace(place, "/site-packages"))
        for secret in (place, str(output.resolve()), str(Path.home())):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), f"{path} holds {secret}"


if __name__ == "__main__":
    make(Path(sys.argv[1]))
