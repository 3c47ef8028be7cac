"""CISPO, clipped importance-sampling weights (MiniMax-M1 2025, arXiv 2506.13585, eq. 4 and 5).

    o_it = sg[ clip(ρ_it, 1 − clip_low, 1 + clip_high) ] A_it log π_θ(y_it)

No token loses its gradient: what is clipped is its weight, whatever the sign of A. The paper has no lower bound and does not
say its upper one; 5 is what TRL recommends, after ScaleRL (arXiv 2510.13786). The value holds log π and says nothing by itself.
"""

from __future__ import annotations

from gspo_mm.loss.surrogate import LossInputs, LossTerms, log_bounds


def cispo(inputs: LossInputs) -> LossTerms:
    low, high = log_bounds(inputs.config)
    log_ratio_R = inputs.log_ratio.detach()
    weight_R = log_ratio_R.clamp(low, high).exp()
    return LossTerms(
        loss=-(weight_R * inputs.advantages * inputs.logprobs),
        clipped={"low": log_ratio_R < low, "high": log_ratio_R > high},
    )
