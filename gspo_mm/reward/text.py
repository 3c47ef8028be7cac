"""Reward parts that compare texts and numbers: exact, normalised, number, relaxed, count, format.

See `part.py` for the contract of a part.
"""

from __future__ import annotations

import re
import string
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field, field_validator

from gspo_mm.reward.part import Args, alternatives, written
from gspo_mm.reward.pattern import compile_pattern, matches
from gspo_mm.types import Json

# ASCII digits only: Python's own parsers also take Arabic-Indic or full-width digits, and an answer in a
# script that nobody asked for is not the answer. No exponents: 1e999999 would cost memory without end.
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_LONGEST_NUMBER = 40  # characters; longer ones are babble, and Python refuses to parse some of them
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
)
_NUMBER_WORDS = {word: i for i, word in enumerate((_WORDS + " seventeen eighteen nineteen twenty").split())}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactArgs(Args):
    ignore_case: bool = False


class NormalisedArgs(Args):
    articles: bool = False  # true: a, an and the count


class NumberArgs(Args):
    tolerance: Annotated[float, Field(ge=0.0)] = 0.0  # largest accepted absolute difference
    relative: Annotated[float, Field(ge=0.0)] = 0.0  # as a share of the answer; the larger of the two counts
    # unit before or after the number -> what it is worth: {cm: 1, mm: 0.1} or {"%": 0.01}; others are wrong
    units: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default_factory=dict)
    decimal: Literal[".", ","] = "."  # the decimal sign of the text; the other one separates thousands
    unicode_digits: bool = False  # true: digits of all scripts are digits, and − is a minus

    @field_validator("units")
    @classmethod
    def _no_digits(cls, units: dict[str, float]) -> dict[str, float]:
        for unit in units:
            if not unit or unit != unit.strip() or any(c.isdigit() or c in "+-.," for c in unit):
                raise ValueError(f"unit {unit!r} reads as part of a number; write such as cm, % or $")
        return units


class RelaxedArgs(NumberArgs):
    relative: Annotated[float, Field(ge=0.0)] = 0.05  # of arXiv 2203.10244
    years_exact: bool = True  # whole answers from 1500 to 2100 are years: 5 % of them would be a century
    articles: bool = False


class CountArgs(Args):
    slack: Annotated[float, Field(ge=0.0)] = (
        0.0  # relative error where the credit has fallen to 0; 0: only exact
    )


class FormatArgs(Args):
    pattern: str  # regular expression that the whole text must match; `.` matches line ends

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        compile_pattern(pattern)
        return pattern


def exact(text: str, answer: Json, args: ExactArgs) -> float:
    """1 where text and answer are equal, up to white space and Unicode composition (NFC)."""
    wanted = written(answer)
    if wanted is None:
        raise ValueError(f"answer {answer!r} is no text or number to compare with")
    return float(_plain(text, args) == _plain(wanted, args))


def normalised(text: str, answer: Json, args: NormalisedArgs) -> float:
    """1 where the text is one of the answers, up to case, ASCII punctuation, articles and white space.

    As SQuAD compares (arXiv 1606.05250), but that a sign or decimal point of a number counts: -5 is not 5.
    """
    wanted = {normalise(each, articles=args.articles) for each in alternatives(answer)}
    return float(normalise(text, articles=args.articles) in wanted)


def number(text: str, answer: Json, args: NumberArgs) -> float:
    """1 where the text is a number (7, -1.50, 1,234) within the tolerance of the answer, as exact fractions.

    An answer that is text may carry a unit as well; one that is a number is in the unit worth 1.
    """
    wanted = answer_number(answer, args)
    if wanted is None:
        raise ValueError(f"answer {answer!r} is no number")
    return float(_close(text, wanted, args))


