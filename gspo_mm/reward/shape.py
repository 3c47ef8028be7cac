"""Reward parts of how an answer is written: length, overlong, repetition, language.

They judge the whole response, whatever the prompt's answer is. See `part.py` for the contract of a part.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal

import regex
from pydantic import Field, field_validator, model_validator

from gspo_mm.reward.part import Args
from gspo_mm.types import Json

_WORD = regex.compile(r"\w+")
# letters that belong to a script: ª and ー are common to several
_LETTER = regex.compile(r"[\p{L}--[\p{Script=Common}\p{Script=Inherited}]]", regex.V1)


class LengthArgs(Args):
    min: Annotated[int, Field(ge=0)] = 0  # tokens
    max: Annotated[int, Field(ge=1)] | None = None  # tokens; null: no bound
    margin: Annotated[int, Field(ge=0)] = (
        0  # tokens beyond a bound where the value has fallen to 0; 0: at once
    )

    @model_validator(mode="after")
    def _bounds(self) -> LengthArgs:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}")
        return self


class OverlongArgs(Args):
    max_tokens: Annotated[int, Field(ge=1)]  # L_max: rollout.sampling.max_new_tokens, or less
    cache: Annotated[int, Field(ge=1)]  # L_cache: the last tokens before it, over which the penalty grows

    @model_validator(mode="after")
    def _fits(self) -> OverlongArgs:
        if self.cache > self.max_tokens:
            raise ValueError(f"cache={self.cache} is above max_tokens={self.max_tokens}")
        return self


class RepetitionArgs(Args):
    ngram: Annotated[int, Field(ge=1)] = 4
    unit: Literal["word", "character"] = "word"  # character: for scripts without spaces


class LanguageArgs(Args):
    # Unicode names: Latin, Han, Hiragana, Cyrillic, Arabic ...
    scripts: Annotated[list[str], Field(min_length=1)]
    at_least: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # a smaller share counts as none

    @field_validator("scripts")
    @classmethod
    def _known(cls, scripts: list[str]) -> list[str]:
        for script in scripts:
            try:
                _script_letter((script,))
            except regex.error:
                raise ValueError(
                    f"{script!r} is no Unicode script; use such as Latin, Han, Cyrillic"
                ) from None
        return scripts


def length(text: str, answer: Json, args: LengthArgs, *, tokens: int) -> float:
    """1 for `min` to `max` response tokens, falling in a straight line to 0 at `margin` tokens outside."""
    outside = max(args.min - tokens, 0 if args.max is None else tokens - args.max, 0)
    return max(0.0, 1.0 - outside / args.margin) if args.margin else float(outside == 0)


def overlong(text: str, answer: Json, args: OverlongArgs, *, tokens: int) -> float:
    """The soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), a penalty from 0 to -1.

    0 up to L_max - L_cache tokens; then ((L_max - L_cache) - tokens) / L_cache; -1 beyond L_max. Use `combine: sum`.
    """
    free = args.max_tokens - args.cache
    if tokens <= free:
        return 0.0
    return -1.0 if tokens > args.max_tokens else (free - tokens) / args.cache


def repetition(text: str, answer: Json, args: RepetitionArgs) -> float:
    """Different n-grams as a share of all: 1 where nothing is said twice; 1 for texts shorter than one n-gram."""
    units = _WORD.findall(text.casefold()) if args.unit == "word" else "".join(text.split())
    ngrams = [tuple(units[i : i + args.ngram]) for i in range(len(units) - args.ngram + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def language(text: str, answer: Json, args: LanguageArgs) -> float:
    """Letters of the wanted scripts as a share of all letters; 1 without letters. It knows scripts, no languages."""
    letters = len(_LETTER.findall(text))
    share = len(_script_letter(tuple(args.scripts)).findall(text)) / letters if letters else 1.0
    return share if share >= args.at_least else 0.0


@lru_cache(maxsize=64)
def _script_letter(scripts: tuple[str, ...]) -> regex.Pattern[str]:
    any_script = "".join(rf"\p{{Script={script}}}" for script in scripts)
    return regex.compile(rf"[\p{{L}}&&[{any_script}]]", regex.V1)
