"""The frozen reference of the KL term: the policy's starting weights, kept on the host and swapped in to look."""

from __future__ import annotations

import torch

from gspo_mm.policy.compat import held_by
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.lora import without_adapters
from gspo_mm.types import MicroBatch


class Reference:
    """Holds a copy of the parameters as they are when it is made; of a policy with adapters, nothing: it leaves them out.

    Only built when `loss.kl_coef` is not 0.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        # beside adapters the weights are as they were
        self._weights = (
            []
            if policy.adapters
            else [[t.to("cpu", copy=True) for t in held_by(p)] for p in policy.parameters()]
        )

    @torch.no_grad()
    def logprobs(self, batches: list[MicroBatch], temperature: float) -> list[torch.Tensor]:
        """Log-probs [R] of each micro-batch under the reference; the policy's own weights are back afterwards."""
        if self._policy.adapters:
            self._policy.forget_features()
            with without_adapters(self._policy.adapters):
                found = self._policy.logprobs(batches, temperature=temperature)
            self._policy.forget_features()
            return found
        self._swap()
        try:
            return self._policy.logprobs(batches, temperature=temperature)
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, others in zip(self._policy.parameters(), self._weights, strict=True):
            for mine, other in zip(held_by(parameter), others, strict=True):
                kept = mine.to("cpu", copy=True)
                mine.copy_(other)
                other.copy_(kept)
