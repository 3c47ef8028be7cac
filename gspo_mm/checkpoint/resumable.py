"""A folder made of large files, by several threads, that a kill does not cost what is done.

    .tmp-NAME          what there is of it: files under their names, half-written ones with .half behind
    .tmp-NAME/.parts   what it is made of (source.json), and for each file that is whole and on disk its size and result

The same command again takes whole files over. A folder is never made of two sources. A fault leaves nothing.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from gspo_mm.runtime.disk import publish, refusal, sync, written_whole
from gspo_mm.runtime.log import CONSOLE
from gspo_mm.types import GspoError

_SECONDS_BETWEEN_LINES = 10.0

# to call with bytes that were dealt with, often: it does not return when another thread has failed
type Moved = Callable[[int], None]


class ConversionError(GspoError):
    """What cannot be written, or goes on from something else."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file, and what its `write` returns in JSON's types."""

    file: str
    # bytes, roughly
    size: int
    write: Callable[[Path, Moved], Any]


def make(
    out: Path,
    parts: list[Part],
    finish: Callable[[Path, list[Any]], None],
    *,
    source: Any,
    title: str,
    threads: int,
) -> None:
    """Make folder `out`, in place of one that was there.

    `finish` gets the unfinished folder and what the parts returned, and may be called again after a kill. `source`: in
    JSON's types, all that the result depends on. Raises ConversionError when the disk refuses.
    """
    temporary = out.with_name(f".tmp-{out.name}")
    with _owned(temporary, [source, [[part.file, part.size] for part in parts]]) as journal:
        try:
            finish(temporary, _write(temporary, journal, parts, title, threads))
            for item in temporary.rglob("*"):
                sync(item)
            shutil.rmtree(journal)
            publish(temporary, out)
            sync(out.parent)
        except KeyboardInterrupt:  # a kill like any other
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            shutil.rmtree(temporary, ignore_errors=True)
            _tell(error, out)
            raise


def files_of(folder: Path) -> dict[str, list[int]]:
    """What tells whether a folder is still the same: size and time of all files."""
    found = {file.name: file.stat() for file in sorted(folder.iterdir()) if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


@contextmanager
def _owned(temporary: Path, source: Any) -> Iterator[Path]:
    """The journal of an unfinished folder of this source, which is that of no other process meanwhile."""
    journal = temporary / ".parts"
    note, text = journal / "source.json", json.dumps(source, indent=1)
    try:
        if not note.is_file():
            shutil.rmtree(temporary, ignore_errors=True)
            journal.mkdir(parents=True)
            with written_whole(note, on_disk=True) as file:
                file.write_text(text)
        lock = note.open()
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        said = refusal(error, folder=temporary.parent)
        raise ConversionError(f"{temporary} cannot be written: {said}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(
                f"another process writes {temporary}: wait for it, or choose another folder"
            ) from None
        except OSError:  # some shared file systems have no locks
            pass
        if lock.read() != text:
            raise ConversionError(
                f"{temporary} is the unfinished rest of another conversion, or its source has changed since: remove it, or "
                "choose another folder to write"
            )
        yield journal


def _write(folder: Path, journal: Path, parts: list[Part], title: str, threads: int) -> list[Any]:
    """What all parts returned, now or before."""
    found = {part.file: record for part in parts if (record := _done(folder, journal, part))}
    left = [part for part in parts if part.file not in found]
    with _Meter(title, sum(part.size for part in parts)) as meter, ThreadPoolExecutor(threads) as pool:
        meter.skip(sum(part.size for part in parts) - sum(part.size for part in left))
        futures = {pool.submit(_write_one, folder, journal, part, meter.moved): part for part in left}
        try:
            for future in as_completed(futures):
                found[futures[future].file] = future.result()
        except BaseException:
            meter.stopped = True
            pool.shutdown(cancel_futures=True)
            raise
    return [found[part.file]["result"] for part in parts]


def _write_one(folder: Path, journal: Path, part: Part, moved: Moved) -> dict[str, Any]:
    final = folder / part.file
    final.parent.mkdir(exist_ok=True)
    half = final.with_name(final.name + ".half")
    try:
        result = part.write(half, moved)
        sync(half)
        half.rename(final)
        sync(final.parent)
        record = {"size": final.stat().st_size, "result": result}
        with written_whole(_record(journal, part), on_disk=True) as file:
            file.write_text(json.dumps(record))
    except Exception as error:
        _tell(error, final)
        raise
    return record


def _tell(error: BaseException, file: Path) -> None:
    """Raise ConversionError when a disk refused, behind whatever torch.save made of that."""
    if not isinstance(error, GspoError) and (said := refusal(error)):
        name = getattr(error, "filename", None) or file
        raise ConversionError(f"{name} cannot be read or written: {said}") from error


def _done(folder: Path, journal: Path, part: Part) -> dict[str, Any] | None:
    """The record of a part that is whole."""
    try:
        record = json.loads(_record(journal, part).read_text())
        return record if (folder / part.file).stat().st_size == record["size"] else None
    except FileNotFoundError:
        return None


def _record(journal: Path, part: Part) -> Path:
    return journal / (part.file.replace("/", "-") + ".json")


class _StoppedError(Exception):
    """Another thread has failed."""


class _Meter:
    """Bytes, speed and time left: a bar on a terminal, a line every 10 s elsewhere."""

    def __init__(self, title: str, total: int) -> None:
        self.stopped = False
        self._title, self._total = title, total
        self._done = self._skipped = 0
        self._lock = threading.Lock()
        self._began = self._last_line = time.monotonic()
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=CONSOLE) if sys.stderr.isatty() else None
        self._task = self._bar.add_task(title, total=total) if self._bar else None

    def __enter__(self) -> _Meter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        else:
            self._line()

    def skip(self, size: int) -> None:
        """What was done by an earlier process."""
        self._done = self._skipped = size
        if self._bar and self._task is not None:
            self._bar.reset(self._task, completed=size)

    def moved(self, size: int) -> None:
        if self.stopped:
            raise _StoppedError
        with self._lock:
            self._done += size
            if self._bar and self._task is not None:
                self._bar.update(self._task, completed=self._done)
            elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._last_line = time.monotonic()
                self._line()

    def _line(self) -> None:
        speed = (self._done - self._skipped) / max(time.monotonic() - self._began, 1e-9)
        seconds = round((self._total - self._done) / speed) if speed else 0
        print(
            f"{self._title} {self._done / 1e9:.1f}/{self._total / 1e9:.1f} GB  {speed / 1e9:.2f} GB/s  "
            f"{seconds // 60}:{seconds % 60:02d} left",
            file=sys.stderr,
        )
