"""Pixels are those of `pack`, made beside the caller, of two micro-batches at a time. Costs a second."""

import dataclasses
import threading
import traceback
import weakref
from contextlib import nullcontext

import pytest
import torch

from gspo_mm.batch import pack, pack_ahead
from gspo_mm.types import EncodedImage, MicroBatch, TrainSequence
from tests.unit.test_packing import FakePixels, image, sequence

BATCHES = [
    [sequence([1, 2], 1, image(1)), sequence([3, 4], 1, image(2), image(1))],
    [sequence([5, 6], 1)],
    [sequence([7, 8], 1, image(3))],
    [],
    [sequence([9, 10, 11], 2, image(4), image(5))],
]


class Watched(FakePixels):
    """Knows which pixels are still held by somebody."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[threading.Thread] = set()
        self.made: list[weakref.ref[torch.Tensor]] = []

    def pixels(self, image: EncodedImage) -> tuple[torch.Tensor, torch.Tensor]:
        self.threads.add(threading.current_thread())
        pixels, grid = super().pixels(image)
        self.made.append(weakref.ref(pixels))
        return pixels, grid


def begin(
    pixels: FakePixels, batches: list[list[TrainSequence]] = BATCHES, passes: int = 2
) -> list[MicroBatch]:
    return pack_ahead(batches, pixels, passes=passes, waiting=nullcontext)


def test_batches_are_those_of_pack_in_every_pass() -> None:
    pixels = Watched()
    ahead = begin(pixels)
    assert not pixels.asked
    for _ in range(2):
        for found, members in zip(ahead, BATCHES, strict=True):
            expected = pack(members, FakePixels())
            for each in dataclasses.fields(expected):
                mine, theirs = getattr(found, each.name), getattr(expected, each.name)
                if each.name == "pixel_values" and theirs is not None:
                    mine = found.pixels()
                if isinstance(theirs, torch.Tensor):
                    assert torch.equal(mine, theirs)
                elif each.name != "make_pixels":
                    assert mine == theirs
    assert threading.current_thread() not in pixels.threads
    assert sorted(pixels.asked) == sorted(
        [image(n).key for n in (1, 2, 3, 4, 5)] * 2
    )  # nothing more than that


def test_the_next_one_is_made_before_it_is_asked_for_and_no_other() -> None:
    pixels = Watched()
    many = [[sequence([n, n + 1], 1, image(n))] for n in range(1, 10)]
    ahead = begin(pixels, many, passes=1)
    for number, batch in enumerate(ahead):
        held = batch.pixels()
        assert float(held[0, 0]) == number + 1
        if number < len(many) - 1:
            while len(pixels.made) < number + 2:  # it needs nobody to ask for it
                threading.Event().wait(0.001)
        assert len(pixels.made) == min(number + 2, len(many))
        assert sum(ref() is not None for ref in pixels.made) <= 2


def test_another_order_than_expected_gives_the_same_pixels() -> None:
    pixels = Watched()
    ahead = begin(pixels)
    for number in (4, 0, 4, 2, 0, 4, 0, 2):
        assert torch.equal(ahead[number].pixels(), pack(BATCHES[number], FakePixels()).pixels())


def test_a_fault_comes_where_pixels_are_asked_for_with_the_place_where_it_was_made() -> None:
    class Torn(FakePixels):
        def pixels(self, image: EncodedImage) -> tuple[torch.Tensor, torch.Tensor]:
            if image.width == 3:
                raise OSError("torn picture")
            return super().pixels(image)

    ahead = begin(Torn())
    ahead[0].pixels()  # begins the torn one
    with pytest.raises(OSError, match="torn picture") as caught:
        ahead[2].pixels()
    assert "pixels" in {frame.name for frame in traceback.extract_tb(caught.tb)}
    assert any(frame.line and "torn picture" in frame.line for frame in traceback.extract_tb(caught.tb))
