"""Environments run in worker processes (runtime/workers.py), made there by `rollout.environment`."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from PIL import Image

from gspo_mm.config.environment import EnvironmentConfig
from gspo_mm.data.faults import BadSample
from gspo_mm.data.pictures import MAX_PIXELS, decode_image, measure, png_of
from gspo_mm.environment.base import SESSION, SIZES, Environment, Feedback
from gspo_mm.environment.http import HttpEnvironment
from gspo_mm.environment.image_tools import ImageTools
from gspo_mm.runtime.named import function_named
from gspo_mm.runtime.workers import WorkerError, Workers
from gspo_mm.types import EncodedImage, GspoError, Look, Prompt, Turn

type CameBack = tuple[str, tuple[EncodedImage, ...], Look | None]  # a Feedback

TYPES = {"image_tools": ImageTools, "http": HttpEnvironment}


class BadEnvironmentError(GspoError):
    """`rollout.environment` cannot be made; the message says what is wrong with it."""


class EnvironmentFailedError(Exception):
    """An environment failed over one answer; the message says how."""


class Environments:
    """`step` of the configured environment, elsewhere. Processes start with the first call."""

    def __init__(self, config: EnvironmentConfig, box_unit: str | None) -> None:
        """Of `make`, which has found by now what cannot be made."""
        self._config, self._box_unit = config, box_unit
        self._workers: Workers | None = None

    async def step(
        self, session: str, prompt: Prompt, turns: Sequence[Turn], sizes: Mapping[str, tuple[int, int]]
    ) -> CameBack | None:
        """What comes back after the last turn, None where the answer is complete.

        `sizes`: of the pictures so far by their keys, as `size_seen` gives them.

        Raises EnvironmentFailedError for whatever goes wrong in the environment.
        """
        if self._workers is None:
            limits = self._config
            self._workers = Workers(
                _begin,
                [limits, self._box_unit],
                workers=limits.workers,
                timeout=limits.timeout,
                memory_gib=limits.memory_gib,
                limits="rollout.environment",
            )
        plain = [replace(turn, logprobs=(), versions=()) for turn in turns]
        try:
            return await self._workers.run(_step, session, sizes, prompt, plain)
        except (WorkerError, EnvironmentFailedError) as fault:
            raise EnvironmentFailedError(f"environment: {fault}") from None

    def close(self) -> None:
        if self._workers:
            self._workers.close()


def make(config: EnvironmentConfig, box_unit: str | None) -> Environment:
    """`box_unit`: the one that image_tools have where args name none. Raises BadEnvironmentError."""
    key = (
        f"rollout.environment.python={config.python}"
        if config.python
        else f"rollout.environment.type={config.type}"
    )
    try:
        factory = function_named(config.python) if config.python else TYPES[str(config.type)]
        unit = {"unit": box_unit} if factory is ImageTools else {}
        return factory(**{**unit, **config.args})
    except Exception as error:  # the user's code raises what it likes
        raise BadEnvironmentError(
            f"{key} with args={config.args} cannot be made: {type(error).__name__}: {error}"
        ) from None


# What follows runs in a worker.

_made: list[Environment] = []


def _begin(config: EnvironmentConfig, box_unit: str | None) -> None:
    _made.append(make(config, box_unit))


def _step(
    session: str, sizes: Mapping[str, tuple[int, int]], prompt: Prompt, turns: Sequence[Turn]
) -> CameBack | None:
    SESSION.set(session)
    SIZES.set(sizes)
    try:
        found = asyncio.run(_made[0].step(prompt, turns))
        if found is None:
            return None
        if not isinstance(found, Feedback) or not isinstance(found.text, str):
            raise TypeError(f"it returned {found!r:.200}, which is no Feedback")
        return found.text, tuple(map(_encoded, found.images)), _plain(found.look)
    except BadSample as bad:
        raise EnvironmentFailedError(f"{bad.reason}: {bad}") from None
    except Exception as error:
        raise EnvironmentFailedError(f"{type(error).__name__}: {error}") from None


def _encoded(image: Image.Image | bytes) -> EncodedImage:
    if isinstance(image, Image.Image):
        if image.width * image.height > MAX_PIXELS:
            raise BadSample("image too large", f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
        data, size = png_of(image), image.size
    else:
        measure(image)  # before any memory is taken
        data, size = image, decode_image(image).size
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=size[0], height=size[1])


def _plain(look: Look | None) -> Look | None:
    """In Python's own numbers, which can be saved."""
    if look is None:
        return None
    left, top, right, bottom = map(float, look.box)
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError(f"{look} has an edge that is no number")
    return Look(image=int(look.image), box=(left, top, right, bottom))
