"""SAPO, soft adaptive policy optimisation (Gao et al., Qwen 2025, arXiv 2511.20347), made for Qwen3-VL.

    o(ρ, A) = (4/τ) σ( τ (ρ − 1) ) A,    τ = tau_positive for A > 0, else tau_negative

A gate in place of clipping: against an unclipped ratio, the gradient is multiplied by 4 p (1 − p), p = σ(τ (ρ − 1)), which
is 1 at ρ = 1 and falls smoothly on both sides. Metric `gate`: that factor.
"""

from __future__ import annotations

import torch

from gspo_mm.loss.surrogate import LossInputs, LossTerms

_LARGEST = (
    700.0  # exp() still fits float64; the gate let nothing through long before, and 0 · inf would be NaN
)


def sapo(inputs: LossInputs) -> LossTerms:
    config, advantage_U = inputs.config, inputs.advantages
    assert config.tau_positive is not None
    assert config.tau_negative is not None
    tau_U = torch.full_like(advantage_U, config.tau_negative).masked_fill(
        advantage_U > 0, config.tau_positive
    )
    p_U = torch.sigmoid(tau_U * (torch.exp(inputs.log_ratio.clamp(max=_LARGEST)) - 1.0))
    open_U = 4.0 * (p_U * (1.0 - p_U)).detach()
    return LossTerms(loss=-(4.0 / tau_U * p_U * advantage_U), metrics={"gate": open_U})
