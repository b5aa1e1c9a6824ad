"""What the settings of a space get, put in order: conditions, expressions, and whether any trial could be refused."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from bilora_ray.checking import nearest_setting
from bilora_ray.config import TrialConfig
from bilora_ray.errors import UserError
from bilora_ray.expressions import Expression, parsed
from bilora_ray.facts import METHOD_NAMES
from bilora_ray.search.space import (
    Choice,
    Distribution,
    Given,
    Range,
    Space,
    Value,
    is_expression,
    named,
    setting_of,
)
from bilora_ray.settings import FACTS, applies, coerce, is_integer, is_number

# Trials that differ in these cannot be compared: they are judged by other rows, another measure or at other steps.
NOT_SEARCHED = frozenset(key for key, facts in FACTS.items() if not facts.searched)
ONE_VALUE = "must have one value: trials that differ in it cannot be compared"
# So many combinations of what an expression is computed from are tried: all, or an even grid with the corners.
TRIED = 2000
# Of a distribution's: a database of studies keeps 512 characters.
LONGEST_NAME = 500

Parts = Mapping[str, Sequence[Distribution | Given]]


def with_parts(space: Space, parts: Parts) -> Space:
    """`space`, which has fixed settings only, with the `parts` of the others, each after what it depends on.

    Args:
        space: checked but for them.
        parts: setting -> its distributions and values, of which a trial gets the one whose condition is met.

    Raises:
        UserError: a condition can never be met or two can be at once, or settings depend on each other in a circle.
    """
    for key, found in parts.items():
        for part in found:
            _check_names(space, key, part)
    fixed = dict(space.fixed)
    for key in {needed for found in parts for needed in _needs(found, parts)} & fixed.keys():
        where = "--set trial" if key in space.overridden else f"{space.path}: trial"
        fixed[key] = coerce(key, fixed[key], f"{where}.{key}")
    notes = _left_out(space, parts, fixed)
    order = _in_order(space, parts)
    kept = _possible(space, {key: () if key in notes else parts[key] for key in order}, fixed, notes)
    distributions: dict[str, Distribution] = {}
    given: dict[str, Given] = {}
    for key in order:
        constant = _constant(key, kept)
        if constant is not None:
            fixed[key] = space.derived(constant, key, fixed)
            del kept[key]
            continue
        if kept[key] and key in NOT_SEARCHED:
            raise UserError(f"{space.path}: trial.{key}: {ONE_VALUE}")
        drawn = [part for part in kept[key] if isinstance(part, Choice | Range)]
        for part in kept[key]:
            alone = len(drawn if isinstance(part, Choice | Range) else kept[key]) == 1
            name = named(key, part, alone)
            if len(name) > LONGEST_NAME:
                raise UserError(f"{space.path}: trial.{key}: a condition of over {LONGEST_NAME} characters is too long")
            if name in distributions or name in given:
                raise UserError(f"{space.path}: trial.{key}: two of its entries have the same condition")
            if isinstance(part, Given):
                given[name] = part
            else:
                distributions[name] = part
    return replace(space, fixed=fixed, distributions=distributions, given=given, notes=tuple(notes.values()))


def without_effect(parts: Parts, fixed: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The settings that are drawn and that no trial reads -> the setting that is why, and how, in words."""
    drawn = [key for key, found in parts.items() if any(isinstance(part, Choice | Range) for part in found)]
    method, found = str(fixed.get("method", _default("method"))), {}
    for key in drawn:
        if "method" not in parts and not applies(key, method):
            found[key] = ("method", f"method {method} does not read it")
    epochs, steps = "num_train_epochs", parts.get("max_steps", [Given(value=fixed.get("max_steps"))])
    stepped = any(not part.when and not _may_be_null(part) for part in steps)
    if epochs in drawn and stepped and not any(epochs in _needs(key, parts) for key in parts):
        found[epochs] = ("max_steps", "every trial has max_steps instead")
    return found


