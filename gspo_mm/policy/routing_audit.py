"""How many of a policy's routing decisions its updates change: looked at on a few sequences, when it is asked for.

A decision is one expert that a router gives a token: top-k of them per token and mixture layer. Those of before are kept in
host memory until they are compared; nothing is computed with them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from typing import Any, Self

import torch

from gspo_mm.batch import Pixels, pack
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.expert_load import routers
from gspo_mm.types import MicroBatch, Share

_SEQUENCES = 4  # looked at of a micro-batch, at most


class RoutingAudit:
    """The decisions of the policy as it was when this was made; `compare` holds those of now against them."""

    def __init__(self, policy: Policy, batches: list[MicroBatch]) -> None:
        """One forward pass over this rank's `batches`, which are equally many on every rank. A collective."""
        self._policy, self._batches = policy, batches
        self._before = self._look()

    @classmethod
    def of(cls, policy: Policy, share: Share, processor: Pixels) -> Self:
        """Looks at a few sequences all over a micro-batch of the share, or of as many as a pipeline wants at once."""
        several = share.micro_batches[: policy.plan.pp]
        few = [members[:: max(1, math.ceil(len(members) / _SEQUENCES))] for members in several]
        return cls(policy, [pack(members, processor) for members in few])

    def compare(self) -> dict[str, float]:
        """Metrics, the same on every rank; none for a dense model. A collective.

        routing/agree          fraction of the decisions that are the same
        routing/agree/<layer>  of those of one layer
        """
        now = self._look()
        own = {layer: (int((old & now[layer]).sum()), int(old.sum())) for layer, old in self._before.items()}
        same: dict[int, int] = defaultdict(int)
        made: dict[int, int] = defaultdict(int)
        # each rank has tokens of its own (tp, cp, dp), or layers of its own (pp)
        for of_rank in self._policy.ranks.gather(own):
            for layer, (agreed, decisions) in of_rank.items():
                same[layer] += agreed
                made[layer] += decisions
        if not sum(made.values()):
            return {}
        return {
            "routing/agree": sum(same.values()) / sum(made.values()),
            **{f"routing/agree/{layer:02d}": same[layer] / made[layer] for layer in sorted(made)},
        }

    def _look(self) -> dict[int, torch.Tensor]:
        """By layer of the whole model, [tokens, experts] bool: whether a token of this rank, padding left out, is given one."""
        found: dict[int, list[torch.Tensor]] = defaultdict(list)

        def note(of_layer: list[torch.Tensor], chunk: Any, *call: Any) -> None:
            *_, (_, chosen) = call
            of_layer.append((chosen.view(len(chunk.real_rows), -1)[chunk.real_rows] != 0).cpu())

        hooks = [
            router.register_forward_hook(partial(note, found[layer], chunk))
            for chunk, layer, router in routers(self._policy.chunks)
        ]
        try:
            self._policy.logprobs(self._batches)
        finally:
            for hook in hooks:
                hook.remove()
        return {layer: torch.cat(parts) for layer, parts in found.items()}
