"""Which sound prompts a run does not want: by image size, by difficulty, and because they are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from gspo_mm.config import CurriculumConfig, DataConfig
from gspo_mm.data.faults import BadSample, LeftOut
from gspo_mm.types import Prompt


class Filter:
    """The limits of a split. Difficulty is limited in training only."""

    def __init__(self, config: DataConfig, *, training: bool) -> None:
        self._config = config
        self._curriculum = config.curriculum if training else None
        self._held_out: frozenset[str] = frozenset()

    def hold_out(self, prompts: Iterable[Prompt]) -> None:
        """Let none of these through, under whatever key they come."""
        self._held_out = frozenset(fingerprint(prompt) for prompt in prompts)

    def check(self, prompt: Prompt, samples_read: int) -> None:
        """Raises LeftOut when the prompt is not wanted; BadSample when it lacks its difficulty, or is held out."""
        low, high = self._config.min_image_pixels, self._config.max_image_pixels
        for image in prompt.pictures:
            pixels, sides = image.width * image.height, sorted((image.width, image.height))
            if not low <= pixels <= high:
                raise LeftOut("image size", f"{pixels} pixels, wanted are {low} to {high}")
            if sides[1] > self._config.max_aspect_ratio * sides[0]:
                raise LeftOut("aspect ratio", f"{image.width}x{image.height} pixels")
        if self._curriculum:
            _check_difficulty(self._curriculum, prompt, samples_read)
        if self._held_out and fingerprint(prompt) in self._held_out:
            raise BadSample("held out", "data.validation has the same messages with the same images")


def fingerprint(prompt: Prompt) -> str:
    """SHA-256 of what the model is shown. Keys say nothing: two data sets both begin with 000000."""
    shown = json.dumps([prompt.messages, [image.key for image in prompt.pictures]], sort_keys=True)
    return hashlib.sha256(shown.encode()).hexdigest()


def _check_difficulty(curriculum: CurriculumConfig, prompt: Prompt, samples_read: int) -> None:
    difficulty = prompt.meta.get(curriculum.key)
    if isinstance(difficulty, bool) or not isinstance(difficulty, int | float):
        raise BadSample("no difficulty", f"meta.{curriculum.key}={difficulty!r} is no number")
    progress = min(1.0, samples_read / curriculum.samples)
    limit = curriculum.start + progress * (curriculum.end - curriculum.start)
    if not difficulty <= limit:
        raise LeftOut("too difficult", f"meta.{curriculum.key}={difficulty}, the limit is {limit:g}")
