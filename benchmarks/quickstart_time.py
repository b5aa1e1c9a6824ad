"""How long the quickstart takes, and which share of a trial is evaluation: this code against other.

Each code runs `bilora-ray tune` with the same space file in a new storage path, in turns, the order reversed every
round: the quickstart of this checkout if the other code takes it, else of the other. Told is the wall time of the whole
command. Early stops depend on which trial ends first, so the time a step stands beside it. Then each code trains one
trial of that space to its end, alone on one thread and in turns too: the share of it that is evaluation, and in that
generation, by CPU time.

    python benchmarks/quickstart_time.py --against CHECKOUT [--rounds 2] [--trials 12] [--share-only]

CHECKOUT is of the revision to compare with, with a .venv of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SPACE = Path("search_spaces") / "quickstart.yaml"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MLFLOW_TRACKING_URI": ""}
Measured = dict[str, Any]


def shared_space(codes: dict[str, Path], programs: dict[str, Path]) -> Path:
    """The space file for both codes: that of this one, unless the other refuses it."""
    space = codes["now"] / SPACE
    asked = [str(programs["before"]), "validate", str(space)]
    taken = subprocess.run(asked, check=False, capture_output=True, cwd=codes["before"], env=ENVIRONMENT)
    return codes["before"] / SPACE if taken.returncode else space


def search(code: Path, program: Path, space: Path, trials: int) -> Measured:
    """Seconds of a search, and the optimizer steps of its trials."""
    with tempfile.TemporaryDirectory() as storage:
        place = ["--storage-path", storage]
        command = [str(program), "tune", "--space", str(space), *place, "--num-trials", str(trials)]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=code, env=ENVIRONMENT)
        wall = time.perf_counter() - started
        shown = [str(program), "show", "quickstart", *place, "--json"]
        found = subprocess.run(shown, check=True, capture_output=True, cwd=code, env=ENVIRONMENT)
    records = json.loads(found.stdout)["trials"]
    assert len(records) == trials
    return {"wall": wall, "steps": sum(record["evaluations"][-1]["step"] for record in records)}


def share(code: Path, python: Path, space: Path) -> Measured:
    """Seconds of one trial, and of its parts, in a process of its own."""
    command, quiet = [str(python), str(HERE), "--trial", str(space)], {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, cwd=code, env={**ENVIRONMENT, **quiet})
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


def train(file: Path) -> Measured:
    """CPU seconds of a trial of the first settings that a space begins with, of its evaluations and generations."""
    import yaml

    import bilora_ray
    from bilora_ray.config import TrialConfig
    from bilora_ray.training import loop
    from bilora_ray.training.folder import TrialFolder
    from bilora_ray.training.tasks import TASKS

    assert Path(bilora_ray.__file__).is_relative_to(Path.cwd())  # the code that is asked for
    space = yaml.safe_load(file.read_text(encoding="utf-8"))
    config = TrialConfig(**{**space["trial"], **space["study"]["points_to_evaluate"][0]})
    seconds = Counter[str]()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*given: Any, **named: Any) -> Any:
            started = time.process_time()
            try:
                return function(*given, **named)
            finally:
                seconds[name] += time.process_time() - started

        return inner

    loop.evaluate = timed("evaluation", loop.evaluate)
    task = TASKS[config.task]
    TASKS[config.task] = replace(task, generated=timed("generation", task.generated))
    told: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        timed("trial", loop.fit)(config, TrialFolder(Path(folder)), told.append)
    matches = [metrics["eval_exact_match"] for metrics in told]
    return {**seconds, "losses": [metrics["eval_loss"] for metrics in told], "matches": matches}


def searches(codes: dict[str, Path], programs: dict[str, Path], space: Path, rounds: int, trials: int) -> str:
    """The table of the searches."""
    rows = ["| round | code | wall (s) | steps trained | wall (ms) a step |", "| --- | --- | --- | --- | --- |"]
    ratios: dict[str, list[float]] = {"wall time": [], "wall time a step": []}
    for round_ in range(rounds):
        found = {name: search(codes[name], programs[name], space, trials) for name in _turns(codes, round_)}
        for name, measured in found.items():
            wall, steps = measured["wall"], measured["steps"]
            rows.append(f"| {round_ + 1} | {name} | {wall:.1f} | {steps} | {1000 * wall / steps:.1f} |")
        now, before = found["now"], found["before"]
        ratios["wall time"].append(now["wall"] / before["wall"])
        ratios["wall time a step"].append(ratios["wall time"][-1] * before["steps"] / now["steps"])
    for what, each in ratios.items():
        rows.append(f"\nNow / before, {what}: **{statistics.mean(each):.2f}** ({min(each):.2f} to {max(each):.2f})")
    return "\n".join(rows)


def shares(codes: dict[str, Path], pythons: dict[str, Path], space: Path, rounds: int) -> str:
    """The table of one trial."""
    found: dict[str, list[Measured]] = {name: [] for name in codes}
    for round_ in range(rounds):
        for name in _turns(codes, round_):
            found[name].append(share(codes[name], pythons[name], space))
    rows = ["| code | a trial (CPU s) | evaluation | generation, in that |", "| --- | --- | --- | --- |"]
    for name, trials in found.items():
        whole = statistics.mean(trial["trial"] for trial in trials)
        parts = [
            statistics.mean(trial[part] / trial["trial"] for trial in trials) for part in ("evaluation", "generation")
        ]
        rows.append(f"| {name} | {whole:.2f} | {parts[0]:.1%} | {parts[1]:.1%} |")
    before, now = found["before"][0], found["now"][0]
    same = "the same" if before["matches"] == now["matches"] else f"{before['matches']} before, {now['matches']} now"
    apart = max(abs(a - b) / b for a, b in zip(now["losses"], before["losses"], strict=True))
    return "\n".join([*rows, f"\nExact matches: {same}; evaluation losses at most {apart:.1e} apart"])


def _turns(codes: dict[str, Path], round_: int) -> Sequence[str]:
    return list(codes) if round_ % 2 == 0 else list(reversed(codes))


def main() -> None:
    """Print the tables, or train for the process that does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="checkout of the code to compare with")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--share-only", action="store_true", help="train one trial, and search nothing")
    parser.add_argument("--trial", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trial:
        print(json.dumps(train(arguments.trial)))
        return
    if arguments.against is None:
        parser.error("--against is needed")
    codes = {"before": arguments.against.resolve(), "now": HERE.parents[1]}
    pythons = {"before": codes["before"] / ".venv" / "bin" / "python", "now": Path(sys.executable)}
    programs = {name: python.with_name("bilora-ray") for name, python in pythons.items()}
    space = shared_space(codes, programs)
    print(f"Both search {space.name} of the code {'now' if space.is_relative_to(codes['now']) else 'before'}.\n")
    if not arguments.share_only:
        print(searches(codes, programs, space, arguments.rounds, arguments.trials), flush=True)
        print()
    print(shares(codes, pythons, space, arguments.rounds))


if __name__ == "__main__":
    main()
