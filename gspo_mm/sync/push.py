"""Bring the policy's weights to the rollout engine.

In one process this is a copy, tensor by tensor, through the family's weight map: the same Hugging Face names
and layout that a server or a checkpoint gets, so a fault in the map shows here first.
"""

from __future__ import annotations

from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.engine import RolloutEngine


def push_weights(policy: Policy, engine: RolloutEngine, *, version: int) -> None:
    """Load every weight of `policy` into `engine` under `version`; raises ValueError when one is left stale."""
    engine.load_weights(policy.export(), version=version)
