"""Groups of an earlier run instead of an engine: to debug a loss or a reward file without sampling anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gspo_mm.rollout.saved import list_steps, load_rollouts
from gspo_mm.types import GspoError, RolloutGroup


class Replay:
    """Hands out the saved rollouts of a run, save by save, from the start again when they run out.

    Scores and advantages are dropped: the stages to the right compute their own.
    """

    def __init__(self, run: str) -> None:
        """Raises GspoError when the run folder holds none."""
        self._run, self._steps = Path(run), list_steps(Path(run))
        if not self._steps:
            raise GspoError(
                f"rollout.replay={run} holds no saved rollouts; run it with observe.save_rollouts_every=1"
            )

    def groups(self, step: int) -> list[RolloutGroup]:
        saved = load_rollouts(self._run, self._steps[step % len(self._steps)])
        return [replace(group, scores=(), advantages=()) for group in saved]
