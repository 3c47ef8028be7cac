"""Log-probs of given tokens straight from hidden states and the output weight: full logits never exist.

For token r with target y_r, temperature T and logits l_rv = h_r · w_v / T:

    lse_r    = log Σ_v exp(l_rv)
    logp_r   = l_ry − lse_r
    H_r      = lse_r − Σ_v p_rv l_rv,        p_rv = exp(l_rv − lse_r)
    ∂/∂h_r   = (g_r / T) (w_y − Σ_v p_rv w_v)
    ∂/∂w_v   = Σ_r (g_r / T) (1[v = y_r] − p_rv) h_r          g_r: gradient of the loss by logp_r

Tokens go through in chunks; of a chunk's logits only lse_r is kept, backward makes them again (four matrix products
instead of three). The arithmetic of the softmax is float32 at least; the products are in the weight's dtype.

Vocabulary parallel: rank k of `group` holds rows [k·n, (k+1)·n) of the padded output weight. Every rank finishes its
own rows for all chunks first, then two collectives put the parts together: the maximum, and one sum.

Suffixes: R trained tokens, C tokens of a chunk, V rows of the weight on this rank, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# float32 logits of a chunk; large enough for full speed of the matrix products, small beside the weight itself
CHUNK_BYTES = 2**28


def linear_logprobs(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_R: torch.Tensor,
    *,
    vocab: int,
    temperature: float = 1.0,
    entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs [R] float32 nats of `targets_R` under softmax(hidden @ weight.T / temperature); entropy [R] or None.

    vocab        tokens of the whole vocabulary; rows at or beyond it are padding and are never computed
    group        ranks that the rows are split over, each with equally many; None: all rows are here
    entropy      also return the distribution's entropy, nats, without gradient
    chunk_tokens tokens whose logits exist at a time; default: by CHUNK_BYTES

    **The gradient of `hidden_RD` is this rank's part only**: the sum over `group` is the caller's, who has it for
    free where a sequence-parallel gather stands in front (its backward is a reduce-scatter). `targets_R` [R] int64
    are global ids, equal on all ranks, as is `hidden_RD`. float64 inputs give float64 results.

    Raises ValueError when shapes do not fit or a target is outside the vocabulary.
    """
    if (
        hidden_RD.dim() != 2
        or targets_R.shape != hidden_RD.shape[:1]
        or hidden_RD.shape[1] != weight_VD.shape[1]
    ):
        raise ValueError(
            f"hidden {list(hidden_RD.shape)}, weight {list(weight_VD.shape)} and targets {list(targets_R.shape)} do "
            "not fit; they must be [R, D], [V, D] and [R]"
        )
    if (
        targets_R.device.type == "cpu"
        and len(targets_R)
        and not 0 <= int(targets_R.min()) <= int(targets_R.max()) < vocab
    ):
        raise ValueError(
            f"targets run from {targets_R.min()} to {targets_R.max()}, outside the vocabulary of {vocab}"
        )
    rank = 0 if group is None else group.rank()
    first = rank * len(weight_VD)
    rows = min(max(vocab - first, 0), len(weight_VD))
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * max(len(weight_VD), 1)))
    logprobs_R, entropy_R = _LinearLogprobs.apply(
        hidden_RD, weight_VD, targets_R, (first, rows, chunk, temperature, entropy, group)
    )  # pyright: ignore[reportGeneralTypeIssues]
    return logprobs_R, entropy_R if entropy else None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_R: torch.Tensor,
        how: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, rows, chunk, temperature, entropy, group = how
        weight = weight_VD[:rows]
        place_R = targets_R - first
        mine_R = (place_R >= 0) & (place_R < rows)
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        # per token: largest logit, then relative to it: Σ exp, Σ exp · logit, and the target's own logit
        top_R = hidden_RD.new_full((len(hidden_RD),), torch.finfo(wide).min, dtype=wide)
        sums_3R = hidden_RD.new_zeros(3, len(hidden_RD), dtype=wide)
        for start in range(0, len(hidden_RD) if rows else 0, chunk):
            part = slice(start, start + chunk)
            logits_CV = _logits(hidden_RD[part], weight, temperature)
            top_R[part] = logits_CV.amax(1)
            logits_CV -= top_R[part, None]
            target_C1 = logits_CV.gather(1, place_R[part, None].clamp(0, rows - 1))
            sums_3R[2, part] = target_C1.squeeze(1) * mine_R[part]
            if entropy:
                exp_CV = logits_CV.exp()
                sums_3R[1, part] = torch.linalg.vecdot(exp_CV, logits_CV)
            else:
                exp_CV = logits_CV.exp_()
            sums_3R[0, part] = exp_CV.sum(1)
            del logits_CV, exp_CV
        if group is not None:
            own_top_R, shift_R = top_R, top_R.clone()
            dist.all_reduce(shift_R, op=dist.ReduceOp.MAX, group=group)
            down_R = own_top_R - shift_R  # what this rank's sums are too large by, in the exponent
            total, weighted, target = sums_3R
            sums_3R = torch.stack(
                [total * down_R.exp(), (weighted + total * down_R) * down_R.exp(), target + down_R * mine_R]
            )
            if not rows:
                sums_3R.zero_()
            dist.all_reduce(sums_3R, group=group)
            top_R = shift_R
        total_R, weighted_R, target_R = sums_3R
        log_total_R = total_R.log()
        ctx.save_for_backward(hidden_RD, weight_VD, place_R, mine_R, top_R + log_total_R)
        ctx.how = how
        logprobs_R, entropy_R = target_R - log_total_R, log_total_R - weighted_R / total_R
        ctx.mark_non_differentiable(entropy_R)
        return logprobs_R, entropy_R

    @staticmethod
    def backward(
        ctx: Any, grad_R: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden_RD, weight_VD, place_R, mine_R, lse_R = ctx.saved_tensors
        _first, rows, chunk, temperature, _entropy, _group = ctx.how
        weight = weight_VD[:rows]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_RD) if wants_hidden else None
        # summed over chunks in float32, whatever the weight's dtype
        grad_weight = torch.zeros_like(weight_VD, dtype=lse_R.dtype) if wants_weight else None
        grad_R = grad_R / temperature
        for start in range(0, len(hidden_RD) if rows else 0, chunk):
            part = slice(start, start + chunk)
            slope_CV = _logits(hidden_RD[part], weight, temperature)
            slope_CV.sub_(lse_R[part, None]).exp_().mul_(-grad_R[part, None])
            target_C1 = place_R[part, None].clamp(0, rows - 1)
            slope_CV.scatter_add_(1, target_C1, (grad_R[part] * mine_R[part])[:, None])
            slope_CV = slope_CV.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = slope_CV @ weight
            if grad_weight is not None:
                if grad_weight.dtype == slope_CV.dtype:
                    grad_weight[:rows].addmm_(slope_CV.T, hidden_RD[part])
                else:
                    grad_weight[:rows] += slope_CV.T @ hidden_RD[part]
            del slope_CV
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None


def _logits(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, temperature: float) -> torch.Tensor:
    """[C, V] in float32 or wider, in memory of its own."""
    logits_CV = hidden_CD @ weight_VD.T
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)
