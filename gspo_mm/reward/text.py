"""Reward parts that judge text: exact, number, format.

A part takes the (extracted) response text, the prompt's answer and its `args`, and returns a value in [0, 1].
Whatever the text holds, the result is a value: a wrong or garbled response scores 0. An *answer* that the
part cannot use is a fault of the data and raises ValueError.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gspo_mm.types import Json

# ASCII digits only: Python's own parsers also take Arabic-Indic or full-width digits, and an answer in a
# script that nobody asked for is not the answer. No exponents: 1e999999 would cost memory without end.
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_LONGEST_NUMBER = 40  # characters; longer ones are babble, and Python refuses to parse some of them


class Args(BaseModel):
    """Base of the `args` of a part: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ExactArgs(Args):
    ignore_case: bool = False


class NumberArgs(Args):
    tolerance: Annotated[float, Field(ge=0.0)] = 0.0  # largest accepted absolute difference


class FormatArgs(Args):
    pattern: str  # regular expression that the whole text must match; `.` matches line ends

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        compile_pattern(pattern)
        return pattern


def exact(text: str, answer: Json, args: ExactArgs) -> float:
    """1 where text and answer are equal, up to white space and Unicode composition (NFC)."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"answer {answer!r} is no text or number to compare with")
    return float(_plain(text, args) == _plain(str(answer), args))


def number(text: str, answer: Json, args: NumberArgs) -> float:
    """1 where the text is a number (7, -1.50, 1,234) within `tolerance` of the answer, as exact fractions."""
    wanted = (
        parse_number(str(answer)) if isinstance(answer, str | int) and not isinstance(answer, bool) else None
    )
    if isinstance(answer, float) and answer - answer == 0:  # finite
        wanted = Fraction(repr(answer))
    if wanted is None:
        raise ValueError(f"answer {answer!r} is no number")
    given = parse_number(text)
    return float(given is not None and abs(given - wanted) <= Fraction(repr(args.tolerance)))


def format_(text: str, answer: Json, args: FormatArgs) -> float:
    """1 where the whole text, as the model wrote it, matches the pattern."""
    return float(compile_pattern(args.pattern).fullmatch(text) is not None)


def parse_number(text: str) -> Fraction | None:
    """The number that the text is; None for anything else: two numbers, a unit, an exponent, nan."""
    text = text.strip()
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile with `.` matching line ends; raises ValueError saying what is wrong."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None


def _plain(text: str, args: ExactArgs) -> str:
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if args.ignore_case else text
