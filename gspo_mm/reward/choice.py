"""The reward part of multiple choice: choice. See `part.py` for the contract of a part."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from gspo_mm.reward.part import Args, written
from gspo_mm.reward.text import normalise
from gspo_mm.types import Json

_LONGEST = 2000  # characters; a longer text is no choice
_MARKS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\s*(?=\{)|[*_`$\\{}]")  # of Markdown and LaTeX
_LONE_LETTER = re.compile(r"(?<![^\W_])[A-Z](?![^\W_]|['’][a-z]|[+#*])")
_ONLY_LETTER = re.compile(r"\s*(?:option\s+)?[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:]?\s*", re.IGNORECASE)
_LETTER_AND_TEXT = re.compile(r"\s*[(\[]?([A-Za-z])(?:[)\]]\s*[.:,-]?|\s*[.:,-])\s+(\S.*)", re.DOTALL)
# of sentences; others, as in C++, C# and a-b, tell options apart
_PUNCTUATION = str.maketrans("", "", "".join(set(string.punctuation) - set("+-#^=<>/%*&|~@\\")))
_DENIAL = re.compile(r"\b(?:not|neither|nor|except|isn't|cannot)\b", re.IGNORECASE)


class ChoiceArgs(Args):
    # letters of the options; without I, which is a word as well
    letters: Annotated[str, Field(pattern=r"^[A-Z]{2,26}$")] = "ABCDEFGH"
    options: str | None = (
        None  # key of the sample's metadata that lists the options' texts; null: letters only
    )


def choice(text: str, answer: Json, args: ChoiceArgs, *, meta: Mapping[str, Json]) -> float:
    """1 where the text states the right option and no other, by its letter, its text, or both.

    `B`, `(b)`, `B. Paris`, `Paris`, `The answer is B` state B. All letters listed, two letters, a letter with the
    text of another option, or `not B` state none. `answer` is a letter or the text of an option. Where the options
    are letters themselves, a letter alone is that of the list, in the text and in the answer: only `B. A` has both.
    """
    options = _options(meta, args)
    letters = args.letters[: len(options)] if options else args.letters
    wanted = _letter_of(written(answer) or "", letters, options)
    if wanted is None:
        known = " and ".join([letters[0] + "-" + letters[-1], *(["the texts in meta"] if options else [])])
        raise ValueError(f"answer {answer!r} is none of the options ({known})")
    return float(stated_letters(text, letters, options) == {wanted})


def stated_letters(text: str, letters: str, options: Sequence[str] = ()) -> set[str]:
    """The options that the text states, as their letters."""
    if len(text) > _LONGEST:
        return set()
    # first as it is: the text of an option may hold Markdown or LaTeX
    for plain in (text, " ".join(_MARKS.sub(" ", text).split())):
        whole = _letter_of(plain, letters, options)
        if whole is not None:
            return {whole}
        both = _LETTER_AND_TEXT.fullmatch(plain)
        if both and options and both[1].upper() in letters:
            named = _by_text(both[2], letters, options)
            if named is not None:
                return {both[1].upper(), named}
    if _DENIAL.search(plain):
        return set()
    return {c for c in _LONE_LETTER.findall(plain) if c in letters} | _mentioned(plain, letters, options)


def _letter_of(text: str, letters: str, options: Sequence[str]) -> str | None:
    """The option that the whole text is: by its letter, else by its text."""
    only = _ONLY_LETTER.fullmatch(text)
    return only[1].upper() if only and only[1].upper() in letters else _by_text(text, letters, options)


def _by_text(text: str, letters: str, options: Sequence[str]) -> str | None:
    """The one option of that text: to the letter, else up to case, else up to punctuation."""
    for form in (str.split, lambda each: each.casefold().split(), _norm):
        same = [
            letter for letter, option in zip(letters, options, strict=False) if form(option) == form(text)
        ]
        if len(same) == 1 and text.strip() and form(text):
            return same[0]
    return None


def _mentioned(text: str, letters: str, options: Sequence[str]) -> set[str]:
    """Options whose text stands in the text as whole words, but not only inside a longer option's."""
    rest = f" {_norm(text)} "
    found = set()
    for letter, option in sorted(zip(letters, options, strict=False), key=lambda pair: -len(_norm(pair[1]))):
        words = f" {_norm(option)} "
        # an option that is a single letter is no text to look for: its letter is another's name
        if len(words) > 3 and words in rest:
            found.add(letter)
            rest = rest.replace(words, " | ")
    return found


def _norm(text: str) -> str:
    """As `normalise`, but that signs count where they tell options apart."""
    words = unicodedata.normalize("NFC", text).casefold().split()
    words = [
        normalise(word, articles=True) if any(c.isdigit() for c in word) else word.translate(_PUNCTUATION)
        for word in words
    ]
    return " ".join(word for word in words if word.strip("-*"))


def _options(meta: Mapping[str, Json], args: ChoiceArgs) -> list[str]:
    if args.options is None:
        return []
    options = meta.get(args.options)
    if not isinstance(options, list) or not all(isinstance(o, str | int | float) for o in options):
        raise ValueError(f"meta.{args.options}={options!r} lists no options")
    if len(options) > len(args.letters):
        raise ValueError(f"meta.{args.options} lists {len(options)} options for the letters {args.letters}")
    return [written(option) or str(option) for option in options]
