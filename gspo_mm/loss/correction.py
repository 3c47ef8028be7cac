"""Mismatch between the engine that sampled and the policy that is trained, judged by whole sequences.

An answer y_i was sampled by the rollout engine; the policy with the same weights gives its tokens slightly other
log-probs (other kernels, number formats, and with experts now and then another route):

    d_it = log π_old(y_it) − log π_rollout(y_it)
    c_i  = exp( (1/L_i) Σ_t d_it )                the length-normalised sequence ratio: geometric mean of token ratios

`loss.correction` makes of it a constant w_i (no gradient), which multiplies every surrogate o_it of the answer, at
all levels of gspo.py:

    none      w_i = 1
    truncate  w_i = min( c_i, high )              TIS: Yao et al. 2025, fengyao.notion.site/off-policy-rl
    mask      w_i = 1 if low ≤ c_i ≤ high else 0  geometric rejection: Liu et al. 2025, richardli.xyz/rl-collapse;
                                                  IcePop (Ling Team 2025, arXiv 2510.18855) does so with tokens

    loss = − Σ_i w_i Σ_t a_i o_it  +  KL term, which gets no weight

Nothing else is touched: not the response mask, not L_i, not s_i, not the clipping, and not the denominators of
a_i. An answer of weight 0 adds 0 and still counts in S and N, so weights need no collective and the split over
micro-batches and ranks cannot matter.

Why the normalised ratio: the importance weight that would remove the bias is Π_t exp(d_it), and at 1e-3 nats a
token it has grown to e^3 after 3,000 tokens; it would weigh, or reject, answers by their length. c_i means the same
at any length and stays near 1, at the price of being no unbiased weight. Bounds for token ratios (0.5, 2, 5) hardly
ever act on it. With 0.05 nats of noise a token, c_i wanders by 0.05 / √L: 0.002 at 1,000 tokens, 0.016 at 10. The
default bounds, 1 ± 0.02, are for what stands out from that at any length; verl's 0.999 to 1.001 is for long answers.
Look at mismatch/ratio_p01 and mismatch/ratio_p99 of a run before narrowing them.

Deviations: the sources of truncate weigh tokens, or sequences by the product. IcePop keeps the ratio as weight where
it does not mask; here that is 1, since c_i there differs from 1 by less than the bounds allow. verl takes rejected
sequences out of the denominator, here they stay.

Metrics, for all kinds (estimators of KL(π_rollout ‖ π_old), whose samples the rollouts are:
joschu.net/blog/kl-approx.html):

    k1 = mean of −d_it        k3 = mean of exp(d_it) − 1 − d_it

Everything is computed in float64. Suffixes: R packed response tokens, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_mm.config import CorrectionConfig
from gspo_mm.loss.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """How far policy and rollout engine are apart, and the weights made of it. Float64, without gradient."""

    gap: Tensor  # [R] d_it, nats
    ratio: Tensor  # [S] c_i
    weight: Tensor  # [S] w_i
    corrected: Tensor | None  # [S] bool: truncated or masked; None without a correction

    def token_means(self) -> dict[str, Tensor]:
        """Metrics [R] whose mean over tokens counts: k1 and k3, each in nats."""
        return {"mismatch/k1": -self.gap, "mismatch/k3": torch.expm1(self.gap) - self.gap}

    def metrics(self, num_sequences: int) -> Metrics:
        """mismatch/ratio, the list of c_i, and with a correction mismatch/corrected_fraction of `num_sequences`."""
        values: dict[str, float | list[float]] = {"mismatch/ratio": self.ratio.tolist()}
        if self.corrected is not None:
            # sequences of the whole batch, as in the loss: fractions of micro-batches add up
            values["mismatch/corrected_fraction"] = int(self.corrected.sum()) / num_sequences
        return values


@torch.no_grad()
def compare(old_R: Tensor, rollout_R: Tensor, lengths_S: Tensor, config: CorrectionConfig) -> Mismatch:
    """Log-probs of policy and rollout engine, by the equations at the top of this file.

    old_R      [R] nats, of the policy that this batch of rollouts started with, by the trainer
    rollout_R  [R] nats, of the engine that sampled
    lengths_S  [S] integers ≥ 1, trained response tokens of each sequence
    """
    d_R = old_R.double() - rollout_R.double()
    ratio_S = torch.exp(torch.segment_reduce(d_R, "sum", lengths=lengths_S, axis=0) / lengths_S)
    weight_S, corrected_S = correction_weights(ratio_S, config)
    return Mismatch(gap=d_R, ratio=ratio_S, weight=weight_S, corrected=corrected_S)


def correction_weights(ratio_S: Tensor, config: CorrectionConfig) -> tuple[Tensor, Tensor | None]:
    """w_i [S] of c_i [S], and which of them the bounds changed; both bounds belong to the range."""
    match config.kind:
        case "none":
            return torch.ones_like(ratio_S), None
        case "truncate":
            return ratio_S.clamp(max=config.high), ratio_S > config.high
        case "mask":
            outside_S = (ratio_S < config.low) | (ratio_S > config.high)
            return (~outside_S).to(ratio_S.dtype), outside_S
