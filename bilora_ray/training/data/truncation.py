"""What `max_length` takes from rows: by which rule, how often, and what there is to say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

# Rows that lose what they are about teach something else; few of them are nothing to speak of.
MOST_LOST = 0.01
# A prompt that keeps a quarter of itself or less, and fewer tokens than these, is gone: they ask for nothing.
FEWEST_TOKENS = 8

# A rule -> how many tokens the completion gets at the most, of those of the whole prompt and of all there is room for.
MOST_LEARNED: dict[str, Callable[[int, int], int]] = {
    "completion-first": lambda prompt, room: room - min(prompt, 1),
    "prompt-first": lambda prompt, room: max(room - prompt, min(room, 1)),
    "both": lambda prompt, room: max(room * 3 // 4, room - prompt),
    "drop": lambda prompt, room: room - prompt,
}


def is_gone(kept: int, whole: int) -> bool:
    """Whether a prompt that keeps so many of its tokens asks for nothing any more."""
    return kept < FEWEST_TOKENS and 4 * kept <= whole and whole > 0


@dataclass(frozen=True)
class Truncation:
    """What `max_length` did to the rows of a split, or of all. A row can be of several kinds.

    Attributes:
        rows: rows before.
        cut: rows that lost tokens and are still used.
        dropped: rows left out because they are too long (`truncation: drop`) or have no token to predict.
        prompt_gone: rows that are cut to next to nothing of their prompt: see `is_gone`.
        prompt_cut: rows that lost another part of their prompt or text.
        completion_cut: rows that lost the end of what is learned, so that its end is not learned of them.
        turns_cut: chats that lost earlier turns of the assistant, which would be learned too.
        answer_cut: rows whose completion has its answer behind `max_new_tokens` tokens: what is written ends before.
    """

    rows: int
    cut: int = 0
    dropped: int = 0
    prompt_gone: int = 0
    prompt_cut: int = 0
    completion_cut: int = 0
    turns_cut: int = 0
    answer_cut: int = 0

    @classmethod
    def of(cls, parts: Iterable[Truncation]) -> Truncation:
        """The sum of `parts`."""
        return cls(*map(sum, zip(*map(astuple, parts), strict=True)))

    @classmethod
    def told_by(cls, metrics: Mapping[str, float]) -> Truncation:
        """What the `metrics` of an evaluation say of it."""
        return cls(**{field.name: int(metrics.get(_metric(field.name), 0)) for field in fields(cls)})

    def metrics(self) -> dict[str, int]:
        """As metrics of an evaluation."""
        return {_metric(field.name): getattr(self, field.name) for field in fields(self)}

    def in_words(self, settings: Mapping[str, Any]) -> str:
        """What became of the rows, for people to read."""
        kinds = {
            "whole prompt": self.prompt_gone,
            "part of the input": self.prompt_cut,
            "end of the completion": self.completion_cut,
            "earlier turns": self.turns_cut,
        }
        taken = ", ".join(f"{name}: {count}" for name, count in kinds.items() if count)
        line = f"{self.cut} are cut to max_length {settings['max_length']}" + (f" ({taken})" if taken else "")
        too_long = "are too long or " if settings["truncation"] == "drop" else ""
        return line + (f", {self.dropped} {too_long}have nothing to predict and are left out" if self.dropped else "")

    def notes(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """Lines, that begin with a setting, about rows that teach something else than they should."""
        mends = f"raise it, or change truncation ({settings['truncation']})"
        if self._many(self.prompt_gone):
            mends_more = f"{mends} or max_new_tokens" if settings["predict_with_generate"] else mends
            yield f"max_length: {self._share(self.prompt_gone)} lose their whole prompt; {mends_more}"
        if self._many(self.completion_cut):
            lost = "lose the end of their completion, so that they teach no end of sequence"
            yield f"max_length: {self._share(self.completion_cut)} {lost}; {mends}"
        if self._many(self.turns_cut):
            lost = "lose earlier turns of the assistant, which teach nothing then"
            yield f"max_length: {self._share(self.turns_cut)} {lost}; raise it"
        if self.answer_cut:
            ends = f"a text of {settings['max_new_tokens']} tokens ends before the answer of its reference"
            yield f"max_new_tokens: of {self.answer_cut} validation rows {ends}, so that none can be right; raise it"

    def _many(self, count: int) -> bool:
        return count > MOST_LOST * self.rows

    def _share(self, count: int) -> str:
        return f"{count} of {self.rows} rows ({count / self.rows:.0%})"


def _metric(name: str) -> str:
    return name if name == "rows" else f"rows_{name}"
