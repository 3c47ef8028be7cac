"""Samples written by hand: the `cases:` of a reward file, with the scores that they must get."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gspo_mm.types import Completion, EncodedImage, Finish, Prompt, Score

_CLOSE = 1e-4  # so that a third may be written as 0.3333


class Sample(BaseModel):
    """An answer of the data, a response to it, and what a part may ask for besides."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    answer: Any
    response: str
    task: str
    question: str = ""  # for parts that read it
    tokens: Annotated[int, Field(ge=0)] | None = None  # of the response; for parts that count them
    size: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None  # of the image: width, height
    meta: dict[str, Any] = {}  # as in the sample's JSON

    def prompt(self, key: str) -> Prompt:
        images = ()
        if self.size is not None:
            images = (EncodedImage(data=b"", key="", width=self.size[0], height=self.size[1]),)
        messages = ({"role": "user", "content": self.question},) if self.question else ()
        return Prompt(
            key=key, messages=messages, images=images, answer=self.answer, task=self.task, meta=self.meta
        )

    def completion(self) -> Completion:
        tokens = self.tokens or 0
        return Completion.of_one_turn(
            token_ids=(0,) * tokens,
            logprobs=(0.0,) * tokens,
            versions=(0,) * tokens,
            finish=Finish.STOP,
            text=self.said(),
        )

    def said(self) -> str:
        return self.response


class Case(Sample):
    """One entry of `cases:`."""

    score: Annotated[float, Field(allow_inf_nan=False)]  # the reward it must get, within 0.0001
    parts: dict[str, float] = {}  # values that its parts must give; those not named are free
    accuracy: bool | None = None  # whether it must count as correct; null: free
    repeat: Annotated[int, Field(ge=1)] = 1  # the response is this text, so many times: for very long ones
    about: str = ""  # what it shows

    def said(self) -> str:
        return self.response * self.repeat


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A case and what it got."""

    case: Case
    score: Score

    @property
    def faults(self) -> list[str]:
        """What differs from what the case says; empty where it passes."""
        if self.score.error is not None:
            return [self.score.error]
        faults = []
        if not math.isclose(self.score.value, self.case.score, abs_tol=_CLOSE):
            faults.append(f"score {self.score.value:g}, not {self.case.score:g}")
        for name, wanted in self.case.parts.items():
            got = self.score.parts.get(name)
            if got is None or not math.isclose(got, wanted, abs_tol=_CLOSE):
                faults.append(f"{name} {'absent' if got is None else format(got, 'g')}, not {wanted:g}")
        if self.case.accuracy is not None and self.score.accuracy != self.case.accuracy:
            faults.append(f"accuracy {self.score.accuracy}, not {float(self.case.accuracy):g}")
        return faults