def _may_be_null(part: Distribution | Given) -> bool:
    return None in part.choice if isinstance(part, Choice) else isinstance(part, Given) and part.value is None


def _left_out(space: Space, parts: Parts, fixed: Mapping[str, Any]) -> dict[str, str]:
    """What need not be drawn since `--set` gave another setting -> a line about it; refused if the file is why."""
    notes = {}
    for key, (cause, why) in without_effect(parts, fixed).items():
        if cause not in space.overridden or key in space.overridden:
            where = "--set trial" if key in space.overridden else f"{space.path}: trial"
            raise UserError(f"{where}.{key}: {why}, so that trials that differ in it are the same")
        notes[key] = f"{key}: is not searched; {why}"
    return notes


def check_settings(space: Space) -> None:
    """Refuse a space of which any trial could be refused.

    Both ends of every range and every choice are tried, with those of each other setting and in each case that the
    conditions make: no rule is about more than two settings. What is derived is tried with what it is computed from.

    Raises:
        UserError: says of which setting.
    """
    _check_cases(space)
    for name, expression in space.expressions.items():
        sources = _behind(space, name)
        most = max(3, int(TRIED ** (1 / max(1, len(sources)))))
        for sampled in _crossed(space, {source: space.spread(source, most) for source in sources}):
            if space.asked(name, sampled):
                values = space.settings(sampled)
                told = ", ".join(f"{key} {values.get(key, _default(key))}" for key in expression.names)
                where = f"{space.path}: trial.{setting_of(name)}: {expression.text} with {told}"
                coerce(setting_of(name), values[setting_of(name)], where)
                _check_one(space, space.trial_config(sampled))
    free = [name for name in space.distributions if not space.decides(name)]
    for pair in combinations(free, 2) if len(free) > 1 else [free]:
        for sampled in _crossed(space, {name: space.ends(name) for name in pair}):
            _check_one(space, space.trial_config(sampled))


def _check_names(space: Space, key: str, part: Distribution | Given) -> None:
    """Refuse an expression of what is no number."""
    if not isinstance(part, Given) or not is_expression(key, part.value):
        return
    where = f"{space.path}: trial.{key}"
    try:
        names = parsed(part.value).names
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    for name in names:
        if name not in TrialConfig.model_fields:
            raise UserError(f"{where}: {part.value} has no setting '{name}'; {nearest_setting(name, TrialConfig)}")
        if not is_number(name):
            raise UserError(f"{where}: {part.value} computes with {name}, which is no number")


def _possible(
    space: Space, parts: Parts, fixed: Mapping[str, Any], left_out: Iterable[str]
) -> dict[str, list[Distribution | Given]]:
    """The `parts`, which are in order, less those whose condition can't be met since `--set` replaced what it is on."""
    kept: dict[str, list[Distribution | Given]] = {}
    replaced = {*space.overridden, *left_out}
    for key, found in parts.items():
        kept[key] = [part for part in found if _can_be(space, key, part, kept, fixed, replaced)]
        if len(kept[key]) < len(found):
            replaced.add(key)
    return kept


def _can_be(
    space: Space,
    key: str,
    part: Distribution | Given,
    parts: Parts,
    fixed: Mapping[str, Any],
    replaced: Container[str],
) -> bool:
    """Whether the condition of `part`, of the setting `key`, can be met; if not and nothing was `replaced`: refused."""
    for other, allowed in part.when.items():
        where = f"{space.path}: trial.{key}: when {other} is {' or '.join(map(repr, allowed))}"
        if not parts.get(other):
            never = [] if fixed.get(other, _default(other)) in allowed else list(allowed)
            known = f"it is {fixed.get(other, _default(other))!r}"
        else:
            never = [value for value in allowed if not any(_may_be(other, one, value, where) for one in parts[other])]
            known = "it is " + " or ".join(one.range for one in parts[other])
        if never and other in replaced:
            if len(never) == len(allowed):
                return False
        elif never:
            raise UserError(f"{where}: {other} is never {never[0]!r}; {known}")
    return True


