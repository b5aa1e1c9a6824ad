"""The errors that a user can cause, and how a wrong name finds its nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# So many names are listed in a line.
MOST_NAMES = 20


class UserError(Exception):
    """Bad input. Its text is one line: what is wrong, where, and what is allowed.

    The command line prints the line and exits with code 2; a library caller catches it.
    """


class MachineError(UserError):
    """What stopped a search is the machine's, such as a full disk: the search can go on once that is mended."""


class TrialFailure(Exception):
    """A trial that cannot go on although its input is right: the search records it and goes on."""


class NonFiniteLoss(TrialFailure):
    """The loss became NaN or infinite."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"loss is {loss} at step {step}")
        self.step = step
        self.loss = loss

    def __reduce__(self) -> tuple[type[NonFiniteLoss], tuple[int, float]]:
        return type(self), (self.step, self.loss)


def nearest(name: str, allowed: Iterable[str], otherwise: str = "none has a name like it") -> str:
    """A hint for a misspelt `name`: the nearest of `allowed`, or their list; `otherwise` if a line cannot hold that."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    if len(names) > MOST_NAMES:
        return otherwise
    return f"allowed: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or its type's name if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
