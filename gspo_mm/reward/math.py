r"""The reward part of mathematical answers: math. See `part.py` for the contract of a part.

Equality is the math-verify library's (Hugging Face): LaTeX to sympy, compared as numbers, then as expressions.
What it leaves to its caller is done here:

- Its time limits are signals, which break in threads, so they are off. What makes sympy run for hours is told by
  the text and refused instead: towers and large powers, sums and integrals, deep nesting, long texts. A final
  answer is worked out. What is still slow meets the deadline of the process that scores.
- It reads words as products of letters: `teas` would equal `seat`. Here words are compared as words.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from gspo_mm.reward.part import Args
from gspo_mm.reward.text import normalise, parse_number
from gspo_mm.types import Json

_LONGEST = 200  # characters of a final answer
_LONGEST_SYMBOLIC = 80  # characters, where there are variables or functions to simplify
_DEEPEST = 6  # brackets within brackets
_MOST_POWER = 12  # all exponents of an expression together, where the base is no plain number
_MOST_LETTERS = 4  # different variables: expanding (a+b+c+d)^12 makes 455 terms
_MOST_FUNCTIONS = 2  # simplifying sin(log(log(e) - 2) - 99) takes sympy ten seconds
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp)")
_ENDLESS = re.compile(r"\\(?:i+nt|oint|sum|prod|lim|d?binom|Gamma|begin|zeta)\b|\bd/d|[!#&]")
_COMMAND = re.compile(r"\\(?:text|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_FUNCTIONS = {
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "exp",
    "sqrt",
    "arcsin",
    "arccos",
    "arctan",
    "deg",
}
_POWER = re.compile(
    r"(?P<base>[0-9.]*)\s*(?:\^|\*\*)\s*(?:\{(?P<braced>[^{}]*)\}|(?P<plain>[0-9]+|[^\s{}()]))"
)
_QUOTIENT = re.compile(r"([0-9]{1,9})/([0-9]{1,9})|\\d?frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}")
# what people type instead of LaTeX
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°|\\degree\b|\bdeg(?:rees?)?\b")
_ROOT = re.compile(r"√\s*([0-9]+|[a-z])|(?:√|(?<![\\A-Za-z])sqrt)\s*\(([^()]*)\)")
_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_TYPED = str.maketrans({"−": "-", "–": "-", "π": r"\pi ", "×": r"\times ", "÷": r"\div ",
                        "·": r"\cdot ", "²": "^2", "³": "^3", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge "})  # fmt: skip


class MathArgs(Args):
    digits: int = 6  # decimal places that have to agree


def math_(text: str, answer: Json, args: MathArgs) -> float:
    r"""1 where text and answer are the same number, expression, set, tuple or equation: 0.5, \frac{1}{2}, 50\%."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"answer {answer!r} is no mathematical expression")
    if len(text) > 2 * _LONGEST:
        text = ""
    return float(_equal(_latex(text), _latex(str(answer)), args.digits))


# Answers of a group are often the same few.
@lru_cache(maxsize=8192)
def _equal(text: str, answer: str, digits: int) -> bool:
    wanted = _parse(answer)
    if wanted is None and not _is_words(answer):
        raise ValueError(f"answer {answer!r} is no mathematical expression that can be compared")
    if not text or not _is_safe(text):
        return False
    if text == answer:
        return True
    if wanted is None or _is_words(text):
        return normalise(text) == normalise(answer)
    if _differ(_fraction(text), _fraction(answer), digits):
        return False
    try:
        given = _parse(text)
        return given is not None and _same(given, wanted, digits, percent="%" in text + answer)
    except Exception:  # sympy raises what it likes on what a model writes, such as 1/sin(pi) < 0
        return False


def _same(given: Any, wanted: Any, digits: int, *, percent: bool) -> bool:
    # 50% is 50 and 0.5 to the library, so only others are told apart by their values
    if not percent and _differ(_value(given), _value(wanted), digits):
        return False
    return _verify(wanted, given, digits)


def _verify(wanted: Any, given: Any, digits: int) -> bool:
    from math_verify import verify
    from sympy import Interval, Tuple

    # What sympy would only find out by simplifying: a number is no pair, and what has variables is
    # nothing without; but `x = 5` may be 5.
    if getattr(wanted, "is_number", False) and isinstance(given, Tuple | Interval):
        return False
    if getattr(given, "is_number", False) and isinstance(wanted, Tuple | Interval):
        return False
    variables = [bool(getattr(each, "free_symbols", ())) for each in (wanted, given)]
    is_relation = any(getattr(each, "is_Relational", False) for each in (wanted, given))
    if variables[0] != variables[1] and not is_relation:
        return False
    return verify([wanted], [given], float_rounding=digits, timeout_seconds=None)


def _differ(a: Fraction | float | None, b: Fraction | float | None, digits: int) -> bool:
    """Whether two numbers, where both are known, differ by more than rounding; most wrong answers do."""
    return a is not None and b is not None and abs(a - b) > 2 * 10.0**-digits


def _fraction(text: str) -> Fraction | None:
    r"""The value of 12.5, 3/4 or \frac{3}{4}, which need no LaTeX parser."""
    if quotient := _QUOTIENT.fullmatch(text):
        top, bottom = (int(n) for n in quotient.groups() if n is not None)
        return Fraction(top, bottom) if bottom else None
    return parse_number(text)


def _value(expression: Any) -> float | None:
    """The value of a real number; None for all else."""
    if not (getattr(expression, "is_number", False) and getattr(expression, "is_real", False)):
        return None
    value = float(expression.evalf(20))
    return value if abs(value) < 1e9 else None  # beyond, 20 digits of a cancelling sum may not be enough


@lru_cache(maxsize=8192)
def _parse(text: str) -> Any:
    """The sympy expression of LaTeX or plain notation; None where it is none, or not a safe one."""
    if not _is_safe(text) or _is_words(text):
        return None
    # sympy takes most of a second to import, and most reward files need none of it
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=0)
    return found[0] if found else None


def _latex(text: str) -> str:
    """Typed signs as LaTeX, degrees left out, as 30 and 30° are one answer."""
    text = _PI.sub(r"\\pi ", _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", _DEGREES.sub("", text)))
    return text.translate(_TYPED).replace("$", " ").strip()


def _is_words(text: str) -> bool:
    bare = _COMMAND.sub(" ", text)
    return any(word.lower() not in _FUNCTIONS for word in _WORD.findall(bare))


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
    if len(powers) != text.count("^") + text.count("**"):  # an exponent with braces in it: a tower
        return False
    for power in powers:
        exponent = (power["braced"] if power["braced"] is not None else power["plain"]).strip()
        if "^" in exponent or "**" in exponent or text[power.end() :].lstrip().startswith(("^", "**")):
            return False
        largest = max((int(n) for n in re.findall(r"[0-9]{1,6}", exponent)), default=1)
        if power["base"] and largest <= 200:  # 2^{100} is one number
            continue
        total += largest
    return total <= _MOST_POWER
