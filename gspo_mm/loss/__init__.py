"""The policy loss: a pure function of packed tensors (`gspo`), in the variants of `table`."""

from gspo_mm.loss.gspo import LossOutput, check_clip_can_act, policy_loss
from gspo_mm.loss.metrics import reduce_metrics, summarize
from gspo_mm.loss.surrogate import LossInputs, LossTerms

__all__ = [
    "LossInputs",
    "LossOutput",
    "LossTerms",
    "check_clip_can_act",
    "policy_loss",
    "reduce_metrics",
    "summarize",
]
