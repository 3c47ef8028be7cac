"""Processes that help the trainer: there until it has ended, and not longer."""

from __future__ import annotations

import ctypes
import os
import signal
from multiprocessing import forkserver

_PR_SET_PDEATHSIG = 1

# what is sent to all processes of a terminal or of a Slurm step, and is meant for the trainer: it stops in order
FOR_THE_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def die_with_parent() -> None:
    """End this process at once when the thread that started it is gone, however stuck this one is."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end_only_with_parent() -> None:
    """For a helper of the trainer: it is there until the trainer has ended, and not longer."""
    die_with_parent()
    for number in FOR_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)


def let_forkserver_end() -> None:
    """In a worker: Python's process that forks ends with the trainer, once nobody holds this end of its pipe.

    A worker that is stuck would hold it. Python 3.12 has no public name for it.
    """
    os.close(getattr(forkserver, "_forkserver")._forkserver_alive_fd)  # noqa: B009
