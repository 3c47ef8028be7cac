"""Worker processes in which reward parts run, so that none of them can stop, stall or starve the trainer.

A worker judges the completions of a group one after the other. One that runs over its time is killed and another
started; so is one that dies. Then each completion of that group is judged again, alone and with the whole time, so
that only those fail that are to blame. A part that asks for more memory than a worker has gets a MemoryError, which is
a failed reward like any other exception.

Killing a process is the only limit that holds for code such as sympy's: signals and alarms break in threads.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import signal
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as RanOut
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker
from typing import Any

from pebble import CONSTS, ProcessExpired, ProcessPool

from gspo_mm.reward.spec import Judged, RewardFunction, RewardSpec
from gspo_mm.runtime.parent import FOR_THE_TRAINER, die_with_parent, let_forkserver_end
from gspo_mm.types import Completion, EncodedImage, GspoError, Prompt, Turn


class WorkerPool:
    """Runs `RewardFunction.judge`. Processes start with the first call; they end with `close` or this process."""

    def __init__(
        self, functions: Sequence[RewardFunction], *, workers: int | None, timeout: float, memory_gib: float
    ) -> None:
        """`timeout` is in seconds, for one completion; `memory_gib` for one worker; workers null: by the cores."""
        self._functions = list(functions)
        self._timeout = timeout
        self._memory = memory_gib
        _start_forking()
        context = multiprocessing.get_context("forkserver")
        CONSTS.term_timeout = 0.1  # seconds until a worker that ignores TERM is killed
        self._pool = ProcessPool(
            max_workers=workers or default_workers(),
            context=context,
            initializer=_begin,
            initargs=([(f.spec, f.file) for f in functions], memory_gib),
        )

    async def judge(
        self, function: RewardFunction, prompt: Prompt, completions: Sequence[Completion]
    ) -> list[Judged]:
        """One result per completion. Raises RewardFileError where no part covers the prompt's task."""
        number = self._functions.index(function)
        prompt, completions = seen_by_parts(prompt, completions, images=function.reads_images)
        try:
            return await self._start(number, prompt, completions)
        except BrokenProcessPool:
            raise GspoError(
                f"no worker of the rewards could start for {function.file}; the log says why, above"
            ) from None
        except (RanOut, ProcessExpired):
            return list(await asyncio.gather(*(self._judge_one(number, prompt, c) for c in completions)))

    def close(self) -> None:
        """End the workers, in the middle of what they do."""
        self._pool.stop()
        self._pool.join()

    async def _judge_one(self, number: int, prompt: Prompt, completion: Completion) -> Judged:
        try:
            return (await self._start(number, prompt, [completion]))[0]
        except RanOut:
            error = f"took more than reward.timeout={self._timeout:g} s"
        except ProcessExpired as fault:
            error = f"its process died with exit status {fault.exitcode} (reward.memory_gib={self._memory:g})"
        return Judged(values={}, error=error)

    async def _start(self, number: int, prompt: Prompt, completions: Sequence[Completion]) -> list[Judged]:
        asked = (number, prompt, completions)
        future: Future[Any] = self._pool.schedule(_judge, args=asked, timeout=self._timeout)
        return await asyncio.wrap_future(future)


def _start_forking() -> None:
    """Start the process that forks workers: the trainer's threads and GPUs cannot be forked. It knows this package only.

    It and they ignore what ends the trainer in order: Slurm sends TERM to all processes of a step, and the trainer's
    last step still needs its rewards.
    """
    forkserver.set_forkserver_preload([__name__])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)  # children inherit it
    try:
        resource_tracker.ensure_running()  # unblocks INT and TERM, which it ignores by itself
        signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def default_workers() -> int:
    """Half of the cores that this process may use, 8 at most: the other half trains or serves."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


def seen_by_parts(
    prompt: Prompt, completions: Sequence[Completion], *, images: bool
) -> tuple[Prompt, list[Completion]]:
    """What a part may ask for, and a worker is sent: no log-probs, no versions, and bytes of `images` only if wanted."""

    def shown(all_of_them: tuple[EncodedImage, ...]) -> tuple[EncodedImage, ...]:
        return all_of_them if images else tuple(replace(image, data=b"") for image in all_of_them)

    def slim(turn: Turn) -> Turn:
        seen = turn.observation
        read = replace(seen, images=shown(seen.images)) if seen else None
        return replace(turn, logprobs=(), versions=(), observation=read)

    answers = [replace(c, turns=tuple(map(slim, c.turns))) for c in completions]
    return replace(prompt, images=shown(prompt.images)), answers


# What follows runs in a worker.

_functions: list[RewardFunction] = []


def _begin(specs: list[tuple[RewardSpec, str]], memory_gib: float) -> None:
    let_forkserver_end()
    die_with_parent()
    _functions.extend(RewardFunction(spec, file=file, asks=False) for spec, file in specs)
    # data, not address space: libraries map far more than they ever touch
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _judge(number: int, prompt: Prompt, completions: Sequence[Completion]) -> list[Judged]:
    return [_functions[number].judge(prompt, completion) for completion in completions]
