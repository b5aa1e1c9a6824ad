"""Words and forms of the quickstart's two wordings.

In a form, ``{a}`` and ``{b}`` stand for the operands in the order of the answer, ``{d}`` for a number that
plays no part, ``{i}`` for a thing that is counted, ``{n}`` and ``{m}`` for two people, ``{p}`` for a place
and ``{v}`` for a verb. Verbs go by the operator that the answer calls for.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    """Return the words of ``text``; an underscore stands for a space inside one."""
    return [word.replace("_", " ") for word in text.split()]


PLAIN_NAMES = _words(
    "Anna Ben Clara David Emma Finn Grace Henry Iris Jack Kate Leo Mia Noah Olive Paul Rosa Sam Tina Will"
)
PLAIN_ITEMS = _words(
    "apples books cards coins cups eggs flowers keys marbles pears pencils plums shells stamps stones toys"
)
PLAIN_PLACES = _words("barn basket box cellar cupboard drawer kitchen shed shop yard")
PLAIN_VERBS = {
    "+": _words("added bought brought built earned fetched found gathered got made picked received won"),
    "-": _words("burnt donated dropped lent lost mislaid removed sold spent traded used wasted"),
}
PLAIN_STOCKS = (
    "{n} had {a} {i}",
    "there were {a} {i} in the {p}",
    "the {p} held {a} {i}",
    "{a} {i} lay in the {p}",
    "{a} was the number of {i}",
    "with {a} {i} in the {p}",
    "the {i} in the {p} were {a}",
)
PLAIN_CHANGES = (
    "{n} {v} {b} {i}",
    "{n} {v} {b}",
    "{n} {v} {b} of them",
    "{b} {i} were {v} by {n}",
    "{b} is what {n} {v}",
    "what {n} {v} was {b} {i}",
)
PLAIN_LINKS = (
    "{A}. Then {B}",
    "{A} and {B}",
    "{A}, {B}",
    "{A}, and later {B}",
    "first {A}, after which {B}",
    "{B}. Before that, {A}",
    "{B} when {A}",
    "{B}, {A}",
    "{B}, while {A} already",
)
PLAIN_GROUP_FORMS = (
    "there were {a} boxes with {b} {i} each",
    "{n} packed {b} {i} into each of {a} bags",
    "{a} friends of {n} had {b} {i} each",
    "each bag had {b} {i}. There were {a} bags",
    "{n} bought {b} {i} in each of {a} shops",
    "every {p} held {b} {i}, and there were {a}",
)
PLAIN_ASIDES = (
    "it was day {d}",
    "see page {d}",
    "the clock showed {d}",
    "{m} was {d} years old",
    "they met in room {d}",
    "{d} minutes went by",
    "bus {d} was late",
    "it was {d} degrees",
    "at house {d}",
    "{d} miles from home",
    "in week {d}",
    "{d} birds sang",
    "by {d} {m} was home",
    "road {d}",
    "{d} steps up",
    "the moon was {d} days old",
)
PLAIN_QUESTIONS = (
    "How many {i} are there?",
    "How many {i} does that make?",
    "Count the {i}.",
    "What is the number of {i}?",
)
SYLLABLES = _words("ba cor de fim ga hul jo kem li mur na ot pra quil ro sta tur ve wix yon zel")

LOG_NAMES = _words("the_bosun the_cook the_gunner the_mate the_purser the_surgeon old_Flint black_Meg")
LOG_ITEMS = _words(
    "anchors barrels biscuits cannons casks charts cutlasses doubloons hammocks kegs lanterns muskets pikes"
)
# The log tells what there is now and asks what there was before, so what was lost is added back.
# Half of the verbs are new to the model, so the rows can be learned by heart without learning the wording.
LOG_VERBS = {
    "+": _words("burnt dropped lost sold bartered jettisoned scuttled squandered"),
    "-": _words("bought brought fetched found hauled looted plundered seized"),
}
LOG_CHANGE_FORMS = (
    "{n} {v} {b} {i}, the hold bearing {a} now",
    "{a} {i} lie below since {n} {v} {b}",
    "wi' {a} {i} now in the hold, {n} {v} {b}",
    "{b} {i} were {v} by {n}, and now {a} lie below",
)
LOG_GROUP_FORMS = (
    "{n} dealt {b} {i} unto every one o' {a} hands",
    "{a} longboats bear {b} {i} apiece",
    "{b} {i} hang from every mast, and masts be {a}",
)
LOG_ASIDES = (
    "bell {d}",
    "day {d} at sea",
    "by page {d}",
    "at {d} knots",
    "{d} leagues out",
    "wind at {d} points",
)
LOG_QUESTIONS = ("What be the tally afore?", "How stood the count afore?", "Reckon the {i} afore.")
