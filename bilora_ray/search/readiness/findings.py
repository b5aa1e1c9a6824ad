"""What there is to say of one thing that a search needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from bilora_ray.errors import UserError


class Verdict(Enum):
    """How a thing is. The words are the same on the terminal and in JSON."""

    OK = "ok"
    NOTE = "note"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    """One thing that a search needs.

    Attributes:
        about: what it is.
        verdict: `note` where a search runs, though worse than it could; `fault` where it does not.
        found: how it is.
        mend: what to do about it, where there is something.
    """

    about: str
    verdict: Verdict
    found: str
    mend: str | None = None


@contextmanager
def told(found: list[Finding], about: str, mend: str | None = None) -> Iterator[None]:
    """Note the UserError of the block as a fault of `about`."""
    try:
        yield
    except UserError as error:
        found.append(Finding(about, Verdict.FAULT, str(error), mend))
