"""Several sources as one stream in one order.

Which source stands at position p is drawn from (seed, p) alone, and which of its samples from how many were taken of
it before.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from gspo_mm.data.shards import SOURCE, RawSample
from gspo_mm.data.stream import Cursor, SampleStream
from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.types import DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """Shards that are mixed with others by `weight`."""

    name: str  # "" for the only source of a plain list
    shards: Sequence[str]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a mixture stands: `taken` samples of the order are behind it."""

    taken: int = 0
    sources: Mapping[str, Cursor] = field(default_factory=dict)  # those at their beginning may be missing

    @property
    def epoch(self) -> int:
        """Epochs of the source that is furthest behind."""
        return min((cursor.epoch for cursor in self.sources.values()), default=0)

    def state(self) -> dict[str, Any]:
        """JSON; `Position.of` reads it back."""
        return {
            "taken": self.taken,
            "sources": {name: cursor.state() for name, cursor in self.sources.items()},
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Position:
        sources = {name: Cursor.of(cursor) for name, cursor in state["sources"].items()}
        return cls(taken=state["taken"], sources=sources)


class Mixture:
    """Iterator over (raw sample, position after it).

    With `repeat` for ever, sources drawn by weight; without, one source after the other, each once.
    Raises DataError as `SampleStream` does, and when `position` is of other sources. `notes` say how the shards differ
    from those that the position is of.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        shuffle_buffer: int,
        seed: int,
        repeat: bool,
        position: Position | None = None,
    ) -> None:
        position = position or Position()
        names = [source.name for source in sources]
        if not set(position.sources) <= set(names):
            raise DataError(
                f"the checkpoint was written with the sources {sorted(position.sources)} but data.train names "
                f"{sorted(names)}; restore them, or start another run.name"
            )
        self._names = names
        self._streams = [
            SampleStream(
                source.shards,
                shuffle_buffer=shuffle_buffer,
                seed=seed,
                repeat=repeat,
                cursor=position.sources.get(source.name),
                name=source.name,
            )
            for source in sources
        ]
        self.notes = [note for stream in self._streams for note in stream.notes]
        self._bounds = list(accumulate(source.weight for source in sources))
        self._seed = seed
        self._repeat = repeat
        self._taken = position.taken
        self._cursors = {name: stream.cursor for name, stream in zip(names, self._streams, strict=True)}

    def __iter__(self) -> Iterator[tuple[RawSample, Position]]:
        while (sample := self._next()) is not None:
            yield sample, Position(taken=self._taken, sources=dict(self._cursors))

    def _next(self) -> RawSample | None:
        choices = [self._drawn()] if self._repeat else range(len(self._streams))
        for choice in choices:
            stream, name = self._streams[choice], self._names[choice]
            sample = next(stream, None)
            if sample is not None:
                self._cursors[name] = stream.cursor
                self._taken += 1
                return {**sample, SOURCE: name}
        return None

    def _drawn(self) -> int:
        """The source at the next position, by weight."""
        if len(self._streams) == 1:
            return 0
        draw = derive_seed(self._seed, "mixture", self._taken) / 2**63
        return min(bisect(self._bounds, draw * self._bounds[-1]), len(self._bounds) - 1)
