r"""The reward part of mathematical answers: math. See `part.py` for the contract of a part.

Text and answer are taken apart first (`notation.py`): a name before `=`, units, the members of pairs, sets and
matrices, plain numbers. Numbers are compared as exact fractions, members one by one, words as words. What is left are
expressions; their equality is the math-verify library's (Hugging Face): LaTeX to sympy, compared as numbers, then as
expressions. What it leaves to its caller is done here:

- Its time limits are signals, which break in threads, so they are off. What makes sympy run for hours is reported by
  the text and refused instead: towers and large powers, sums and integrals, deep nesting, long texts. A final
  answer is worked out. What is still slow meets the deadline of the process that scores.
- It reads words as products of letters: `teas` would equal `seat`. Here words are compared as words.
- It rounds to decimal places, so that 1e-19 would equal 1e-31: values are compared here, in proportion.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from math import prod
from typing import Any

from gspo_mm.reward.notation import (
    Listed,
    bare_math,
    interval,
    is_relation,
    is_words,
    last_side,
    listed,
    named_tuple,
    number_of,
    split_name,
    split_unit,
    unmarked,
)
from gspo_mm.reward.part import Args, written
from gspo_mm.reward.text import normalise
from gspo_mm.types import Json

_LONGEST = 200  # characters of a final answer
_LONGEST_SYMBOLIC = 80  # characters, where there are variables or functions to simplify
_DEEPEST = 6  # brackets within brackets
_MOST_POWER = 12  # all exponents of an expression together, where the base is no plain number
_MOST_LETTERS = 4  # different variables: expanding (a+b+c+d)^12 makes 455 terms
_MOST_FUNCTIONS = 2  # simplifying sin(log(log(e) - 2) - 99) takes sympy ten seconds
# what GSM8K's column has, and what is said around a value
_SENTENCE = re.compile(
    r"#{4}|<<.*>>|\b(?:is|are|was|were|equals|answer|therefore|thus|so|hence|total)\b.*[0-9]|(?:\b[^\W\d_]{2,}\W+){11}[^\W\d_]{2,}",
    re.IGNORECASE | re.DOTALL,
)
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp)")
_ENDLESS = re.compile(r"\\(?:i+nt|oint|sum|prod|lim|d?binom|Gamma|begin|zeta)\b|\bd/d|[!#&]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_POWER = re.compile(
    r"(?P<base>[0-9.]*)\s*(?:\^|\*\*)\s*(?:\{(?P<braced>(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}|(?P<plain>[0-9]+|[^\s{}()]))"
)
_TOWER = re.compile(r"(?:\^|\*\*)\s*(?:\{[^{}]*|\([^()]*|[0-9.]+\s*)(?:\^|\*\*)")


class MathArgs(Args):
    digits: int = 6  # decimal places that have to agree, of a value below 1 so many digits


def math_(text: str, answer: Json, args: MathArgs) -> float:
    r"""1 where text and answer are the same number, expression, set, tuple, matrix, equation or words: 0.5, \frac{1}{2}.

    Units may be left out, but not be others. Numbers have the same sign and magnitude.
    """
    wanted = bare_math(written(answer) or "")
    if not wanted or wanted.count("{") != wanted.count("}") or _TOWER.search(wanted):
        raise ValueError(f"answer {answer!r} is no mathematical expression that can be compared")
    if len(wanted) > _LONGEST or _SENTENCE.search(wanted):
        raise ValueError(
            f"answer {answer!r:.80} is a text with the answer in it, or more than {_LONGEST} characters long; "
            "give the final answer alone"
        )
    return float(_equal(bare_math(text), wanted, args.digits) if len(text) <= 2 * _LONGEST else False)


# Answers of a group are often the same few.
@lru_cache(maxsize=8192)
def _equal(text: str, answer: str, digits: int) -> bool:
    if not text or not answer or len(text) > 2 * _LONGEST:
        return False
    if _is_same(text, answer):
        return True
    (name, given), (wanted_name, wanted) = split_name(text), split_name(answer)
    # `x = 5` is 5, but `y = 2x` is no name of 2x where the other is an equation as well
    if (name and (name == wanted_name or not is_relation(answer))) or (wanted_name and not is_relation(text)):
        return _equal(given, wanted, digits)
    if renamed := _in_one_form(text, answer):
        return _equal(*renamed, digits)
    given, unit = split_unit(text)
    wanted, wanted_unit = split_unit(answer)
    if is_words(wanted) or is_words(given):
        return normalise(unmarked(text)) == normalise(unmarked(answer)) != ""
    percent = "%" in (unit, wanted_unit)
    if unit and wanted_unit and unit != wanted_unit:
        return False
    if wanted_unit and not unit:  # `5m` has a unit only where the answer says so
        given = re.sub(rf"(?<=[0-9])\s*{re.escape(wanted_unit)}$", "", given)
    if unit != wanted_unit and _is_same(given, wanted):
        return True
    a, b = number_of(given), number_of(wanted)
    if a is not None and b is not None:
        # 50% is 50 and 0.5
        shares = {Fraction(1), Fraction(1, 100), Fraction(100)} if percent and unit != wanted_unit else {1}
        return any(_close(a * share, b, digits) for share in shares)
    members, wanted_members = listed(given), listed(wanted)
    if members and wanted_members and members.kind == wanted_members.kind:
        if _same_members(members, wanted_members, digits):
            return True
        if not is_relation(wanted) or _numbers_differ(members, wanted_members, digits):
            return False
    return _same_expressions(given, wanted, digits, percent=percent)


def _is_same(text: str, answer: str) -> bool:
    return "".join(unmarked(text).split()) == "".join(unmarked(answer).split())


def _in_one_form(text: str, answer: str) -> tuple[str, str] | None:
    """Text and answer where one of them is written in the form of the other; None where both stay as they are."""
    if not is_relation(answer):
        if "(" in answer[:1] and (stated := named_tuple(text, by_name=True)):
            return stated, answer
        side = last_side(text)
        return (side, answer) if side else None
    if wanted := named_tuple(answer, by_name=text.startswith("(")):
        if wanted.count("(") > 1:
            return named_tuple(text, by_name=False) or text, wanted
        if not is_relation(text):
            return text if text.startswith("(") else f"({text})", wanted
    name, given = split_name(text)
    if (bounds := interval(answer)) and name in ("", bounds[0]) and not is_relation(given):
        return given, bounds[1]
    return None


def _same_members(given: Listed, wanted: Listed, digits: int) -> bool:
    if len(given.members) != len(wanted.members):
        return False
    left = list(given.members)
    for member in wanted.members:
        candidates = left[:1] if wanted.ordered else left
        found = next((each for each in candidates if _equal(each, member, digits)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _numbers_differ(given: Listed, wanted: Listed, digits: int) -> bool:
    """Whether two relations have other plain numbers on a side."""
    pairs = [(number_of(a), number_of(b)) for a, b in zip(given.members, wanted.members, strict=False)]
    return any(a is not None and b is not None and not _close(a, b, digits) for a, b in pairs)


def _same_expressions(text: str, answer: str, digits: int, *, percent: bool) -> bool:
    try:
        given, wanted = _parse(unmarked(text)), _parse(unmarked(answer))
        if given is None or wanted is None:
            return False
        a, b = _value(given), _value(wanted)
        if not percent and a is not None and b is not None:
            return _close(a, b, digits)
        return _verify(wanted, given, digits)
    except Exception:  # sympy raises what it likes on what a model writes, such as 1/sin(pi) < 0
        return False


def _verify(wanted: Any, given: Any, digits: int) -> bool:
    from math_verify import verify
    from sympy import Interval, Tuple

    # What sympy would only find out by simplifying: a number is no pair, and what has variables is
    # nothing without; but `x = 5` may be 5.
    if getattr(wanted, "is_number", False) and isinstance(given, Tuple | Interval):
        return False
    if getattr(given, "is_number", False) and isinstance(wanted, Tuple | Interval):
        return False
    symbols = [getattr(each, "free_symbols", set()) for each in (wanted, given)]
    is_relation = any(getattr(each, "is_Relational", False) for each in (wanted, given))
    if bool(symbols[0]) != bool(symbols[1]) and not is_relation:
        return False
    if symbols[0] and not is_relation and _differ_at_a_point(wanted, given, symbols[0] | symbols[1], digits):
        return False
    return verify([wanted], [given], float_rounding=digits, timeout_seconds=None)


def _differ_at_a_point(a: Any, b: Any, symbols: set[Any], digits: int) -> bool:
    """Whether two expressions have other values where their variables are 1.37, 2.11 ..."""
    point = {s: 1.37 + 0.74 * i for i, s in enumerate(sorted(symbols, key=str))}
    values = [_value(each.subs(point)) if hasattr(each, "subs") else None for each in (a, b)]
    return values[0] is not None and values[1] is not None and not _close(values[0], values[1], digits)


def _close(given: Fraction | float, wanted: Fraction | float, digits: int) -> bool:
    """Within 2 of the last decimal place that counts; of a value below 1, of its last digit that counts."""
    return abs(given - wanted) <= 2 * 10.0**-digits * min(1.0, abs(wanted))


def _value(expression: Any) -> float | None:
    """The value of a real number; None for all else."""
    if not (getattr(expression, "is_number", False) and getattr(expression, "is_real", False)):
        return None
    value = float(expression.evalf(20))
    return value if abs(value) < 1e9 else None  # beyond, 20 digits of a cancelling sum may not be enough


@lru_cache(maxsize=8192)
def _parse(text: str) -> Any:
    """The sympy expression of LaTeX or plain notation; None where it is none, or not a safe one."""
    if not _is_safe(text):
        return None
    # sympy takes most of a second to import, and most reward files need none of it
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    # it would read 5m as 5
    looks = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    found = parse(
        f"${text}$",
        [LatexExtractionConfig(normalization_config=looks)],
        fallback_mode="no_fallback",
        parsing_timeout=0,
    )
    return found[0] if found else None


def _is_safe(text: str) -> bool:
    """Whether sympy can work the expression out in a moment."""
    if len(text) > _LONGEST or _ENDLESS.search(text) or any(c.isdigit() and not c.isascii() for c in text):
        return False
    depth = deepest = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    bare = _COMMAND.sub(" ", text)
    letters = {c for c in bare if c.isalpha()}
    functions = len(_FUNCTION.findall(text))
    if functions > _MOST_FUNCTIONS or ((functions or letters) and len(text) > _LONGEST_SYMBOLIC):
        return False
    return deepest <= _DEEPEST and len(letters) <= _MOST_LETTERS and _is_low_power(bare)


def _is_low_power(text: str) -> bool:
    total = 0
    powers = list(_POWER.finditer(text))
    if len(powers) != text.count("^") + text.count("**"):  # a tower, or too many braces
        return False
    for power in powers:
        exponent = (power["braced"] if power["braced"] is not None else power["plain"]).strip()
        if "^" in exponent or "**" in exponent or text[power.end() :].lstrip().startswith(("^", "**")):
            return False
        factors = [int(n) for n in re.findall(r"[0-9]{1,6}", exponent)]
        largest = max(factors, default=1)
        if power["base"] and largest <= 200 and prod(factors) <= 10_000:  # 2^{100} is one number
            continue
        total += largest
    return total <= _MOST_POWER
