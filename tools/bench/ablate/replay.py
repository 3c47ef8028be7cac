"""Routing replay, which GSPO does without: updates use the experts that the old policy chose, not those they would choose.

Only here, to compare with: nothing in gspo_mm records what a token was routed to. The choices are recorded in the pass that
gives the old log-probs and used in the updates ("R2": the trainer's own choices, not the rollout engine's), through
megatron-core's RouterReplay (transformer/moe/router_replay.py). Weights of the chosen experts are still the router's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from gspo_mm.plan.model import read_model
from gspo_mm.policy.engine import Policy

SETTING = "policy.megatron.moe_enable_routing_replay=true"
_STORED = torch.uint8  # an expert's number, of at most 256


class Replay:
    """The experts that each token of the batches under way was given. The policy was built with `SETTING`."""

    def __init__(self, policy: Policy) -> None:
        (chunk,) = policy.chunks
        chunk.register_forward_pre_hook(self._before)
        chunk.register_forward_hook(self._after)
        self._kept: dict[tuple[str, ...], list[torch.Tensor]] = {}  # [N, k] of each layer, by micro-batch
        self._action: RouterReplayAction | None = None
        self.bytes = self.tokens = 0  # recorded so far
        self.seconds = 0.0  # of keeping and bringing back, so far

    def recording(self) -> Any:
        return self._during(RouterReplayAction.RECORD)

    def replaying(self) -> Any:
        """Every micro-batch that was recorded is used once, and then forgotten."""
        return self._during(RouterReplayAction.REPLAY_FORWARD)

    def found(self) -> dict[str, float]:
        return {
            "bytes_per_token": self.bytes / max(self.tokens, 1),
            "bytes": self.bytes,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    @contextmanager
    def _during(self, action: RouterReplayAction) -> Iterator[None]:
        self._action = action
        RouterReplay.set_global_router_replay_action(action)
        try:
            yield
        finally:
            self._action = None
            RouterReplay.clear_global_router_replay_action()
            RouterReplay.clear_global_indices()

    def _before(self, _: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if self._action is RouterReplayAction.REPLAY_FORWARD:
            began = time.perf_counter()
            RouterReplay.clear_global_indices()
            RouterReplay.set_replay_data([of_layer.long() for of_layer in self._kept.pop(args[0].names)])
            self.seconds += time.perf_counter() - began

    def _after(self, _: torch.nn.Module, args: tuple[Any, ...], __: Any) -> None:
        if self._action is RouterReplayAction.RECORD:
            began = time.perf_counter()
            kept = [of_layer.to("cpu", _STORED) for of_layer in RouterReplay.get_recorded_data()]
            self._kept[args[0].names] = kept
            self.bytes += sum(of_layer.nbytes for of_layer in kept)
            self.tokens += len(kept[0])
            self.seconds += time.perf_counter() - began


def cache_of(model: str, *, tokens: int) -> dict[str, Any]:
    """What the replay of one answer of so many tokens takes for a published model.

    As little as can be, a byte for each choice, and as servers send it and megatron takes it: int32 and int64. `seconds`:
    measured on this machine's CPU, of making the bytes from int64 and int64 from the bytes; no transfer is in it.
    """
    sizes = read_model(model)
    choices = sum(sizes.mixtures) * sizes.chosen * tokens
    routes = torch.randint(sizes.experts, (choices,))
    began = time.perf_counter()
    routes.to(_STORED).long()
    seconds = time.perf_counter() - began
    return {
        "model": model,
        "tokens": tokens,
        "bytes_per_token": choices / tokens,
        "uint8": choices,
        "int32": 4 * choices,
        "int64": 8 * choices,
        "seconds": seconds,
    }
