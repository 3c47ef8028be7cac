"""Reward parts of text read in an image: anls, cer, wer. See `part.py` for the contract of a part.

Edit distances are rapidfuzz's, which stops counting where the result can no longer matter.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from rapidfuzz.distance import Levenshtein

from gspo_mm.reward.part import Args, alternatives
from gspo_mm.types import Json


class AnlsArgs(Args):
    at_least: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5  # a smaller similarity counts as none
    ignore_case: bool = True


class ErrorRateArgs(Args):
    ignore_case: bool = False


def anls(text: str, answer: Json, args: AnlsArgs) -> float:
    """Average normalised Levenshtein similarity of one question (arXiv 1907.00490, eq. 1): the best of the answers.

    1 - distance / length of the longer; 0 below `at_least`, so that a wrong word of the right length earns nothing.
    """
    given = _plain(text, args.ignore_case)
    similarities = [_similarity(given, _plain(a, args.ignore_case)) for a in alternatives(answer)]
    best = max(similarities)
    return best if best >= args.at_least else 0.0


def cer(text: str, answer: Json, args: ErrorRateArgs) -> float:
    """1 - character error rate, at least 0: wrong, missing and added characters by the answer's length."""
    given = _plain(text, args.ignore_case)
    return max(_right_share(given, _plain(each, args.ignore_case)) for each in alternatives(answer))


def wer(text: str, answer: Json, args: ErrorRateArgs) -> float:
    """1 - word error rate, at least 0; words are what stands between white space."""
    given = _plain(text, args.ignore_case).split()
    return max(_right_share(given, _plain(each, args.ignore_case).split()) for each in alternatives(answer))


def _similarity(given: str, wanted: str) -> float:
    longer = max(len(given), len(wanted))
    if longer > 10 * len(wanted):  # a similarity below 0.1, which a long text would take long to measure
        return 0.0
    return 1.0 - Levenshtein.distance(given, wanted) / longer


def _right_share(given: Sequence[str], wanted: Sequence[str]) -> float:
    errors = Levenshtein.distance(given, wanted, score_cutoff=len(wanted))  # from there on the share is 0
    return max(0.0, 1.0 - errors / len(wanted))


def _plain(text: str, ignore_case: bool) -> str:
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if ignore_case else text
