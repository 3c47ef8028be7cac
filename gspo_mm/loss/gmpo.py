"""GMPO, geometric-mean policy optimisation (Zhao et al. 2025, arXiv 2507.20673).

    o_i = A_i exp( (1/L_i) Σ_t x̂_it ),    x̂_it = min( x_it, log(1 + clip_high) )  for A_i > 0
                                           x̂_it = max( x_it, log(1 − clip_low) )   for A_i < 0

The geometric mean of token ratios that are clipped *before* the mean, each with gradient 0 where it is: without clipping,
this is GSPO's s_i A_i. The paper clips to (e^−0.4, e^0.4).
"""

from __future__ import annotations

import torch

from gspo_mm.loss.surrogate import LossInputs, LossTerms, clipped_by, log_bounds, segment_sum


def gmpo(inputs: LossInputs) -> LossTerms:
    low, high = log_bounds(inputs.config)
    x_R, advantage_R, lengths_S = inputs.log_ratio, inputs.advantages, inputs.lengths
    clipped = clipped_by(inputs)
    bounded_R = x_R.masked_fill(clipped["low"], low).masked_fill(clipped["high"], high)
    advantage_S = advantage_R[lengths_S.cumsum(0) - 1]  # the same at all tokens of an answer
    mean_S = torch.exp(segment_sum(bounded_R, lengths_S) / lengths_S)
    return LossTerms(loss=-(mean_S * advantage_S), clipped=clipped)
