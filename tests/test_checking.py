"""Groups of settings that were stored, and of which a later version has more."""

from pydantic import Field

from bilora_ray.checking import Float, Settings, before, completed
from bilora_ray.facts import setting


class Before(Settings):
    rank: int
    names: tuple[str, ...] = ()


class Now(Before):
    warmup: Float = 0.5
    steps: int | None = None
    words: tuple[str, ...] = Field(default_factory=lambda: ("a", "b"))


def test_stored_settings_get_the_defaults_of_those_that_they_do_not_know() -> None:
    stored = Before(rank=3, names=("x",)).model_dump(mode="json")
    same = {"rank": 3, "names": ["x"], "warmup": 0.5, "steps": None, "words": ["a", "b"]}
    assert completed(Now, stored) == same == completed(Now, Now(rank=3, names=("x",)).model_dump(mode="json"))


def test_what_was_given_stays() -> None:
    assert completed(Now, {"rank": 3, "warmup": 0.1})["warmup"] == 0.1
    assert list(completed(Now, stored := {"warmup": 0.1, "rank": 3}))[:2] == list(stored)
    # A space file need not give what has no default: a search may choose it.
    assert "rank" not in completed(Now, {})


class Otherwise(Before):
    split: str = setting("by label", "how rows are held out", decides="rows", before="random")


def test_stored_settings_get_what_their_version_did_where_a_default_does_something_else() -> None:
    assert before(Otherwise) == {"split": "random"}
    assert before(Now) == {}
    assert completed(Otherwise, {"rank": 3})["split"] == "random"
    assert completed(Otherwise, {"rank": 3, "split": "by label"})["split"] == "by label"
