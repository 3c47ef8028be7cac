"""Processes that help the trainer: there until it has ended, and not longer."""

from __future__ import annotations

import ctypes
import signal

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
