"""Tokens that rounding may send to another expert: two programs need not agree on them, nor on what comes after."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from gspo_mm.batch import pack
from gspo_mm.data.processor import Processor
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.expert_load import routers
from gspo_mm.types import TrainSequence

# Router logits of the tiny models in float32 are up to 1.1e-6 from those in float64, so two programs' are up to twice
# that apart; weights that were perturbed several times are larger.
_TIE = 5e-6


def logprobs_and_comparable(
    policy: Policy, processor: Processor, sequence: TrainSequence
) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's log-probs [R], and which of them another program must have, too: [R] bool.

    A token whose last expert in and first expert out are all but equal goes to either, and moves all that come after it.
    """
    near: list[torch.Tensor] = []

    def look(router: Any, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        hidden = inputs[0].flatten(0, -2)
        best = torch.nn.functional.linear(hidden, router.weight).topk(router.topk + 1).values
        near.append(best[:, -2] - best[:, -1] < _TIE)

    found = [router for _, _, router in routers(policy.chunks)]
    with ExitStack() as stack:
        for router in found:
            stack.callback(router.register_forward_hook(look).remove)
        (own,) = policy.logprobs([pack([sequence], processor)])
    assert own is not None
    assert len(near) == len(found) > 0, "a mixture"
    ties = torch.stack(near).any(0).nonzero().flatten()
    first = int(ties[0]) if len(ties) else len(sequence.token_ids)
    trained = torch.from_numpy(sequence.trained).nonzero().flatten()
    return own, trained <= first  # a token's log-prob is made of those before it
