"""Groups of an earlier run instead of an engine: to debug a loss or a reward file without sampling anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gspo_mm.types import GspoError, RolloutGroup


class Replay:
    """Hands out the saved rollouts of a run, save by save, from the start again when they run out.

    Scores and advantages are dropped: the stages to the right compute their own.
    """

    def __init__(self, steps: list[int], load: Callable[[int], list[RolloutGroup]], *, source: str) -> None:
        if not steps:
            raise GspoError(
                f"rollout.replay={source} holds no saved rollouts; run it with observe.save_rollouts_every=1"
            )
        self._steps = steps
        self._load = load

    def groups(self, step: int) -> list[RolloutGroup]:
        saved = self._load(self._steps[step % len(self._steps)])
        return [replace(group, scores=(), advantages=()) for group in saved]
