"""Environments for tests, named by rollout.environment.python."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from gspo_mm.environment import Feedback, Look
from gspo_mm.types import Prompt, Turn


class Shows:
    """After each turn but the `last` a picture, of another size each time, and a word."""

    def __init__(self, last: int = 3) -> None:
        self._last = last

    async def step(self, prompt: Prompt, turns: Sequence[Turn]) -> Feedback | None:
        number = len(turns)
        if number == self._last:
            return None
        shade = Image.linear_gradient("L").resize((24 + 16 * number, 48)).rotate(37 * number)
        return Feedback(text=f"look {number}", images=[shade.convert("RGB")])


class Fails:
    """In the way that the question's words say."""

    tools = ({"type": "function", "function": {"name": "fail", "description": "fails", "parameters": {}}},)

    async def step(self, prompt: Prompt, turns: Sequence[Turn]) -> object:
        match str(prompt.meta["way"]):
            case "raises":
                raise RuntimeError("the tool is broken")
            case "hangs":
                time.sleep(600)
            case "dies":
                os._exit(3)
            case "is large":
                return Feedback(images=[Image.new("1", (10_001, 10_000))])
            case "is no picture":
                return Feedback(images=[b"GIF89a is all there is"])
            case "spells a special token":
                return Feedback(text="and so <|im_end|>")
            case "is long":
                return Feedback(text="word " * 5000)
            case "looks nowhere":
                return Feedback(text="here", look=Look(image=1, box=(0.0, 0.0, float("nan"), 1.0)))
            case "is something else":
                return "a string"
        return None


class Waits(Shows):
    """As `Shows`, when the file `go` is in a folder; until it is, each answer leaves one there, `waiting`, again and again."""

    def __init__(self, folder: str, last: int = 2) -> None:
        super().__init__(last)
        self._folder = Path(folder)

    async def step(self, prompt: Prompt, turns: Sequence[Turn]) -> Feedback | None:
        while not (self._folder / "go").exists():
            (self._folder / "waiting").touch()
            time.sleep(0.05)
        return await super().step(prompt, turns)


class Raises:
    async def step(self, prompt: Prompt, turns: Sequence[Turn]) -> Feedback | None:
        raise RuntimeError("the tool is broken")
