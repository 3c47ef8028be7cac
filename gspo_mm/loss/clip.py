"""The clipped surrogate of PPO, at every level: GSPO, GSPO-token, GRPO, Dr. GRPO, DAPO.

    o(ρ, A) = min( ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A )              GSPO eq. 5, eq. 13
    o(ρ, A) ← max( o, dual_clip · A )   for A < 0, where `dual_clip` is set   Ye et al., arXiv 1912.09729

The gradient of what is clipped is exactly 0: A > 0 and ρ > 1 + clip_high (high), A < 0 and ρ < 1 − clip_low (low), or
A < 0 and ρ > dual_clip (dual). A ratio outside the range whose advantage pulls it back is not clipped.
"""

from __future__ import annotations

import math

import torch

from gspo_mm.loss.surrogate import LossInputs, LossTerms, clipped_by


def clip(inputs: LossInputs) -> LossTerms:
    config, log_ratio_U, advantage_U = inputs.config, inputs.log_ratio, inputs.advantages
    clipped = clipped_by(inputs)
    bounds = {"low": 1.0 - (config.clip_low or 0.0), "high": 1.0 + (config.clip_high or 0.0)}
    if config.dual_clip is not None:
        clipped["dual"] = (advantage_U < 0) & (log_ratio_U > math.log(config.dual_clip))
        bounds["dual"] = config.dual_clip
    # A clipped ratio is replaced before exp, not after: exp may overflow there, and 0 · inf is NaN in the
    # gradient.
    any_U = torch.stack(list(clipped.values())).any(0)
    ratio_U = torch.exp(log_ratio_U.masked_fill(any_U, 0.0))
    for name, mask_U in clipped.items():
        ratio_U = ratio_U.masked_fill(mask_U, bounds[name])
    return LossTerms(loss=-(ratio_U * advantage_U), clipped=clipped)
