"""A part that is a function of the user's: `python: package.module:function`.

    def judge(text: str | None, prompt: Prompt, completion: Completion, **args) -> float

`text` is the answer that `extract` found, None where none is stated. `prompt.answer` and `prompt.meta` are the
data's, `completion.text` and `completion.token_ids` the whole response, `completion.turns` its turns with what came back
after each. The value is in [-1, 1].

A function `check_judge(prompt, **args)` beside it, if there is one, raises ValueError for an answer or metadata that
`judge` cannot use: such samples are found before training.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict

from gspo_mm.reward.part import Args, PartType
from gspo_mm.reward.pattern import extract_answer
from gspo_mm.runtime.named import function_named
from gspo_mm.types import Completion, Json, Prompt


class UserArgs(Args):
    """Whatever the function takes."""

    model_config = ConfigDict(extra="allow")


def user_part(path: str, args: Mapping[str, Any], pattern: str | None) -> PartType:
    """Import the function. Raises ValueError saying what is wrong with `path` or `args`."""
    function = function_named(path)
    try:
        inspect.signature(function).bind("", None, None, **args)
    except TypeError as error:
        raise ValueError(f"called as function(text, prompt, completion, **args) it fails: {error}") from None

    module, _, name = path.partition(":")
    usable = getattr(importlib.import_module(module), f"check_{name}", None)

    def judge(whole: str, answer: Json, _: Args, *, prompt: Prompt, completion: Completion) -> float:
        value = function(extract_answer(whole, pattern) or None, prompt, completion, **args)
        if not isinstance(value, bool | int | float):
            raise TypeError(f"{path} returned {value!r}, which is no number")
        return float(value)

    return PartType(
        judge=judge,
        args=UserArgs,
        whole_text=True,
        context=("prompt", "completion"),
        lowest=-1.0,
        check=None if usable is None else lambda prompt: usable(prompt, **args),
    )
