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

_THREADS = 2  # an image is mostly made outside Python's lock


def pack_ahead(
    micro_batches: Sequence[Sequence[TrainSequence]],
    processor: Pixels,
    *,
    passes: int,
    waiting: Callable[[], AbstractContextManager[None]],
) -> list[MicroBatch]:
    """As `pack` of each, with pixels that are made when they are looked at: in order, and as often as there are `passes`.

    What making them raises is raised where they are looked at. `waiting` surrounds what time passes until they are there.
    """
    maker = _Maker([distinct_images(m) for m in micro_batches], processor, passes, waiting)
    return [
        replace(without_pixels(members, processor), make_pixels=partial(maker.take, number))
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
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pixels")
        self._begun: dict[int, list[Future[torch.Tensor]]] = {}

    def take(self, number: int) -> torch.Tensor:
        """Pixels [patches, patch dim] of a micro-batch with images."""
        begun = self._begun.pop(number, None) or self._begin(number)
        self._begun.clear()  # another one than was expected
        with self._waiting():
            pixels = torch.cat([future.result() for future in begun])
        self._passes -= number in self._last
        if self._passes:
            following = self._next[number]
            self._begun[following] = self._begin(following)
        return pixels

    def _begin(self, number: int) -> list[Future[torch.Tensor]]:
        return [self._threads.submit(self._make, image) for image in self._images[number]]

    def _make(self, image: EncodedImage) -> torch.Tensor:
        return self._processor.pixels(image)[0]
