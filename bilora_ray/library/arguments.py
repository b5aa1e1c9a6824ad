"""What the public calls may be given: a wrong type is one line before anything is done, and no traceback behind it."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

from bilora_ray.errors import UserError, nearest

P = ParamSpec("P")
R = TypeVar("R")
LONGEST = 60
WORDS = {bool: "True or False", int: "a whole number", str: "a text", types.NoneType: "None"}


def checked(call: Callable[P, R]) -> Callable[P, R]:
    """`call`, which raises a UserError where it takes no such argument, or one of another type than its annotation.

    Known are unions, classes, and of generic ones what they are of; a list of texts is looked at text by text.
    """

    @wraps(call)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        hints, takes = _hints(call), inspect.signature(call)
        if unknown := [name for name in kwargs if name not in takes.parameters]:
            known = [name for name in takes.parameters if name != "self"]
            raise UserError(f"{call.__name__}: takes no '{unknown[0]}'; {nearest(unknown[0], known)}")
        for name, value in takes.bind(*args, **kwargs).arguments.items():
            if name in hints and not any(_is(value, kind) for kind in _kinds(hints[name])):
                allowed = " or ".join(map(_in_words, _kinds(hints[name])))
                raise UserError(f"{name}: must be {allowed}, got {_shown(value)}")
        return call(*args, **kwargs)

    return checking


def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of what `call` takes. What it returns need not be imported."""
    told = {name: hint for name, hint in call.__annotations__.items() if name != "return"}
    return typing.get_type_hints(types.SimpleNamespace(__annotations__=told), call.__globals__)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """What a union is of; of anything else itself."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _is(value: Any, kind: Any) -> bool:
    kind, of = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is int:  # NumPy's too; Python would take True for 1
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is Sequence:
        return isinstance(value, Sequence) and all(isinstance(one, of) for one in value)
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    """What was given, if that is short; else what it is."""
    text = repr(value)
    return text if len(text) <= LONGEST and text.isprintable() else type(value).__name__


def _in_words(kind: Any) -> str:
    origin = typing.get_origin(kind) or kind
    if origin is Sequence:
        return "a list of texts"
    return WORDS.get(origin) or {"Mapping": "a dict", "Path": "a Path"}.get(origin.__name__, origin.__name__)
