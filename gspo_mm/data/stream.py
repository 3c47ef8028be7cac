"""The samples of one source, shuffled, as a stream that can stop anywhere and continue exactly there.

The order of an epoch is a function of (seed, name, epoch) and of how many samples each shard holds. So a position is a
few integers: the epoch, how many of its samples were handed out, and what the shards that were read to their end held.

Resuming draws the same random numbers again over bare places (shard, number) instead of samples, about a million
a second, and then reads only the shards that the shuffle buffer still holds samples of, and the one under way.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_mm.data.places import shown
from gspo_mm.data.shards import RawSample, read_shard
from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.types import DataError


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A position in the stream: `read` samples of epoch `epoch` have been handed out."""

    epoch: int = 0
    read: int = 0
    counts: tuple[int, ...] = ()  # samples in each of the epoch's first shards, those read to their end

    def state(self) -> dict[str, Any]:
        """JSON; `Cursor.of` reads it back. Not `asdict`, which copies `counts` number by number at every prompt."""
        return {"epoch": self.epoch, "read": self.read, "counts": self.counts}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Cursor:
        return cls(epoch=state["epoch"], read=state["read"], counts=tuple(state["counts"]))


@dataclass(frozen=True, slots=True)
class _Place:
    """Stands for a sample that is not read (yet)."""

    shard: int  # in the order of the epoch
    number: int  # in the shard


class SampleStream:
    """Iterator over raw samples; `cursor` is the position after the last one. Nothing is read before the first.

    With `shuffle_buffer` > 0 the shards' order is shuffled, and samples through a buffer of that size; with 0 both
    keep their order. `repeat` goes on with the next epoch for ever. `name` gives each source of a mixture an order
    of its own.
    """

    def __init__(
        self,
        shards: Sequence[str],
        *,
        shuffle_buffer: int,
        seed: int,
        repeat: bool,
        cursor: Cursor | None = None,
        name: str = "",
    ) -> None:
        self._shards = list(shards)
        self._shuffle_buffer = shuffle_buffer
        self._seed = seed
        self._name = name
        self._repeat = repeat
        self.cursor = cursor or Cursor()
        self._counts = self.cursor.counts
        self._samples = self._epoch()

    def __iter__(self) -> Iterator[RawSample]:
        return self

    def __next__(self) -> RawSample:
        while (sample := next(self._samples, None)) is None:
            if not self._repeat:
                raise StopIteration
            if self.cursor.read == 0:
                raise DataError(
                    f"{shown(self._shards[0])} and {len(self._shards) - 1} other shards hold no sample; make "
                    "them anew with tools/make_shards.py"
                )
            self.cursor = Cursor(epoch=self.cursor.epoch + 1)
            self._counts = ()
            self._samples = self._epoch()
        self.cursor = Cursor(epoch=self.cursor.epoch, read=self.cursor.read + 1, counts=self._counts)
        return sample

    def _epoch(self) -> Iterator[RawSample]:
        """The samples of the cursor's epoch from the cursor on."""
        labels = ("epoch", self._name, self.cursor.epoch) if self._name else ("epoch", self.cursor.epoch)
        rng = random.Random(derive_seed(self._seed, *labels))
        shards = rng.sample(self._shards, len(self._shards)) if self._shuffle_buffer else self._shards
        buffer: list[RawSample | _Place] = []
        items = _shuffled(self._items(shards, self._counts), buffer, self._shuffle_buffer, rng)
        for _ in range(self.cursor.read):
            if next(items, None) is None:
                raise _changed(shards)
        _fill(buffer, shards)
        for item in items:
            if isinstance(item, _Place):
                raise _changed(shards)
            yield item

    def _items(self, shards: Sequence[str], counts: Sequence[int]) -> Iterator[RawSample | _Place]:
        """Places in the shards whose `counts` are known, samples of the others; their counts are kept."""
        for shard, count in enumerate(counts):
            for number in range(count):
                yield _Place(shard, number)
        for shard in shards[len(counts) :]:
            count = 0
            for sample in read_shard(shard):
                count += 1
                yield sample
            self._counts = (*self._counts, count)


def _shuffled(
    items: Iterator[RawSample | _Place], buffer: list[RawSample | _Place], size: int, rng: random.Random
) -> Iterator[RawSample | _Place]:
    """Each item in exchange for a random one of `buffer`; whenever one is yielded, `buffer` holds just what is to come."""
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
        elif size == 0:
            yield item
        else:
            place = rng.randrange(size)
            chosen, buffer[place] = buffer[place], item
            yield chosen
    rng.shuffle(buffer)
    buffer.reverse()
    while buffer:
        yield buffer.pop()


def _fill(buffer: list[RawSample | _Place], shards: Sequence[str]) -> None:
    """Read the samples whose places the buffer holds, each shard once."""
    wanted: dict[int, dict[int, int]] = defaultdict(dict)
    for slot, item in enumerate(buffer):
        if isinstance(item, _Place):
            wanted[item.shard][item.number] = slot
    for shard, slots in wanted.items():
        last = max(slots)
        for number, sample in enumerate(read_shard(shards[shard])):
            if number in slots:
                buffer[slots[number]] = sample
            if number == last:
                break
        else:
            raise _changed(shards[shard : shard + 1])


def _changed(shards: Sequence[str]) -> DataError:
    more = f" or one of {len(shards) - 1} others" if len(shards) > 1 else ""
    return DataError(
        f"shard {shown(shards[0])}{more} holds fewer samples than when the checkpoint was written; restore it, or "
        "start another run.name"
    )
