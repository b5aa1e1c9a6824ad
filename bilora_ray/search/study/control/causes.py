"""Whether trials fail for one cause: a search that goes on would fail the rest of them too."""

from __future__ import annotations

import re
from datetime import datetime

import optuna
from optuna.trial import FrozenTrial

from bilora_ray.records import Status
from bilora_ray.search.study.view import ENDED, ERROR, status_of

# Of a study, how many of its trials had ended when it was halted last.
HALTED = "halted"
# So many failures in a row, for one cause, halt a search.
IN_A_ROW = 5
# What differs between two lines of one cause: numbers, steps, addresses, ids, and which of NaN and infinity it was.
PARTICULAR = re.compile(r"\b0x[0-9a-f]+\b|\b(?=[a-f]*\d)[0-9a-f]{8,}\b|[-+]?\b(nan|inf(inity)?)\b|\d+", re.IGNORECASE)


def common_cause(study: optuna.Study) -> str | None:
    """What the last trials to end have failed for, if so many did for one cause.

    It counts anew after a halt, which the study remembers: who resumes it has looked. A trial that a machine has ended
    counts as one that failed by its settings: where five in a row end so, a sixth would.

    Returns:
        One line; None if the search may go on.
    """
    ended = study.get_trials(deepcopy=False, states=ENDED)
    row = sorted(ended, key=_when)[study.user_attrs.get(HALTED, 0) :][-IN_A_ROW:]
    if len(row) < IN_A_ROW or len(set(map(_cause, row))) > 1 or _cause(row[0]) is None:
        return None
    study.set_user_attr(HALTED, len(ended))
    return f"{IN_A_ROW} trials in a row failed, the last one ({row[-1].number}) by this: {row[-1].user_attrs[ERROR]}"


def cause_of(line: str) -> str:
    """`line` without what is a trial's own: of two lines of one cause the same."""
    return " ".join(PARTICULAR.sub("#", line).split())


def _cause(trial: FrozenTrial) -> str | None:
    # One that died as it was failed, and was run again, has the line and is complete.
    line = trial.user_attrs.get(ERROR) if status_of(trial) is Status.FAILED else None
    return None if line is None else cause_of(line)


def _when(trial: FrozenTrial) -> tuple[datetime, int]:
    return trial.datetime_complete or datetime.max, trial.number
