"""Which process runs which trial."""

from __future__ import annotations

from contextlib import ExitStack

from bilora_ray.files import locked
from bilora_ray.search.study.layout import Layout


class Claims:
    """The trials that this process runs. A claim is a file lock, which the system frees however the process ends.

    Args:
        layout: where the trials' folders are.
        name: of the study.
    """

    def __init__(self, layout: Layout, name: str) -> None:
        self._layout = layout
        self._name = name
        self._held: dict[int, ExitStack] = {}

    def take(self, number: int) -> bool:
        """Claim a trial. Whether that is possible: another process may have it."""
        if number in self._held:
            return True
        claim = self._layout.claim(self._name, number)
        claim.parent.mkdir(exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(claim, wait_s=0))
            except TimeoutError:
                return False
            self._held[number] = stack.pop_all()
        return True

    def release(self, *numbers: int) -> None:
        """Give up the claims to `numbers`, or all claims."""
        for number in numbers or tuple(self._held):
            self._held.pop(number).close()
