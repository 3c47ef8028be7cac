"""Read WebDataset shards as a stream of undecoded samples that can stop anywhere and continue exactly there.

WebDataset reads the tars and groups their members by key; what it lacks, and what is here, is a position: the
order of an epoch is a function of (seed, epoch) alone, so a position is two integers, and resuming means reading
the epoch again without decoding anything. Left out: splitting shards over ranks (one process drives all
rollouts), pipes and URLs, and a seek inside an epoch.

A damaged shard gives its readable samples and then one that only says what is wrong, so that the fault is counted
and named with all others.
"""

from __future__ import annotations

import glob
import random
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import braceexpand

from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.types import DataError

FAULT = "__fault__"  # key of a sample that reports damage of its shard instead of bringing data
_END_MARKER = bytes(1024)  # two zero blocks end a whole tar

type RawSample = Mapping[str, Any]  # {"__key__": str, "__url__": str, suffix: bytes, ...}


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A position in the stream: `read` samples of epoch `epoch` have been handed out."""

    epoch: int = 0
    read: int = 0


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Paths behind `{000..031}` braces and globs, in the order of the patterns, each shard once.

    Raises DataError naming the first pattern (and, for braces, the path) that matches no file.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        for path in braceexpand.braceexpand(pattern):
            found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * Path(path).is_file()  # noqa: PTH207
            if not found:
                via = "" if path == pattern else f" (from {pattern})"
                raise DataError(
                    f"no shard matches {path}{via}; correct data.train or data.validation, or make the shards "
                    "with tools/make_shards.py"
                )
            paths |= dict.fromkeys(found)
    return list(paths)


class SampleStream:
    """Iterator over raw samples; `cursor` is the position after the last one.

    With `shuffle_buffer` > 0 the shards' order is shuffled, and samples through a buffer of that size; with 0 both
    keep their order. `repeat` goes on with the next epoch for ever.
    """

    def __init__(
        self,
        shards: Sequence[str],
        *,
        shuffle_buffer: int,
        seed: int,
        repeat: bool,
        cursor: Cursor | None = None,
    ) -> None:
        self._shards = list(shards)
        self._shuffle_buffer = shuffle_buffer
        self._seed = seed
        self._repeat = repeat
        self.cursor = cursor or Cursor()
        self._samples = self._from_cursor()

    def __iter__(self) -> Iterator[RawSample]:
        return self

    def __next__(self) -> RawSample:
        sample = next(self._samples, None)
        if sample is None:
            if not self._repeat:
                raise StopIteration
            if self.cursor.read == 0:
                raise DataError(f"{self._shards[0]} and {len(self._shards) - 1} other shards hold no sample")
            self.cursor = Cursor(epoch=self.cursor.epoch + 1)
            self._samples = self._epoch(self.cursor.epoch)
            return next(self)
        self.cursor = Cursor(epoch=self.cursor.epoch, read=self.cursor.read + 1)
        return sample

    def _from_cursor(self) -> Iterator[RawSample]:
        samples = self._epoch(self.cursor.epoch)
        for _ in range(self.cursor.read):
            next(samples, None)
        return samples

    def _epoch(self, epoch: int) -> Iterator[RawSample]:
        if not self._shuffle_buffer:
            return (s for shard in self._shards for s in read_shard(shard))
        rng = random.Random(derive_seed(self._seed, "epoch", epoch))
        shards = rng.sample(self._shards, len(self._shards))
        return _shuffled((s for shard in shards for s in read_shard(shard)), self._shuffle_buffer, rng)


def read_shard(path: str) -> Iterator[RawSample]:
    """Samples of one tar in their order; damage ends it with a sample {FAULT: what is wrong}.

    Raises DataError when the file cannot be opened at all: a shard that vanished is not a damaged sample.
    """
    from webdataset.tariterators import group_by_keys  # imports torch

    try:
        file = Path(path).open("rb")  # noqa: SIM115  (closed by the with below)
    except OSError as error:
        raise DataError(
            f"shard {path} cannot be opened ({error.strerror}); check the path and its permissions"
        ) from None
    faults: list[str] = []
    with file:
        members = ({**member, "__url__": path} for member in _members(file, faults))
        held: RawSample | None = None
        for sample in group_by_keys(members, handler=lambda error: not faults.append(str(error.args[0]))):
            if held is not None:
                yield held
            held = sample
    if (
        held is not None and not faults
    ):  # the last sample before damage may lack members: it is part of the fault
        yield held
    if faults:
        yield {"__key__": held["__key__"] if held else "?", "__url__": path, FAULT: "; ".join(faults)}


def _members(file: BinaryIO, faults: list[str]) -> Iterator[dict[str, Any]]:
    """Files of the tar as webdataset gives them; what stops the reading goes to `faults`."""
    from webdataset.tariterators import tar_file_iterator

    try:
        yield from tar_file_iterator(file)  # pyright: ignore[reportArgumentType]  (takes a file, annotated as TarFile)
    except (tarfile.TarError, EOFError, OSError) as error:
        faults.append(str(error))
        return
    # a tar that was cut between two members reads without an error: only the end marker is missing
    file.seek(max(0, file.seek(0, 2) - len(_END_MARKER)))
    if file.read() != _END_MARKER:
        faults.append("the tar is cut off: its end marker is missing")


def _shuffled(samples: Iterable[RawSample], size: int, rng: random.Random) -> Iterator[RawSample]:
    buffer: list[RawSample] = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        place = rng.randrange(size)
        yield buffer[place]
        buffer[place] = sample
    rng.shuffle(buffer)
    yield from buffer
