"""What an environment is. `gspo_mm/environment/README.md` has two that are written from nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from gspo_mm.types import EncodedImage, Look, Prompt, Turn


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What comes back to the model after a turn: pictures, encoded or not, and then a text."""

    text: str = ""
    images: Sequence[Image.Image | bytes] = ()
    look: Look | None = None  # what the turn asked to see, for the report to draw


class Environment(Protocol):
    """Made once in each worker process, by `rollout.environment.python` with `rollout.environment.args`.

    One instance serves the turns of many answers, and those of one answer may come to several: what is to be known of an
    answer is in its turns. An environment that has to remember more is a server (`type: http`), or keeps it elsewhere under
    `session()`.

    An attribute `tools`, if there is one, is a list of JSON schemas of functions as chat templates take them. With
    `shows_pages = True` it shows a sample's `pages`, which are refused otherwise.
    """

    async def step(self, prompt: Prompt, turns: Sequence[Turn]) -> Feedback | None:
        """After the last of `turns`, which ended with a stop token. None: the answer is complete."""
        ...


SESSION: ContextVar[str] = ContextVar("SESSION", default="")


def session() -> str:
    """In `step`: the name of the answer whose turn it is, which no other answer has."""
    return SESSION.get()


SIZES: ContextVar[Mapping[str, tuple[int, int]]] = ContextVar("SIZES")  # by EncodedImage.key


def size_seen(image: EncodedImage) -> tuple[int, int]:
    """In `step`: width and height, in pixels, that a picture of the answer was resized to for the model."""
    return SIZES.get()[image.key]
