"""The policy loss: a pure function of packed tensors (`gspo`)."""

from gspo_mm.loss.gspo import LossOutput, check_clip_can_act, policy_loss
from gspo_mm.loss.metrics import reduce_metrics, summarize

__all__ = ["LossOutput", "check_clip_can_act", "policy_loss", "reduce_metrics", "summarize"]
