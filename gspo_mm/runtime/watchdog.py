"""Ends a run that is stuck, and says where every rank of it stood.

Whatever makes progress calls `beat`: a phase begins, a micro-batch is through, an answer has come. A rank without a beat
is stuck, unless rank 0 still has some: that is what it waits for. Rank 0 writes its place into RUN/progress.json, also
for `gspo-mm status`.

A rank that is stuck writes the stacks of its threads into RUN/hangs/ and ends; those of a rank that cannot (it is
stopped, or holds Python's lock) another on its machine writes by py-spy. Checkpoints that are published stay.

A rank whose launcher (srun's slurmstepd, torchrun) is gone ends too: nobody could stop it any more.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gspo_mm.runtime.disk import written_whole

if TYPE_CHECKING:
    from gspo_mm.runtime.dist import Ranks

logger = logging.getLogger(__name__)

FILE, FOLDER = "progress.json", "hangs"
STATUS = 3  # of a process that was ended for being stuck
_LOOK = 5.0  # seconds between looks, and between writes of the file
_GRACE = 10.0  # seconds for the ranks of a machine to write their stacks

_beats = 0


def beat() -> None:
    """This process makes progress. Cheap, from any thread; one that is lost among several does no harm."""
    global _beats
    _beats += 1


class Watchdog:
    """Context manager around a run's steps, on every rank. Making it is a collective."""

    def __init__(self, folder: Path, ranks: Ranks, *, timeout: float) -> None:
        """`timeout`: seconds without a beat after which the run is stuck; 0: it never is."""
        self.place: dict[str, Any] = {}  # step and phase, set by the loop
        self._folder = folder
        self._main, self._rank, self._timeout = ranks.main, ranks.rank, timeout
        numbered = dict(enumerate(ranks.gather(os.getpid())))
        (here,) = (machine for machine in ranks.machines if ranks.rank in machine)
        self._others = {rank: numbered[rank] for rank in here if rank != ranks.rank}
        launched = ranks.size > 1 or "SLURM_STEP_ID" in os.environ
        self._launcher = os.getppid() if launched else None
        self._ended = threading.Event()
        self._seen, self._of_main = (-1, ""), ""

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        look = min(_LOOK, self._timeout / 10) if self._timeout else _LOOK
        changed = time.monotonic()
        while not self._ended.wait(look):
            if self._launcher and os.getppid() != self._launcher:
                logger.error(
                    "what started rank %d has ended, so that nobody could stop it: it ends", self._rank
                )
                os._exit(STATUS)
            if self._moved():
                changed = time.monotonic()
            elif self._timeout and time.monotonic() - changed > self._timeout:
                self._end_stuck()

    def _moved(self) -> bool:
        """Whether this rank or rank 0 had a beat since the last look."""
        seen, self._seen = self._seen, (_beats, self._tell() if self._main else self._told())
        return seen != self._seen

    def _tell(self) -> str:
        """Write the file, when there is something new to say."""
        if _beats != self._seen[0]:
            now = {**self.place, "beats": _beats, "time": time.time()}
            with suppress(OSError), written_whole(self._folder / FILE) as file:  # the next one may be written
                file.write_text(json.dumps(now) + "\n")
        return ""

    def _told(self) -> str:
        """What rank 0 said last."""
        with suppress(OSError):
            self._of_main = (self._folder / FILE).read_text()
        return self._of_main

    def _end_stuck(self) -> None:
        stacks = self._folder / FOLDER / f"step-{self.place.get('step', 0):08d}"
        logger.error(
            "rank %d has made no progress for run.hang_timeout=%g s (%s): ending it; where the ranks stood is in %s, and "
            "the same command goes on from the last checkpoint",
            self._rank,
            self._timeout,
            self.place.get("phase", "between phases"),
            stacks,
        )
        with suppress(OSError):
            stacks.mkdir(parents=True, exist_ok=True)
            with (stacks / f"rank-{self._rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            self._look_into_others(stacks)
        os._exit(STATUS)

    def _look_into_others(self, stacks: Path) -> None:
        """Write the stacks of the machine's ranks that do not do it themselves."""
        files = {pid: stacks / f"rank-{rank:05d}.txt" for rank, pid in self._others.items()}
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and not all(file.exists() for file in files.values()):
            time.sleep(0.2)
        tool = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
        if tool is None:
            return
        for pid, file in files.items():
            with suppress(FileExistsError), file.open("x") as output:
                # not the usual pause of the process while it is looked at: it may be stopped
                command = [tool, "dump", "--nonblocking", "--pid", str(pid)]
                subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=60)