def _may_be(key: str, part: Distribution | Given, value: Value, where: str) -> bool:
    if isinstance(part, Given):
        if is_expression(key, part.value):
            raise UserError(f"{where}: {key} is derived, and a condition is on what is drawn or fixed")
        return part.value == value
    if part.count(is_integer(key)) is None:
        raise UserError(f"{where}: {key} is drawn from a continuous range, so it is never just that")
    return part.holds(value)


def _needs(key: str, parts: Parts) -> Iterator[str]:
    """The settings that must be known before `key` is."""
    methods = {value for part in parts.get("method", ()) for value in part.ends()}
    if FACTS[key].of != METHOD_NAMES and not (methods and methods <= set(FACTS[key].of)):
        yield "method"
    for part in parts[key]:
        yield from part.when
        if isinstance(part, Given) and is_expression(key, part.value):
            yield from parsed(part.value).names


def _in_order(space: Space, parts: Parts) -> list[str]:
    """The settings, each after those it depends on; the method as soon as can be, else as they come."""
    done: list[str] = []

    def visit(key: str, trail: tuple[str, ...]) -> None:
        if key in trail:
            circle = " -> ".join((*trail[trail.index(key) :], key))
            raise UserError(f"{space.path}: trial.{key}: settings depend on each other in a circle: {circle}")
        if key in parts and key not in done:
            for needed in _needs(key, parts):
                visit(needed, (*trail, key))
            done.append(key)

    for key in ("method", *parts):
        visit(key, ())
    return done


def _constant(key: str, parts: Parts) -> Expression | None:
    """What derives `key`, if that is the same in all trials."""
    match parts[key]:
        case [Given(value=value, when={} as when)] if not when and is_expression(key, value):
            expression = parsed(value)
            return None if any(parts.get(name) for name in expression.names) else expression
    return None


def _check_cases(space: Space) -> None:
    """Refuse conditions that are never met, and two of one setting that are met at once."""
    never = {name for name, part in space.parts.items() if part.when}
    for sampled in space.each_case():
        held: set[str] = set()
        for name in space.parts:
            if not space.asked(name, sampled):
                continue
            never.discard(name)
            key = setting_of(name)
            if key in held:
                case = " and ".join(f"{k} is {v}" for k, v in space.sampled(sampled).items() if k in space.deciding)
                raise UserError(f"{space.path}: trial.{key}: two of its entries hold when {case or 'nothing is asked'}")
            held.add(key)
        if "precision" in space.varied and space.trial_config(sampled).precision == "auto":
            raise UserError(f"{space.path}: trial.precision: auto is the one or the other; give bf16 or fp32 to all")
    for name in space.parts:
        if name in never:
            raise UserError(f"{space.path}: trial.{setting_of(name)}: no trial has {space.parts[name].condition}")


def _check_one(space: Space, config: TrialConfig) -> None:
    if space.resources.parallelism == "fsdp" and config.whole_only is not None:
        raise UserError(f"{space.path}: trial.{config.whole_only}")


def _crossed(space: Space, values: Mapping[str, Sequence[Value]]) -> Iterator[dict[str, Value]]:
    """As `Space.each`: the `values` in each case, and of other distributions the first value."""

    def of(name: str) -> Sequence[Value]:
        if space.decides(name):
            return tuple(dict.fromkeys((*space.deciding_values(name), *values.get(name, ()))))
        return values.get(name, space.ends(name)[:1])

    return space.each(of)


def _behind(space: Space, name: str) -> list[str]:
    """The distributions that decide what the expression `name` is."""
    keys, left = set[str](), [name]
    while left:
        one = left.pop()
        for key in space.expressions[one].names if one in space.expressions else ():
            keys.add(key)
            left += [other for other in space.given if setting_of(other) == key]
    return [other for other in space.distributions if setting_of(other) in keys]


def _default(key: str) -> Any:
    return TrialConfig.model_fields[key].default
