"""Who trains in a run folder: one process at a time, named in RUN/owner.json.

The file is created with O_EXCL, which shared file systems keep to, and written again every BEAT seconds through the
descriptor that created it, so that a former owner cannot touch the file of the next. Whether another owner lives:

    the same machine   its process is there, or it is not
    another machine    the file changes within PATIENCE seconds, or it does not; clocks are not compared
    this Slurm job, before it was requeued: it does not

A file whose owner does not live is taken over.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from gspo_mm.types import GspoError

logger = logging.getLogger(__name__)

FILE = "owner.json"
BEAT = 2.0  # seconds between signs of life
PATIENCE = 20.0  # seconds without one until an owner on another machine is taken for dead

type _Record = dict[str, Any]


class OwnerError(GspoError):
    """Another run works in the folder."""


class Owner:
    """This process as the owner of a run folder, until `release`."""

    def __init__(self, folder: Path) -> None:
        """Raises OwnerError naming the one who lives, FileExistsError when another was faster, or another OSError."""
        self._path = folder / FILE
        self.note = ""  # what there is to say about a former owner
        self._record = _this_process() | {
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": uuid.uuid4().hex,
        }
        self._beats = 0
        self._ended = threading.Event()
        for _ in range(3):  # another that starts now may be faster, and is looked at then
            if (former := check_free(folder)) is not None:
                self.note = f"{folder} was in use by {_named(former)}, which no longer runs: it is taken over"
                _put_away(self._path, former)
            with suppress(FileExistsError):
                self._create()
                break
        else:
            raise OwnerError(f"other runs are starting in {folder}; start one of them again")
        self._thread = threading.Thread(target=self._live, name="owner", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The owner that this process is already, or a new one."""
        place = folder.resolve()
        owner = _OWNED.get(place)
        if owner is None or owner._ended.is_set() or not owner._is_named():
            owner = _OWNED[place] = cls(folder)
        assert isinstance(owner, cls)
        return owner

    def check(self) -> None:
        """Raises OwnerError when another process took the folder over, as it may when this one was suspended."""
        if self._is_named():
            return
        if (other := _read(self._path)) is not None:
            self._ended.set()
            raise OwnerError(
                f"{self._path.parent} was taken over by {_named(other)} while this run gave no sign of life for "
                f"{PATIENCE:g} s; this one stops"
            )
        with suppress(FileExistsError):  # it is there and cannot be read at this moment
            self._create()  # it was removed by hand; the thread may still write to the file before

    def release(self) -> None:
        """Leave the folder to others."""
        if self._ended.is_set() or self._record["pid"] != os.getpid():
            return
        self._ended.set()
        self._thread.join()
        if self._is_named():
            with suppress(OSError):
                self._path.unlink()
        os.close(self._file)
        atexit.unregister(self.release)

    def _create(self) -> None:
        self._file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._write()

    def _write(self) -> None:
        text = json.dumps(self._record | {"beat": f"{self._beats:012d}"}) + "\n"  # of a fixed length
        os.pwrite(self._file, text.encode(), 0)
        os.fsync(self._file)

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            self._beats += 1
            with suppress(OSError):  # a full disk, a lost server: the next one may be written
                self._write()

    def _is_named(self) -> bool:
        return (_read(self._path) or {}).get("token") == self._record["token"]


_OWNED: dict[Path, Owner] = {}


def check_free(folder: Path) -> _Record | None:
    """The dead owner that the folder names, None when it names none. Raises OwnerError for one that lives."""
    path = folder / FILE
    if not path.exists():
        return None
    owner = _read(path)
    if owner is None:  # another is writing it at this moment, or it was cut off
        time.sleep(BEAT / 2)
        owner = _read(path) or {}
    lives = _lives_here(owner)
    if lives is None:
        logger.warning("%s: looking for %g s whether %s still runs", folder, PATIENCE, _named(owner))
        deadline = time.monotonic() + PATIENCE
        while not lives and time.monotonic() < deadline:
            time.sleep(min(BEAT, PATIENCE) / 4)
            if not path.exists():
                return None
            lives = _read(path) not in (owner, None)
    if lives:
        raise OwnerError(
            f"{folder} is in use by {_named(owner)}: wait until it has ended, or stop it, or choose another run.name"
        )
    return owner


def owner_of(folder: Path) -> tuple[str, bool | None]:
    """The owner that a folder names, for people, and whether it lives; None where this machine cannot know."""
    owner = _read(folder / FILE)
    return (_named(owner), _lives_here(owner)) if owner else ("", False)


def _lives_here(owner: _Record) -> bool | None:
    """Whether an owner lives, as far as this machine knows; None when it does not."""
    this = _this_process()
    if not owner or (
        owner["job"]
        and (owner["job"], owner["cluster"]) == (this["job"], this["cluster"])
        and owner["restarts"] != this["restarts"]
    ):
        return False
    if (owner["host"], owner["machine"]) != (this["host"], this["machine"]):
        return None
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return _started(owner["pid"]) in (None, owner["started"])


def _this_process() -> _Record:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""),  # job numbers are those of a cluster
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _machine() -> str:
    """What two processes share that can see each other's process numbers: a start of the system, and a namespace."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process of this machine started, by its clock, or that it has ended; None where that cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]


def _put_away(path: Path, former: _Record) -> None:
    """Remove the file of a dead owner, and not that of one who was faster in doing so."""
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        path.rename(aside)
        if (_read(aside) or {}).get("token") == former.get("token"):
            aside.unlink()
        else:
            with suppress(FileExistsError):
                os.link(aside, path)
            aside.unlink()


def _named(owner: _Record) -> str:
    if not owner:
        return "a run that left no name"
    job = f", Slurm job {owner['job']}" if owner["job"] else ""
    return f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}"


def _read(path: Path) -> _Record | None:
    """What the file says; None when it is not there or not whole."""
    try:
        found = json.loads(path.read_text())
        return found if found.keys() >= {*_this_process(), "since", "token"} else None
    except (OSError, ValueError, AttributeError):
        return None
