"""Worker processes for code that is not ours, so that none of it can stop, stall or starve the trainer.

A call that runs over its time has its process killed, and another is started; so it is with one that dies. Code that asks
for more memory than a worker has gets a MemoryError. Killing a process is the only limit that holds for code such as
sympy's: signals and alarms break in threads.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as RanOut
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from typing import Any

from pebble import CONSTS, ProcessExpired, ProcessPool

from gspo_mm.runtime.parent import FOR_THE_TRAINER, die_with_parent, let_forkserver_end
from gspo_mm.types import GspoError


class WorkerError(Exception):
    """A call did not come back: it took too long, or its process died."""


class Workers:
    """Runs functions. Processes start with the first call; they end with `close` or this process."""

    def __init__(
        self,
        begin: Callable[..., None],
        arguments: Sequence[Any],
        *,
        workers: int | None,
        timeout: float,
        memory_gib: float,
        limits: str,
    ) -> None:
        """`begin(*arguments)` is called in each process first.

        `timeout` is in seconds for one call, `memory_gib` for one worker; workers null: by the cores. `limits`: the section
        that they are keys of.
        """
        self._timeout, self._memory, self._limits = timeout, memory_gib, limits
        _start_forking(begin.__module__)
        CONSTS.term_timeout = 0.1  # seconds until a worker that ignores TERM is killed
        self._pool = ProcessPool(
            max_workers=workers or default_workers(),
            context=multiprocessing.get_context("forkserver"),
            initializer=_begin,
            initargs=(begin, tuple(arguments), memory_gib),
        )

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Its result. Raises what it raises, WorkerError, or GspoError where no process can begin."""
        future: Future[Any] = self._pool.schedule(function, args=arguments, timeout=self._timeout)
        try:
            return await asyncio.wrap_future(future)
        except BrokenProcessPool:
            raise GspoError(f"no worker of `{self._limits}` could start; the log says why, above") from None
        except RanOut:
            raise WorkerError(f"took more than {self._limits}.timeout={self._timeout:g} s") from None
        except ProcessExpired as fault:
            raise WorkerError(
                f"its process died with exit status {fault.exitcode} ({self._limits}.memory_gib={self._memory:g})"
            ) from None

    def close(self) -> None:
        """End the workers, in the middle of what they do."""
        self._pool.stop()
        self._pool.join()


def default_workers() -> int:
    """Half of the cores that this process may use, 8 at most: the other half trains or serves."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


def _start_forking(module: str) -> None:
    """Start the process that forks workers: the trainer's threads and GPUs cannot be forked. It knows `module` only.

    It and they ignore what ends the trainer in order: Slurm sends TERM to all processes of a step, and the trainer's
    last step still needs its rewards.
    """
    forkserver.set_forkserver_preload([module])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)  # children inherit it
    try:
        resource_tracker.ensure_running()  # unblocks INT and TERM, which it ignores by itself
        signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(begin: Callable[..., None], arguments: tuple[Any, ...], memory_gib: float) -> None:
    """In a worker."""
    let_forkserver_end()
    die_with_parent()
    begin(*arguments)
    # data, not address space: libraries map far more than they ever touch
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
