"""Arithmetic over names, as `2 * rank`: a text becomes a tree of numbers, names and operators, and is never run."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# Characters of a text: enough for any rule of thumb, and too few for numbers that take a machine long.
LONGEST = 200
ALLOWED = "numbers, names of settings, + - * / // **, brackets, min(a, b), max(a, b), round(a) and int(a)"


def _power(base: float, exponent: float) -> float:
    # As floats: of whole numbers Python would compute all digits, however many.
    result = math.pow(base, exponent)
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent >= 0 and abs(result) < 2**53
    return int(result) if whole else result


OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: _power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
# Name -> the function, how many arguments it takes at the least, and at the most.
FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (min, 2, LONGEST),
    "max": (max, 2, LONGEST),
    "round": (round, 1, 1),
    "int": (int, 1, 1),
}


@dataclass(frozen=True)
class Expression:
    """A checked expression.

    Attributes:
        text: as it was written.
        names: what it is computed from, in order.
        tree: of Python's syntax, whose nodes are all among those that `value` knows.
    """

    text: str
    names: tuple[str, ...]
    tree: ast.expr

    def value(self, number_of: Callable[[str], float]) -> float:
        """Its value where each name has the number `number_of` it. ValueError if it has none that is finite."""
        try:
            found = _value(self.tree, number_of)
            is_finite = math.isfinite(found)
        except ZeroDivisionError:
            raise ValueError(f"{self.text} divides by zero") from None
        except OverflowError:
            raise ValueError(f"{self.text} is too large a number") from None
        except ValueError as error:
            problem = "is no real number" if "math domain" in str(error) else str(error)
            raise ValueError(f"{self.text}: {problem}") from None
        if not is_finite:
            raise ValueError(f"{self.text} is too large a number")
        return found

    def __str__(self) -> str:
        """The same for all texts that differ in spaces and brackets only."""
        return ast.unparse(self.tree)


@lru_cache(maxsize=1024)
def parsed(text: str) -> Expression:
    """The expression that `text` is. ValueError, in words, if it is none."""
    if len(text) > LONGEST:
        raise ValueError(f"is longer than {LONGEST} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is no expression; it may have {ALLOWED}") from None
    names = dict.fromkeys(_names(tree, text))
    return Expression(text.strip(), tuple(names), tree)


def _names(node: ast.expr, text: str) -> list[str]:
    """The names in a tree. ValueError if anything in it is not allowed."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return []
        case ast.Name(id=name):
            return [name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return _names(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _names(left, text) + _names(right, text)
        case ast.Call(func=ast.Name(id=function), args=arguments, keywords=[]) if function in FUNCTIONS:
            _, least, most = FUNCTIONS[function]
            if least <= len(arguments) <= most:
                return [name for argument in arguments for name in _names(argument, text)]
    raise ValueError(f"{ast.unparse(node)!r} cannot be in an expression; it may have {ALLOWED}")


def _value(node: ast.expr, number_of: Callable[[str], float]) -> float:
    match node:
        case ast.Constant(value=number):
            return _number(number)
        case ast.Name(id=name):
            return number_of(name)
        case ast.UnaryOp(op=op, operand=operand):
            return OPERATORS[type(op)](_value(operand, number_of))
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_value(left, number_of), _value(right, number_of))
        case ast.Call(func=ast.Name(id=function), args=arguments):
            return FUNCTIONS[function][0](*(_value(argument, number_of) for argument in arguments))
    raise AssertionError(f"`parsed` let {ast.dump(node)} through")


def _number(constant: Any) -> float:
    return constant
