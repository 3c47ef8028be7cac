"""Runs a command that must not outlive the process that asked for it, whatever ends that process.

    python -m gspo_mm.serving.guard PARENT COMMAND ...

The guard is a process of its own between the two. It notices within a fraction of a second when its parent is gone,
kill -9 included, and then ends the command with everything that it started: TERM first, KILL for what is left. It
makes itself the reaper of orphans, so that grandchildren whose own parent died are found as well; the command in
turn dies with the guard.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

from gspo_mm.runtime.parent import die_with_parent

_POLL = 0.2  # seconds
_GRACE = 5.0  # seconds between TERM and KILL
_PR_SET_CHILD_SUBREAPER = 36


def guarded(command: list[str]) -> list[str]:
    """`command`, to be started under a guard by this process."""
    # the parent is named because it may be gone before the guard could ask who it was
    return [sys.executable, "-m", "gspo_mm.serving.guard", str(os.getpid()), *command]


def main(parent: int, command: list[str]) -> int:
    """Run the command until it ends, the parent ends or a signal asks; returns an exit status."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: stopping.append(received))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm may send its warning to all processes of a step
    child = subprocess.Popen(
        command,
        start_new_session=True,  # a terminal's Ctrl-C is for the trainer, which then stops us in order
        preexec_fn=die_with_parent,
    )
    while child.poll() is None and not stopping and os.getppid() == parent:
        time.sleep(_POLL)
    end_all(psutil.Process().children(recursive=True))
    return child.wait()


def end_all(processes: list[psutil.Process]) -> None:
    """TERM, some seconds of grace, KILL: for the processes and whatever they start meanwhile.

    Reaps none of them, as psutil.wait_procs would: the exit status of the command is still to be asked for.
    """
    for process in processes:
        _send(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while any(_runs(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL / 4)
    while left := [p for p in psutil.Process().children(recursive=True) if _runs(p)]:
        for process in left:
            _send(process, signal.SIGKILL)
        time.sleep(_POLL / 4)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
