"""Who trains in a run folder: one process at a time, the one that RUN/owners names last.

The files there are numbered, and stay. Whoever creates the next number with O_EXCL, which shared file systems keep to, is
the owner: of all that find the same one before them, one can. It writes its file again every BEAT seconds, through the
descriptor that created it, and at its end that it ended. Whether one that did not say so lives:

    the same machine   its process is there, or it is not
    another machine    the file changes within PATIENCE seconds, or it does not; clocks are not compared
    this Slurm job, before it was requeued: it does not
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

FOLDER = "owners"
BEAT = 2.0  # seconds between signs of life
PATIENCE = 20.0  # seconds without one until an owner on another machine is taken for dead
_ENDED = f"{'ended':12}"  # in place of a sign of life, and as long

type _Record = dict[str, Any]


class OwnerError(GspoError):
    """Another run works in the folder."""


class Owner:
    """This process as the owner of a run folder, until `release`."""

    def __init__(self, folder: Path) -> None:
        """Raises OwnerError naming the one who lives, or OSError."""
        self._folder = folder / FOLDER
        self._record = _this_process() | {
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": uuid.uuid4().hex,
        }
        self._ended = threading.Event()
        self._folder.mkdir(exist_ok=True)
        while True:
            number, former = check_free(folder)
            with suppress(FileExistsError):  # another was faster, and is looked at now
                self._create(number + 1)
                break
        self.note = ""  # what there is to say about a former owner
        if number and not _has_ended(former):
            self.note = f"{folder} was in use by {_named(former)}, which no longer runs: it is taken over"
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
        if (number := _last(self._folder)) and (other := _read(_file(self._folder, number))):
            self._ended.set()
            raise OwnerError(
                f"{self._folder.parent} was taken over by {_named(other)} while this run gave no sign of life for "
                f"{PATIENCE:g} s; this one stops"
            )
        self._folder.mkdir(exist_ok=True)
        with suppress(FileExistsError):  # it is there and cannot be read at this moment
            # It was removed by hand; the thread may still write to the file before.
            self._create(self._number)

    def release(self) -> None:
        """Leave the folder to others."""
        if self._ended.is_set() or self._record["pid"] != os.getpid():
            return
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            self._write(_ENDED)
        os.close(self._file)
        atexit.unregister(self.release)

    def _create(self, number: int) -> None:
        path = _file(self._folder, number)
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._number = number
        try:
            self._write(_beat(0))
        except OSError:
            path.unlink()
            raise

    def _write(self, beat: str) -> None:
        text = json.dumps(self._record | {"beat": beat}) + "\n"
        os.pwrite(self._file, text.encode(), 0)
        os.fsync(self._file)

    def _live(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT):
            beats += 1
            with suppress(OSError):  # a full disk, a lost server: the next one may be written
                self._write(_beat(beats))

    def _is_named(self) -> bool:
        found = _read(_file(self._folder, self._number)) or {}
        followed = _file(self._folder, self._number + 1).exists()
        return found.get("token") == self._record["token"] and not followed


_OWNED: dict[Path, Owner] = {}


def check_free(folder: Path) -> tuple[int, _Record]:
    """Number and record of the last owner, 0 and nothing where there was none. Raises OwnerError for one that lives."""
    if not (number := _last(folder / FOLDER)):
        return 0, {}
    path = _file(folder / FOLDER, number)
    owner = _read(path) or {}  # another is writing it at this moment, or it was cut off
    lives = _lives_here(owner)
    if lives is None:
        logger.warning("%s: looking for %g s whether %s still runs", folder, PATIENCE, _named(owner))
        deadline = time.monotonic() + PATIENCE
        while not lives and time.monotonic() < deadline:
            time.sleep(min(BEAT, PATIENCE) / 4)
            found = _read(path) or owner
            if _has_ended(found):
                return number, found
            lives = found != owner
            owner = found
    if lives:
        raise OwnerError(
            f"{folder} is in use by {_named(owner)}: wait until it has ended, or stop it, or choose another run.name"
        )
    return number, owner


def owner_of(folder: Path) -> tuple[str, bool | None]:
    """The owner that a folder names, for people, and whether it lives; None where this machine cannot know."""
    owner = _read(_file(folder / FOLDER, _last(folder / FOLDER))) or {}
    return ("", False) if not owner or _has_ended(owner) else (_named(owner), _lives_here(owner))


def _last(owners: Path) -> int:
    """The highest number there, 0 where there is none."""
    number = max((int(path.stem) for path in owners.glob("[0-9]*.json")), default=0)
    while _file(owners, number + 1).exists():  # a listing may be older than what is asked for by name
        number += 1
    return number


def _file(owners: Path, number: int) -> Path:
    return owners / f"{number:06d}.json"


def _beat(number: int) -> str:
    return f"{number:012d}"  # all as long, so that one can be written over another


def _has_ended(owner: _Record) -> bool:
    return owner.get("beat") == _ENDED


def _lives_here(owner: _Record) -> bool | None:
    """Whether an owner lives, as far as this machine knows; None when it does not."""
    this = _this_process()
    if not owner:
        return None
    if _has_ended(owner) or (
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


def _named(owner: _Record) -> str:
    if not owner:
        return "a run that left no name"
    job = f", Slurm job {owner['job']}" if owner["job"] else ""
    return f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}"


def _read(path: Path) -> _Record | None:
    """What the file says; None when it is not there or not whole."""
    try:
        found = json.loads(path.read_text())
        return found if found.keys() >= {*_this_process(), "since", "token", "beat"} else None
    except (OSError, ValueError, AttributeError):
        return None
