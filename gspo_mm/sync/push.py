"""Bring the policy's weights to the rollout engine.

In one process this is a copy, tensor by tensor, through the family's weight map: the same Hugging Face names
and layout that a server or a checkpoint gets, so a fault in the map shows here first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.engine import RolloutEngine


def push_weights(policy: Policy, engine: RolloutEngine | None, *, version: int) -> None:
    """Load every weight of `policy` into `engine` under `version`; raises ValueError when one is left stale.

    A collective: rank 0 has the engine, the other ranks give their parts of the weights.
    """

    def load(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        if engine is not None:
            engine.load_weights(tensors, version=version)

    policy.ranks.stream_to_main(policy.export(), load)
