"""What a reward part is, and what it may ask for besides the text.

A part takes the (extracted) response text, the prompt's answer and its `args`, and returns a value in [0, 1].
Whatever the text holds, the result is a value: a wrong or garbled response scores 0. An *answer* that the
part cannot use is a fault of the data and raises ValueError. A part that asks somebody else over the network is a
`Service`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

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
    usable = [v for v in values if isinstance(v, str | int | float) and not isinstance(v, bool)]
    if not values or len(usable) != len(values) or not all(str(v).strip() for v in usable):
        raise ValueError(f"answer {answer!r} is no text or number to compare with, and no list of them")
    return [str(v) for v in usable]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice, so two answers are")
    return dict(pairs)
