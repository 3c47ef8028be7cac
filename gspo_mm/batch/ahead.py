"""Micro-batches whose pixels are made while the one before computes.

Only ranks with a vision tower ask for pixels, and only for images whose features they do not have; what nobody asks for
is not made, save one micro-batch ahead. So pixels of two micro-batches are in memory, however many a step has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch

from gspo_mm.batch.packing import Pixels, distinct_images, without_pixels
from gspo_mm.types import EncodedImage, MicroBatch, TrainSequence


def pack_ahead(
    micro_batches: Sequence[Sequence[TrainSequence]],
    processor: Pixels,
    *,
    passes: int,
    waiting: Callable[[], AbstractContextManager[None]],
    shares_prompts: bool = False,
) -> list[MicroBatch]:
    """As `pack` of each, with pixels that are made when they are looked at: in order, and as often as there are `passes`.

    What making them raises is raised where they are looked at. `waiting` surrounds what time passes until they are there.
    """
    maker = _Maker([distinct_images(m) for m in micro_batches], processor, passes, waiting)
    return [
        replace(
            without_pixels(members, processor, shares_prompts=shares_prompts),
            make_pixels=partial(maker.take, number),
        )
        for number, members in enumerate(micro_batches)
    ]


class _Maker:
    """Makes the pixels of micro-batches, those of the next one while the caller computes."""

    def __init__(
        self,
        images: Sequence[Sequence[EncodedImage]],
        processor: Pixels,
        passes: int,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._images = images
        self._processor = processor
        with_images = [number for number, own in enumerate(images) if own]
        self._next = dict(zip(with_images, [*with_images[1:], *with_images[:1]], strict=True))
        self._last = with_images[-1:]
        self._passes = passes
        self._waiting = waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pixels")
        self._begun: dict[int, Future[torch.Tensor]] = {}

    def take(self, number: int) -> torch.Tensor:
        """Pixels [patches, patch dim] of a micro-batch with images."""
        begun = self._begun.pop(number, None) or self._begin(number)
        for unexpected in self._begun.values():
            unexpected.cancel()
        self._begun = {}
        with self._waiting():
            pixels = begun.result()
        self._passes -= number in self._last
        if self._passes:
            self._begun = {(following := self._next[number]): self._begin(following)}
        return pixels

    def _begin(self, number: int) -> Future[torch.Tensor]:
        return self._thread.submit(
            lambda: torch.cat([self._processor.pixels(image)[0] for image in self._images[number]])
        )
