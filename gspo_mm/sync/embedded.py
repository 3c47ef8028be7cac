"""Weights to the engine in this process: a copy, tensor by tensor, under the Hugging Face names that a checkpoint gets.

So a fault in the weight map shows here first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gspo_mm.config import Config
from gspo_mm.families.folder import read_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.rollout.engine import RolloutEngine


class EmbeddedPush:
    """Copies into the embedded engine of rank 0; the other ranks give their parts of the weights."""

    def __init__(self, config: Config, policy: Policy, engine: RolloutEngine | None) -> None:
        assert engine is None or isinstance(engine, EmbeddedEngine)
        self._policy = policy
        self._engine = engine

    def push(self, *, version: int) -> None:
        def load(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
            if self._engine is not None:
                self._engine.load_weights(tensors, version=version)

        self._policy.ranks.stream_to_main(self._policy.export(), load)

    def make_room(self) -> None:
        pass

    def close(self) -> None:
        pass

    @staticmethod
    def serve_folder(config: Config, engine: RolloutEngine) -> None:
        assert isinstance(engine, EmbeddedEngine)
        engine.load_weights(read_hf(config.model.path, config.model.experts_layout), version=0)
