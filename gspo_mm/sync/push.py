"""Bring the policy's weights to whatever samples with them: one protocol, and one class for each rollout engine."""

from __future__ import annotations

from typing import Protocol

from gspo_mm.config import Config
from gspo_mm.config.engines import ENGINES
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.engine import RolloutEngine


class WeightPush(Protocol):
    """Makes the engine sample with the policy's weights. Every method but `serve_folder` is a collective."""

    def __init__(self, config: Config, policy: Policy, engine: RolloutEngine | None) -> None:
        """`engine` is None on ranks other than 0, and when replaying."""
        ...

    def push(self, *, version: int) -> None:
        """All weights, under `version`. Raises ValueError or a GspoError when one would be left stale."""
        ...

    def make_room(self) -> None:
        """Nothing will be sampled before the next push: the engine may give its memory to training."""
        ...

    def close(self) -> None: ...

    @staticmethod
    def serve_folder(config: Config, engine: RolloutEngine) -> None:
        """Let the engine answer with the weights in `model.path`, without any policy."""
        ...


def push_of(config: Config) -> type[WeightPush]:
    """The class for `rollout.engine`; when replaying, one that brings the weights nowhere."""
    return ENGINES["embedded" if config.rollout.replay else config.rollout.engine].push()
