"""The policy loss: a pure function of packed tensors (`gspo`)."""

from gspo_mm.loss.gspo import LossOutput, check_clip_can_act, policy_loss, reduce_metrics

__all__ = ["LossOutput", "check_clip_can_act", "policy_loss", "reduce_metrics"]
