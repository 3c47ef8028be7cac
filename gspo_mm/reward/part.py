"""What a reward part is, and what it may ask for besides the text.

A part takes the (extracted) response text, the prompt's answer and its `args`, and returns a value in [0, 1].
Whatever the text holds, the result is a value: a wrong or garbled response scores 0. An *answer* that the
part cannot use is a fault of the data and raises ValueError, whatever the text is: so a part is asked whether it can
judge an answer by giving it an empty text, before training. A part that asks somebody else over the network is a
`Service`.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from gspo_mm.reward.pattern import BOXED, delimited
from gspo_mm.types import Completion, Json, Prompt

_FENCE = re.compile(r"```(?:json)?(.*)```", re.DOTALL)


class Args(BaseModel):
    """Base of the `args` of a part: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Service(Protocol):
    """A part that waits for others: it runs in the event loop that scores, not in a worker process."""

    async def judge(self, text: str, prompt: Prompt, completion: Completion) -> float:
        """A value as of any part; `text` is the extracted answer, never empty. What it raises is a failed reward."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class PartType:
    """A kind of reward part: a function, or for what takes a service the class that asks it."""

    args: type[Args]
    # (text, prompt's answer, args, one keyword per name in `context`) -> value
    judge: Callable[..., float] | None = None
    service: Callable[..., Service] | None = None  # (args) -> Service; opens nothing yet, raises ValueError
    whole_text: bool = False  # judges the completion's text as it is, not the extracted answer
    context: tuple[str, ...] = ()  # names in CONTEXT
    lowest: float = 0.0  # of its values, up to 1; below 0 it is a penalty
    # a text that is the answer word for word, or one of a list, gives 1, whatever else the part thinks of it
    compares: bool = False
    json_answer: bool = False  # an answer that is the text of JSON is what it holds
    # (prompt) -> None, raises for an answer that cannot be judged; null: the part judges an empty text instead
    check: Callable[[Prompt], object] | None = None


def count_tokens(prompt: Prompt, completion: Completion) -> int:
    """Response tokens, the stop token included."""
    if completion.text and not completion.token_ids:
        raise ValueError("the number of tokens is not known; give the sample its `tokens`")
    return len(completion.token_ids)


def image_size(prompt: Prompt, completion: Completion) -> tuple[int, int] | None:
    """Width and height in pixels of the prompt's image; None unless it has exactly one."""
    if len(prompt.images) != 1:
        return None
    return prompt.images[0].width, prompt.images[0].height


# What a part may ask for.
CONTEXT: dict[str, Callable[[Prompt, Completion], Any]] = {
    "tokens": count_tokens,
    "size": image_size,
    "meta": lambda prompt, completion: prompt.meta,
    "prompt": lambda prompt, completion: prompt,
    "completion": lambda prompt, completion: completion,
}


def parse_json(text: str) -> Json:
    """The JSON value that the text is, fenced or not; a key given twice is an error, as two answers are none.

    Raises ValueError for anything else.
    """
    text = text.strip()
    fenced = _FENCE.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def alternatives(answer: Json) -> list[str]:
    """The answers that are right: one text or number, or a list of them. Raises ValueError for anything else."""
    values = answer if isinstance(answer, list) else [answer]
    usable = [text for value in values if (text := written(value)) is not None]
    if not values or len(usable) != len(values):
        raise ValueError(f"answer {answer!r} is no text or number to compare with, and no list of them")
    return usable


def written(answer: Json) -> str | None:
    """The text of a text or number; a float in exact decimals, as 5e-05 is 0.00005. None for what is neither, or blank."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    if isinstance(answer, float):
        return format(Decimal(repr(answer)), "f") if math.isfinite(answer) else None
    return str(answer) if str(answer).strip() else None


def bare_answer(answer: Json, pattern: str | None) -> Json:
    r"""The data's answer without the marks of a response: `<answer> 3 </answer>` and `\boxed{3}` are 3.

    `pattern` is how responses state theirs (`extract`). Raises ValueError where the marks hold two different answers.
    """
    if isinstance(answer, list):
        return [bare_answer(each, pattern) for each in answer]
    if not isinstance(answer, str):
        return answer
    for marks in (pattern, "<answer>(.*?)</answer>", BOXED):
        if marks and (stated := delimited(answer, marks)):
            if len(stated) > 1:
                raise ValueError(f"answer {answer!r} states {len(stated)} different answers")
            return stated.pop()
    return answer


def as_json(answer: Json) -> Json:
    """What an answer that is the text of JSON holds; any other answer as it is."""
    try:
        return parse_json(answer) if isinstance(answer, str) else answer
    except ValueError:
        return answer


def is_word_for_word(text: str, answer: Json) -> bool:
    """Whether the text is the answer, or one of several, up to white space and Unicode composition (NFC)."""
    each = answer if isinstance(answer, list) else [answer]
    return _plain(text) in {_plain(wanted) for value in each if (wanted := written(value)) is not None}


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice, so two answers are")
    return dict(pairs)
