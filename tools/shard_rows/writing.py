"""Rows of a source -> shards: converted by several processes, written in order, so that equal rows give equal bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from gspo_mm.data.faults import BadSample
from gspo_mm.data.samples import IMAGE_SUFFIXES

from .rows import Columns, Row, sample_of

_AHEAD = 16  # rows under way per process
_EXAMPLES = 20  # of refused rows of each reason, kept with their particulars
_PLACE = 8  # bytes
SPLITS = ("train", "validation")

type Sample = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A row that cannot be trained on."""

    reason: str  # one of a few words to count by
    detail: str


class ShardWriter:
    """Writes OUT/NAME-000000.tar, ...; use as a context manager.

    Shards bear a temporary name until all of them are whole, so that what is stopped leaves nothing that looks
    finished. Members have no time and no owner.
    """

    def __init__(
        self, out: Path, name: str, *, samples: int, megabytes: float = float("inf"), compressed: bool = False
    ) -> None:
        """A shard is full with `samples` samples, or once it has `megabytes` (10^6 bytes, before compression)."""
        self._out, self._name, self._compressed = out, name, compressed
        self._samples, self._bytes = samples, megabytes * 1e6
        self._tar: tarfile.TarFile | None = None
        self._files = ExitStack()
        self._in_shard, self._bytes_in_shard = 0, 0
        self.paths: list[Path] = []
        self.written = 0

    def __enter__(self) -> Self:
        self._out.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._files.close()
        for path in self.paths:
            if kind is None:
                _partial(path).rename(path)
            else:
                _partial(path).unlink(missing_ok=True)

    def write(self, sample: Sample) -> None:
        """`sample` is {"__key__": str, suffix: bytes, ...}."""
        if self._in_shard >= self._samples or self._bytes_in_shard >= self._bytes:
            self._files.close()
            self._tar = None
        if self._tar is None:
            self._tar = self._open()
        for suffix, data in sample.items():
            if not suffix.startswith("__"):
                member = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                member.size = len(data)
                self._tar.addfile(member, io.BytesIO(data))
                self._bytes_in_shard += len(data)
        self._in_shard += 1
        self.written += 1

    def _open(self) -> tarfile.TarFile:
        path = self._out / f"{self._name}-{len(self.paths):06d}.tar{'.gz' if self._compressed else ''}"
        self.paths.append(path)
        self._in_shard = self._bytes_in_shard = 0
        file: Any = self._files.enter_context(_partial(path).open("wb"))
        if self._compressed:  # neither time nor name in its header: equal bytes
            file = self._files.enter_context(gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0))
        tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        return self._files.enter_context(tar)


@dataclass
class Report:
    """What became of the rows."""

    rows: int = 0
    images: int = 0
    written: Counter[str] = field(default_factory=Counter)  # by split
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    examples: list[dict[str, Any]] = field(default_factory=list)  # row, reason and detail
    # rows in which a column holds something that is not used
    unused: Counter[str] = field(default_factory=Counter)
    largest_set: int = 0  # rows that must be in one split, since they share pictures with each other
    paths: list[Path] = field(default_factory=list)