def relaxed(text: str, answer: Json, args: RelaxedArgs) -> float:
    """The relaxed accuracy of ChartQA (arXiv 2203.10244): a number within 5 %, any other answer normalised.

    Years are exact unless `years_exact` is false, as it is in the paper.
    """
    wanted = None if isinstance(answer, list) else answer_number(answer, args)
    if wanted is None:
        return normalised(text, answer, NormalisedArgs(articles=args.articles))
    is_year = args.years_exact and wanted.denominator == 1 and 1500 <= wanted <= 2100
    return float(_close(text, wanted, args.model_copy(update={"relative": 0.0}) if is_year else args))


def count(text: str, answer: Json, args: CountArgs) -> float:
    """1 where the text is the count, in digits or as a word up to twenty; with `slack` less, the further away."""
    wanted = _count(written(answer) or "")
    if wanted is None:
        raise ValueError(f"answer {answer!r} is no count: a whole number from 0 on")
    given = _count(text)
    if given is None or given == wanted:
        return float(given == wanted)
    reach = args.slack * wanted
    return max(0.0, 1.0 - abs(given - wanted) / reach) if reach else 0.0


def format_(text: str, answer: Json, args: FormatArgs) -> float:
    """1 where the whole text, as the model wrote it, matches the pattern."""
    return float(matches(args.pattern, text))


def parse_number(text: str) -> Fraction | None:
    """The number that the text is; None for anything else: two numbers, a unit, an exponent, nan."""
    text = text.strip()
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def answer_number(answer: Json, args: NumberArgs) -> Fraction | None:
    """The data's answer as a number in the unit worth 1; None where it is none."""
    if isinstance(answer, float) and answer - answer == 0:  # finite
        return Fraction(repr(answer))
    if isinstance(answer, str | int) and not isinstance(answer, bool):
        return parse_quantity(str(answer), args.units)
    return None


def parse_quantity(text: str, units: dict[str, float]) -> Fraction | None:
    """The number that the text is, with at most one of `units` before or after it, in the unit worth 1."""
    text = text.strip()
    for unit, worth in units.items():
        if text.endswith(unit):
            bare = text.removesuffix(unit)
        elif text.startswith(unit):
            bare = text.removeprefix(unit)
        elif text.startswith(("-" + unit, "+" + unit)):
            bare = text[0] + text[1:].removeprefix(unit)
        else:
            continue
        value = parse_number(bare)
        if value is not None:
            return value * Fraction(repr(worth))
    return parse_number(text)


def ascii_digits(text: str) -> str:
    """Digits of all scripts as 0-9, and the mathematical minus as the hyphen."""
    return "".join("-" if c == "\u2212" else str(unicodedata.decimal(c, c)) for c in text)


def normalise(text: str, *, articles: bool = False) -> str:
    """Lower case, no ASCII punctuation, no a, an, the; within a word with digits all signs count: 3-4 is not 34."""
    words = [_bare(word) for word in unicodedata.normalize("NFC", text).casefold().split()]
    words = [word for word in words if word]
    return " ".join([word for word in words if articles or word not in ("a", "an", "the")] or words)


def _bare(word: str) -> str:
    if not any(c.isdigit() for c in word):
        return word.translate(_NO_PUNCTUATION)
    word = word.lstrip("\"'([{*_$").rstrip("\"')]}*_%.,;:!?")
    value = parse_number(word)
    return word if value is None else str(value)


def _close(text: str, wanted: Fraction, args: NumberArgs) -> bool:
    if len(text) > 4 * _LONGEST_NUMBER:
        return False
    if args.unicode_digits:
        text = ascii_digits(text)
    if args.decimal == ",":
        text = text.translate(str.maketrans(",.", ".,"))
    given = parse_quantity(text, args.units)
    if given is None:
        return False
    return abs(given - wanted) <= max(_fraction(args.tolerance), _fraction(args.relative) * abs(wanted))


def _count(text: str) -> int | None:
    value = parse_number(text)
    if value is None:
        return _NUMBER_WORDS.get(text.strip().lower())
    return int(value) if value.denominator == 1 and value >= 0 else None


@lru_cache(maxsize=256)
def _fraction(value: float) -> Fraction:
    return Fraction(repr(value))


def _plain(text: str, args: ExactArgs) -> str:
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if args.ignore_case else text
