"""The rollout engines: what `rollout.engine` names. Another one is a line here and its modules.

Modules are named by their paths, since they stand to the right of the config and import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where an engine is."""

    rollout: str  # module:class, a `rollout.engine.Opening`
    sync: str  # module:class, a `sync.push.WeightPush`
    serves: bool  # whether it answers beside the training, as a `rollout.engine.ServingEngine` does

    def opening(self) -> Any:
        return _load(self.rollout)

    def push(self) -> Any:
        return _load(self.sync)


ENGINES = {
    "embedded": Engine(
        rollout="gspo_mm.rollout.embedded:EmbeddedOpening",
        sync="gspo_mm.sync.embedded:EmbeddedPush",
        serves=False,
    ),
    "sglang": Engine(
        rollout="gspo_mm.rollout.sglang:SGLangOpening", sync="gspo_mm.sync.sglang:SGLangPush", serves=True
    ),
}


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
