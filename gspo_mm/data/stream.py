"""The samples of one source, shuffled, as a stream that can stop anywhere and continue exactly there.

The order of an epoch is a function of (seed, name, epoch), of its list of shards, and of how many samples each of them
holds. So a position is that list and a few integers: the epoch, how many of its samples were handed out, and what the
shards that were read to their end held. An epoch ends with the shards that it began with: see `listing.py`.

Resuming draws the same random numbers again over bare places (shard, number) instead of samples, about a million
a second, and then reads only the shards that the shuffle buffer still holds samples of, and the one under way.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gspo_mm.data.listing import Shard, find_again, list_shards
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
    # of the epoch, before they are shuffled; () in checkpoints of older versions
    shards: tuple[Shard, ...] = ()

    def state(self) -> dict[str, Any]:
        """JSON; `Cursor.of` reads it back. Not `asdict`, which copies `counts` number by number at every prompt."""
        return {"epoch": self.epoch, "read": self.read, "counts": self.counts, "shards": self.shards}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Cursor:
        shards = tuple(Shard(*shard) for shard in state.get("shards", ()))
        return cls(epoch=state["epoch"], read=state["read"], counts=tuple(state["counts"]), shards=shards)


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

    Raises DataError at once when a shard that the rest of the cursor's epoch needs is gone, or has another size.
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
        self._listing = list_shards(shards)
        self.notes: list[str] = []  # how the shards differ from those of the cursor
        self.cursor = cursor or Cursor()
        self._counts = self.cursor.counts
        self._of_epoch: Sequence[str | None] = self._shards
        if self.cursor.read and self.cursor.shards:
            self._find_again()
        else:
            self.cursor = replace(self.cursor, shards=self._listing)
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
                    "them again with tools/make_shards.py"
                )
            self.cursor = Cursor(epoch=self.cursor.epoch + 1, shards=self._listing)
            self._counts, self._of_epoch = (), self._shards
            self._samples = self._epoch()
        self.cursor = replace(self.cursor, read=self.cursor.read + 1, counts=self._counts)
        return sample

    def _find_again(self) -> None:
        """Look for the shards of the cursor's epoch among those that are there now."""
        self._of_epoch, new = find_again(self.cursor.shards, self._shards)
        gone = [i for i, place in enumerate(self._of_epoch) if place is None]
        if gone:
            names = {i: self.cursor.shards[i].place for i in gone}
            if needed := [names[i] for i in gone if i in self._needed(gone)]:
                raise DataError(
                    f"{_some(needed)} is gone, and the rest of epoch {self.cursor.epoch} is read from it; restore it, or "
                    "start another run.name"
                )
            self.notes.append(
                f"{_some(list(names.values()))} is gone: epoch {self.cursor.epoch} has used it, the next ones are without it"
            )
        if new:
            self.notes.append(f"{_some(new)} is new: it comes in with epoch {self.cursor.epoch + 1}")

    def _needed(self, gone: Sequence[int]) -> set[int]:
        """Which shards of the epoch hold samples that are still to come."""
        _, order, _ = self._order()
        counts = self._counts
        needed = set(order[len(counts) :])
        if not needed & set(gone):  # else nothing more has to be looked at
            _, buffer = self._replay()
            needed |= {order[item.shard] for item in buffer if isinstance(item, _Place)}
            self._counts = counts
        return needed

    def _order(self) -> tuple[random.Random, list[int], list[str]]:
        """Random numbers of the cursor's epoch, and its shards in their order: their numbers and places."""
        labels = ("epoch", self._name, self.cursor.epoch) if self._name else ("epoch", self.cursor.epoch)
        rng = random.Random(derive_seed(self._seed, *labels))
        order = list(range(len(self._of_epoch)))
        if self._shuffle_buffer:
            order = rng.sample(order, len(order))
        # what is gone is not read, as `_find_again` has made sure
        return rng, order, [self._of_epoch[number] or "" for number in order]

    def _replay(self) -> tuple[Iterator[RawSample | _Place], list[RawSample | _Place]]:
        """The epoch after what the cursor has read, and the shuffle buffer at that point."""
        rng, _, shards = self._order()
        buffer: list[RawSample | _Place] = []
        items = _shuffled(self._items(shards, self._counts), buffer, self._shuffle_buffer, rng)
        for _ in range(self.cursor.read):
            if next(items, None) is None:
                raise _changed(shards)
        return items, buffer

    def _epoch(self) -> Iterator[RawSample]:
        """The samples of the cursor's epoch from the cursor on."""
        shards = self._order()[2]
        items, buffer = self._replay()
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
            count, held = 0, None
            for sample in read_shard(shard):
                if held is not None:
                    yield held
                count, held = count + 1, sample
            self._counts = (*self._counts, count)  # before the last one is out: with it the shard is done
            if held is not None:
                yield held


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


def _some(places: Sequence[str]) -> str:
    more = f" (like {len(places) - 1} others)" if len(places) > 1 else ""
    return f"shard {shown(places[0])}{more}"


def _changed(shards: Sequence[str]) -> DataError:
    more = f" or one of {len(shards) - 1} others" if len(shards) > 1 else ""
    return DataError(
        f"shard {shown(shards[0])}{more} holds fewer samples than when the checkpoint was written; restore it, or "
        "start another run.name"
    )