def write_rows(
    rows: Iterable[Row | Refused],
    out: Path,
    columns: Columns,
    *,
    folder: Path,
    task: str,
    validation: float = 0.0,
    samples: int = 1000,
    megabytes: float = float("inf"),
    compressed: bool = False,
    workers: int = 1,
    on_row: Callable[[], None] = lambda: None,
) -> Report:
    """Write shards of all rows that can be trained on; the others are counted by reason, and named in the report.

    `validation`: fraction of the pictures (or, of rows without one, of the prompts) held out. Rows that share a picture
    are in one split, and so are rows that share pictures with the same third row, and so on. A picture changes its split
    when the source grows only where a new row shows it together with pictures of the other. Keys are row numbers.

    Until the last row is read no split is certain: with a fraction between 0 and 1 samples wait in a file of `out`.
    """
    report = Report()
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(out, split, samples=samples, megabytes=megabytes, compressed=compressed)
            )
            for split in SPLITS
        }

        def write(sample: Sample, split: str) -> None:
            writers[split].write(sample)
            report.written[split] += 1
            report.images += sum(_is_image(name) for name in sample)

        convert = partial(_convert, columns=columns, folder=folder, task=task)
        splits = Splits(validation)
        waiting = stack.enter_context(tempfile.TemporaryFile(dir=out)) if 0 < validation < 1 else None
        for number, (made, unused) in enumerate(_in_order(convert, enumerate(rows), workers)):
            report.rows += 1
            report.unused.update(unused)
            if isinstance(made, Refused):
                report.refused[made.reason] += 1
                if report.refused[made.reason] <= _EXAMPLES:
                    report.examples.append({"row": number, "reason": made.reason, "detail": made.detail})
            elif waiting:
                splits.add(_shown(made))
                pickle.dump(made, waiting, pickle.HIGHEST_PROTOCOL)
            else:
                write(made, SPLITS[int(validation)])
            on_row()
        if waiting:
            waiting.seek(0)
            report.largest_set = splits.largest_set
            for split in splits:
                write(pickle.load(waiting), split)
    report.paths = [path for writer in writers.values() for path in writer.paths]
    return report


def _convert(
    numbered: tuple[int, Row | Refused], columns: Columns, folder: Path, task: str
) -> tuple[Sample | Refused, list[str]]:
    """The sample, and the columns that were not used."""
    number, row = numbered
    unused: list[str] = []
    if isinstance(row, Refused):
        return row, unused
    try:
        sample = sample_of(row, f"{number:09d}", columns, folder=folder, task=task, on_unused=unused.append)
    except BadSample as fault:
        return Refused(reason=fault.reason, detail=str(fault)), []
    return sample, sorted(set(unused))


def _in_order[T, R](work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`map` over processes that never runs far ahead of its reader."""
    if workers <= 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(workers) as pool:
        under_way: deque[Future[R]] = deque()
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) >= workers * _AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


class Splits:
    """Which split each row is in: rows that share something that they show are in the same one (union-find)."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._rows: list[bytes] = []  # of each row, one of the things that it shows
        self._parents: dict[bytes, bytes] = {}

    def add(self, shown: list[bytes]) -> None:
        """The next row: what it shows, at least one thing, as `_shown` has it."""
        first, *others = (self._root(each) for each in shown)
        for other in others:
            low, high = sorted((self._root(first), self._root(other)))
            self._parents[high] = low
        self._rows.append(shown[0])

    @property
    def largest_set(self) -> int:
        """Rows of the largest set."""
        return max(Counter(map(self._root, self._rows)).values(), default=0)

    def __iter__(self) -> Iterator[str]:
        """The split of each row.

        Rows of several linked pictures are trained on where they are more than the fraction, and those of one picture
        where they are more than half: the other split would be left with too little.
        """
        counts = Counter(map(self._root, self._rows))
        pictures = Counter(map(self._root, list(self._parents)))
        for row in self._rows:
            root = self._root(row)
            most = max(1.0, (self._fraction if pictures[root] > 1 else 0.5) * len(self._rows))
            place = int.from_bytes(root[-_PLACE:])  # independent of what made it the root
            yield SPLITS[int(place < self._fraction * 2**64 and counts[root] <= most)]

    def _root(self, shown: bytes) -> bytes:
        path = [shown]
        while (parent := self._parents.setdefault(path[-1], path[-1])) != path[-1]:
            path.append(parent)
        for each in path:
            self._parents[each] = path[-1]
        return path[-1]


def _shown(sample: Sample) -> list[bytes]:
    """Of each picture of a sample, or of its messages: its SHA-256, then `_PLACE` bytes of another one for the split."""
    pictures = [data for name, data in sample.items() if _is_image(name)]
    shown = pictures or [json.dumps(json.loads(sample["json"])["messages"]).encode()]
    return [
        hashlib.sha256(data).digest() + hashlib.sha256(b"held out" + data).digest()[:_PLACE] for data in shown
    ]


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2] in IMAGE_SUFFIXES


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
