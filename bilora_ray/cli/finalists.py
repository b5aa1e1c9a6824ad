"""What fresh seeds said of the best trials of a search, on the terminal and in JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from bilora_ray.cli.tables import TrialTable
from bilora_ray.records import Status, TrialRecord
from bilora_ray.words import in_short, interval

if TYPE_CHECKING:
    from bilora_ray.search.study.control.finalists import Finals
    from bilora_ray.search.study.view import StudyView


def print_finalists(console: Console, study: StudyView, finals: Finals) -> TrialRecord | None:
    """Print the finalists of `study` beside their single runs, and the winner; return the run that is taken of it."""
    from bilora_ray.search.study.control.verdict import METHOD

    verdict, name = finals.verdict, finals.study.space.study.name
    if verdict is None or finals.winner is None:
        console.print(f"Finalists: {_so_far(finals)}", style="bold", markup=False, soft_wrap=True)
        return None
    console.print(f"Finalists, each on {verdict.seeds} fresh seeds (study '{name}'):", style="bold", markup=False)
    metric = study.objective.metric
    table = TrialTable("trial", "single_run", f"mean_{metric}", "interval", "worse_by")
    for finalist in verdict.finalists:
        cells = (in_short(finalist.single), in_short(finalist.mean), interval(finalist.low, finalist.high))
        sampled = study.record(finalist.trial).sampled
        table.add(str(finalist.trial), *cells, in_short(finalist.fell), sampled=sampled)
    console.print(table)
    console.print(verdict.in_words(metric), style="bold green", markup=False, soft_wrap=True)
    if finals.test:
        found = ", ".join(f"{key.removeprefix('eval_')} {value:.6g}" for key, value in finals.test.items())
        console.print(f"On the test rows, measured once: {found}", style="bold", markup=False, soft_wrap=True)
    taken = f"its run with the middle score is taken: trial {finals.winner.number} of '{name}'"
    console.print(f"{METHOD[0].upper()}{METHOD[1:]}; {taken}.", style="dim", markup=False, soft_wrap=True)
    return finals.winner


def finals_as_json(finals: Finals) -> dict[str, Any]:
    """The finalists of a study as JSON; what is not known before all of their runs have ended is null."""
    from bilora_ray.search.study.control.verdict import METHOD

    verdict, winner = finals.verdict, finals.winner
    found: dict[str, Any] = {"study": finals.study.space.study.name, "method": METHOD}
    known = ("score", "low", "high", "fell", "seeds")
    found |= {key: None if verdict is None else getattr(verdict, key) for key in known}
    found["test"] = dict(finals.test) or None
    found["winner"] = None if verdict is None else verdict.winner.trial
    found["run"] = None if winner is None else winner.number
    found["adapter"] = None if winner is None or winner.adapter is None else str(winner.adapter)
    keys = ("trial", "single", "mean", "low", "high", "fell", "scores")
    of = () if verdict is None else verdict.finalists
    found["finalists"] = [{key: getattr(finalist, key) for key in keys} for finalist in of]
    return found


def _so_far(finals: Finals) -> str:
    study = finals.study.space.study
    if finals.study.finished():
        return f"no training of theirs is complete; `bilora-ray show {study.name}` says how each ended"
    ended = sum(trial.state.is_finished() for trial in finals.study.study.get_trials(deepcopy=False))
    line = f"{ended} of {study.num_trials} trainings have ended"
    running = any(record.status is Status.RUNNING for record in finals.study.records_now())
    return line if running else f"{line}; `bilora-ray tune`, as it was begun, and --resume go on"
