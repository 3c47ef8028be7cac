"""Writing to a disk, waiting for it, and what it says when it refuses, with what to do about each: one sentence for who started
the run."""

from __future__ import annotations

import errno
import fcntl
import io
import mmap
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Buffer, Iterator
from contextlib import contextmanager
from pathlib import Path

_PROBE = 2**22  # bytes
_BLOCK = 2**24  # bytes
_SERVER = "the file server does not answer; start again when it does"
_PERMISSION = "give yourself permission to write there, or choose another folder"
_IN_THE_WAY = (
    "something else stands where a folder or file of the run belongs: move it away, or choose another"
)
_FIXES = {
    errno.ENOSPC: "free some space there, or choose a folder on another disk",
    errno.EDQUOT: "your quota is used up: remove files of yours there, or ask for more",
    errno.EROFS: "it is mounted read-only: choose a folder on a disk that can be written",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`), or choose a disk that takes larger files",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "this machine has too many open files: end other programs, or raise fs.file-max",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTEMPTY: "something else writes into it: end that first",
    errno.EBUSY: "something else uses it: end that first",
    errno.ELOOP: "links there lead in a circle: remove them",
    errno.ESTALE: "the file server has forgotten the folder, which was removed or replaced there: start again",
    errno.EIO: "the disk or its connection fails: choose another disk, and tell whoever runs it",
    errno.ETIMEDOUT: _SERVER,
    errno.EHOSTDOWN: _SERVER,
    errno.EHOSTUNREACH: _SERVER,
    errno.ENOTCONN: _SERVER,
    errno.EREMOTEIO: _SERVER,
}
# also a mistake of ours says so: for those who know that it cannot be one
_GONE = "the folder was removed or is behind a broken link: put it back, or choose another"


def refusal(error: BaseException, *, folder: Path | None = None) -> str | None:
    """What the disk said and what to do about it; None when `error` is no refusal of a disk.

    `folder`: where files of a run were written when it came, so that it is one for sure. Writers wrap errors in others,
    which keep the text at best; without it the disk is asked again.
    """
    cause = _cause(error)
    number = cause.errno if isinstance(cause, OSError) else _number(str(cause))
    if folder and not number and (again := _probe(folder)):
        number = again.errno
    fix = _FIXES.get(number) if number else None
    if fix is _SERVER and folder is None:  # sockets say the same
        return None
    if fix is None and folder:
        fix = _GONE if number == errno.ENOENT else "look at the disk, its space and your permissions"
    if fix is None:
        return None
    said = os.strerror(number) if number else " ".join(str(cause).split())[-200:] or type(cause).__name__
    return f"{said[0].lower()}{said[1:]}; {fix}"


def _probe(folder: Path) -> OSError | None:
    """What the disk says when a little is written to it."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _cause(error: BaseException) -> BaseException:
    """The system's own error behind `error`, or `error`."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return seen
        # of ranks, as torch.distributed.checkpoint gathers them
        if failures := getattr(seen, "failures", None):
            seen = error = next(iter(failures.values()))[0]
        else:
            seen = seen.__cause__ or seen.__context__
    return error


def _number(text: str) -> int | None:
    """The error number that a text speaks of."""
    if found := re.search(r"\[Errno (\d+)\]", text):
        return int(found[1])
    return next((number for number in _FIXES if os.strerror(number).lower() in text.lower()), None)


@contextmanager
def written_whole(path: Path, *, private: bool = False, on_disk: bool = False) -> Iterator[Path]:
    """A file to write in the block, which then takes the place of `path`: nobody sees a part of it.

    `private`: only its owner may read it. `on_disk`: wait until it would outlive a loss of power.
    """
    temporary = path.with_name(f".tmp-{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        if private:
            temporary.touch(mode=0o600)
        yield temporary
        if on_disk:
            sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class UncachedFile(io.RawIOBase):
    """A new file, to write from its beginning to its end, past the system's cache where the disk allows that.

    Of large files the cache takes most of the processor time, and drops for them what others read.
    """

    def __init__(self, path: Path) -> None:
        self._flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT
        try:
            self._file = os.open(path, self._flags, 0o666)
        except OSError as error:
            self._use_cache(error)
            self._file = os.open(path, self._flags, 0o666)
        # begins where a page does, as disks ask for
        self._block = memoryview(mmap.mmap(-1, _BLOCK))
        self._filled = self._written = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written + self._filled

    def write(self, data: Buffer, /) -> int:
        left = memoryview(data).cast("B")
        size = left.nbytes
        while left:
            part = left[: _BLOCK - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            left = left[len(part) :]
            if self._filled == _BLOCK:
                self._write_block()
        return size

    def close(self) -> None:
        if self.closed:
            return
        try:
            super().close()
            self._write_block()
        finally:
            os.close(self._file)

    def _write_block(self) -> None:
        left = self._block[: self._filled]
        while left:
            try:
                left = left[os.write(self._file, left) :]
            except OSError as error:  # the end of a file is no whole number of pages
                self._use_cache(error)
                fcntl.fcntl(self._file, fcntl.F_SETFL, self._flags)
        self._written += self._filled
        self._filled = 0

    def _use_cache(self, error: OSError) -> None:
        """Unless it is used, or the error is another."""
        if error.errno != errno.EINVAL or not self._flags & os.O_DIRECT:
            raise error
        self._flags &= ~os.O_DIRECT


def publish(temporary: Path, path: Path) -> None:
    """Have a whole folder take the place of `path`."""
    old = path.with_name(f".old-{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
