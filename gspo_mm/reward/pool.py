"""Reward parts run in worker processes (runtime/workers.py).

A worker judges the completions of a group one after the other. Where that takes too long or its process dies, each
completion of that group is judged again, alone and with the whole time, so that only those fail that are to blame.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from gspo_mm.reward.spec import Judged, RewardFunction, RewardSpec
from gspo_mm.runtime.workers import WorkerError, Workers
from gspo_mm.types import Completion, EncodedImage, Prompt, Turn


class WorkerPool:
    """Runs `RewardFunction.judge`. Processes start with the first call; they end with `close` or this process."""

    def __init__(
        self, functions: Sequence[RewardFunction], *, workers: int | None, timeout: float, memory_gib: float
    ) -> None:
        """`timeout` is in seconds, for one completion; `memory_gib` for one worker; workers null: by the cores."""
        self._functions = list(functions)
        self._workers = Workers(
            _begin,
            [[(f.spec, f.file) for f in functions]],
            workers=workers,
            timeout=timeout,
            memory_gib=memory_gib,
            limits="reward",
        )

    async def judge(
        self, function: RewardFunction, prompt: Prompt, completions: Sequence[Completion]
    ) -> list[Judged]:
        """One result per completion. Raises RewardFileError where no part covers the prompt's task."""
        number = self._functions.index(function)
        prompt, completions = seen_by_parts(prompt, completions, images=function.reads_images)
        try:
            return await self._workers.run(_judge, number, prompt, completions)
        except WorkerError:
            return list(await asyncio.gather(*(self._judge_one(number, prompt, c) for c in completions)))

    def close(self) -> None:
        """End the workers, in the middle of what they do."""
        self._workers.close()

    async def _judge_one(self, number: int, prompt: Prompt, completion: Completion) -> Judged:
        try:
            return (await self._workers.run(_judge, number, prompt, [completion]))[0]
        except WorkerError as fault:
            return Judged(values={}, error=str(fault))


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
    return replace(prompt, images=shown(prompt.images), pages=shown(prompt.pages)), answers


# What follows runs in a worker.

_functions: list[RewardFunction] = []


def _begin(specs: list[tuple[RewardSpec, str]]) -> None:
    _functions.extend(RewardFunction(spec, file=file, asks=False) for spec, file in specs)


def _judge(number: int, prompt: Prompt, completions: Sequence[Completion]) -> list[Judged]:
    return [_functions[number].judge(prompt, completion) for completion in completions]
