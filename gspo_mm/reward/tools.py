"""A reward part of how an answer used its tools: tool_calls. See `part.py` for the contract of a part."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from gspo_mm.environment.calls import CallError, read_calls
from gspo_mm.reward.part import Args
from gspo_mm.types import Completion, Json

_ERROR = "Error: "  # how image_tools begins what it says of a call that cannot be done


class ToolCallArgs(Args):
    least: Annotated[int, Field(ge=0)] = 0  # calls of an answer
    most: Annotated[int, Field(ge=0)] | None = None  # null: no bound
    valid: bool = True  # every call must be one that can be read, and that was not answered with an error

    @model_validator(mode="after")
    def _bounds(self) -> ToolCallArgs:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most={self.most} is below least={self.least}")
        return self


def tool_calls(text: str, answer: Json, args: ToolCallArgs, *, completion: Completion) -> float:
    """1 where all turns together have so many calls."""
    count, wrong = 0, 0
    for turn in completion.turns:
        try:
            count += len(read_calls(turn.text))
        except CallError:
            wrong += 1
        wrong += turn.observation is not None and turn.observation.text.startswith(_ERROR)
    fits = args.least <= count and (args.most is None or count <= args.most)
    return float(fits and not (args.valid and wrong))
