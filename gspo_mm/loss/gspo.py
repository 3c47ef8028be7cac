"""The policy loss, as equations (GSPO: Zheng et al. 2025, arXiv 2507.18071).

One answer y_i has L_i trained response tokens; x_it = log π_θ(y_it) − log π_old(y_it). Three pieces make the
loss, and `loss.type` names how they go together (README.md beside this file):

1. A ratio, by `loss.level`:

       sequence        s_i  = exp( (1/L_i) Σ_t x_it )                            GSPO, eq. 7
       token           w_it = exp( x_it )                                        GRPO / PPO
       sequence_token  s_it = sg[s_i] · π_θ(y_it) / sg[π_θ(y_it)]                GSPO-token, eq. 14
                       (in value s_i, its gradient that of the token; advantages may then differ per token)

2. A surrogate o(ρ, A) of the ratio ρ (one of the three above) with its advantage A, by `loss.type`: clip.py for GSPO
   and all that clip as PPO does, gmpo.py, cispo.py, sapo.py, or the user's own. It is made large.

3. A weight a_i per token, by `loss.aggregation`. S and N are the sequences and response tokens of the *whole*
   batch of this update (all micro-batches, all data-parallel ranks), C is `loss.dr_grpo_length`:

       sequence_mean  a_i = 1 / (S L_i)      token_mean  a_i = 1 / N      dr_grpo  a_i = 1 / (S C)

       loss = − Σ_i Σ_t a_i o_it  +  kl_coef · Σ_i Σ_t a_i k_it
       k_it = exp(d_it) − d_it − 1,   d_it = log π_ref(y_it) − log π_θ(y_it)

   (k_it: the k3 estimator of KL(π_θ ‖ π_ref), joschu.net/blog/kl-approx.html.) Written out, with o_it = o_i =
   o(s_i, A_i) at level sequence, since every token of an answer then has the same surrogate:

                   sequence_mean                  token_mean             dr_grpo
       sequence    (1/S) Σ_i o_i   [GSPO eq. 5]   (1/N) Σ_i L_i o_i      (1/(S C)) Σ_i L_i o_i
       otherwise   (1/S) Σ_i (1/L_i) Σ_t o_it     (1/N) Σ_i Σ_t o_it     (1/(S C)) Σ_i Σ_t o_it
                   [GRPO; GSPO-token eq. 13]      [DAPO]                 [Dr. GRPO]

   token_mean and dr_grpo let long answers weigh more at level sequence; only sequence_mean is the paper's
   objective.

Where `loss.correction` is on, o_it is multiplied by a constant w_i that answers for the mismatch between policy and
rollout engine: correction.py. It changes nothing else above.

Since S, N and C are given, losses and metrics of micro-batches add up to those of the batch, whatever the
split.

Deviations from the papers: the KL term (`kl_coef` is 0 by default, for GRPO too; GSPO, DAPO and CISPO have none) and
dual clip (off by default). The mean over groups of means over answers equals the mean over all S answers when groups
are of equal size; for unequal groups every *answer*, not every group, weighs the same here. Where papers divide by the
tokens of a group (DAPO, CISPO), N is of the batch, as in their code.

Everything is computed in float64 (R numbers cost nothing beside the model that made them); the loss comes
back in the dtype of `logprobs`. No step of value or gradient adds atomically, so runs repeat exactly.

Suffixes: R packed response tokens, S sequences, U units that have a ratio of their own (S at level sequence,
else R).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_mm.config import ConfigError, LossConfig
from gspo_mm.loss.correction import compare
from gspo_mm.loss.metrics import Metrics
from gspo_mm.loss.surrogate import LossInputs, LossTerms, segment_sum
from gspo_mm.loss.table import surrogate_of
from gspo_mm.types import NonFiniteError


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """The part of the batch's loss and metrics that these sequences make."""

    loss: Tensor  # scalar, dtype of the log-probs; losses of micro-batches add up
    metrics: Metrics  # see `policy_loss`; merged by `reduce_metrics`, then `summarize`


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    config: LossConfig,
    num_sequences: int,
    num_tokens: int | None = None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> LossOutput:
    """The loss of packed sequences by the equations at the top of this file.

    logprobs          [R] float32 or float64, nats, of the policy being trained; alone gets a gradient
    old_logprobs      [R] nats, of the policy that this batch of rollouts started with, by the trainer
    advantages        [S], or [R] at levels token and sequence_token but with gmpo
    cu_seqlens        [S+1] integers, offsets of sequences in R, from 0 to R
    num_sequences     S of the whole batch of this optimizer step, over all micro-batches and ranks
    num_tokens        N of the same; needed for aggregation token_mean and for the metric clip_token_fraction
    entropy           [R] nats, for the metric only
    ref_logprobs      [R] nats, of the reference; needed where kl_coef > 0
    rollout_logprobs  [R] nats, of the engine that sampled, for the metrics; needed for loss.correction
    names             [S] used in errors

    Metrics are means over all sequences of the batch; what belongs to a token is averaged within its sequence
    first:

        ratio_mean, ratio_min, ratio_max     of s_i, or of w_it at level token
        clip_low_fraction, clip_high_fraction, clip_dual_fraction (with dual_clip)
                                             of sequences, at the other levels of the tokens within each;
                                             "clipped" as in clip.py, gmpo.py, cispo.py; none with sapo
        clip_token_fraction                  clipped tokens (all of a clipped sequence) / num_tokens
        loss/gate                            see sapo.py; loss/* of the user's own loss
        approx_kl                            k3 of KL(π_old ‖ π_θ): exp(x) − 1 − x per token
        entropy, kl_ref                      per token, where given
        logprob_gap_mean, logprob_gap_max    |log π_old − log π_rollout| per token, where given
        mismatch/k1, mismatch/k3, mismatch/ratio (a list, one number per sequence), and with loss.correction
        mismatch/corrected_fraction          see correction.py, where rollout_logprobs are given

    Raises NonFiniteError naming the sequence for NaN or Inf in an input or in the loss, and ValueError for
    shapes, counts or config values that do not fit together (ConfigError where rollouts came without log-probs
    that loss.correction needs, or the user's loss fails: data decide that, so it may happen on one rank only).
    """
    lengths_S = _lengths(cu_seqlens, logprobs.numel(), names)
    names = names or [f"sequence {i}" for i in range(len(lengths_S))]
    _check_counts(config, len(lengths_S), num_sequences, num_tokens, ref_logprobs, rollout_logprobs)
    given = {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "entropy": entropy,
    }
    _check_tensors(given, advantages, cu_seqlens, names, config)

    owner_R = torch.repeat_interleave(lengths_S)  # the sequence that each token belongs to
    logprobs_R, old_R = logprobs.double(), old_logprobs.detach().double()
    x_R = logprobs_R - old_R
    log_ratio_U = _log_ratio(config.level, x_R, logprobs_R, lengths_S)
    advantage_U = advantages.detach().double()
    if config.level != "sequence" and advantages.numel() == len(lengths_S):
        advantage_U = advantage_U[owner_R]
    terms = surrogate_of(config)(
        LossInputs(
            logprobs=logprobs_R,
            old_logprobs=old_R,
            log_ratio=log_ratio_U,
            advantages=advantage_U,
            lengths=lengths_S,
            config=config,
        )
    )
    values, mismatch = terms.loss, None
    if rollout_logprobs is not None:
        mismatch = compare(old_R, rollout_logprobs, lengths_S, config.correction)
        values = values * _like(values, mismatch.weight[owner_R], mismatch.weight)
    weight_S = _token_weights(lengths_S, config, num_sequences, num_tokens)
    weight_R = weight_S[owner_R]
    values = values * _like(values, weight_R, weight_S * lengths_S)
    loss = _total("loss", values, cu_seqlens, names, logprobs.dtype)
    kl_R = None
    if ref_logprobs is not None:
        d_R = ref_logprobs.detach().double() - logprobs_R
        kl_R = torch.expm1(d_R) - d_R
        if config.kl_coef > 0:
            kl = _total("KL to the reference", weight_R * kl_R, cu_seqlens, names, logprobs.dtype)
            loss = loss + config.kl_coef * kl

    token_means = {"approx_kl": torch.expm1(x_R) - x_R, "entropy": entropy, "kl_ref": kl_R}
    if mismatch is not None:
        token_means |= {"logprob_gap_mean": mismatch.gap.abs(), **mismatch.token_means()}
    metrics = _metrics(log_ratio_U, terms, token_means, lengths_S, num_sequences, num_tokens)
    of_mismatch = mismatch.metrics(num_sequences) if mismatch is not None else {}
    return LossOutput(loss=loss, metrics={**metrics, **of_mismatch})


def _log_ratio(level: str, x_R: Tensor, logprobs_R: Tensor, lengths_S: Tensor) -> Tensor:
    """[U] of the equations' part 1."""
    if level == "token":
        return x_R
    log_s_S = segment_sum(x_R, lengths_S) / lengths_S
    if level == "sequence":
        return log_s_S
    return log_s_S.detach()[torch.repeat_interleave(lengths_S)] + (logprobs_R - logprobs_R.detach())


def _like(values: Tensor, of_tokens_R: Tensor, of_sequences_S: Tensor) -> Tensor:
    """That of the two which goes with `values` [R] or [S]; where all sequences have one token, they are equal."""
    return of_tokens_R if len(values) == len(of_tokens_R) else of_sequences_S


@torch.no_grad()
def _metrics(
    log_ratio_U: Tensor,
    terms: LossTerms,
    token_means: Mapping[str, Tensor | None],
    lengths_S: Tensor,
    num_sequences: int,
    num_tokens: int | None,
) -> dict[str, float]:
    """See `policy_loss`; `token_means` [R] are averaged within their sequence, then over sequences."""
    owner_R = torch.repeat_interleave(lengths_S)
    in_sequence_R = (1.0 / (num_sequences * lengths_S.double()))[owner_R]
    sequence_S = torch.full_like(lengths_S, 1.0 / num_sequences, dtype=torch.float64)

    def mean(values: Tensor) -> Tensor:
        return values.double() @ _like(values, in_sequence_R, sequence_S)

    ratio_U = torch.exp(log_ratio_U)
    sums = {"ratio_mean": mean(ratio_U), "ratio_min": ratio_U.min(), "ratio_max": ratio_U.max()}
    sums |= {f"clip_{name}_fraction": mean(mask) for name, mask in terms.clipped.items()}
    if num_tokens is not None and terms.clipped:
        masks_R = [mask if len(mask) == len(owner_R) else mask[owner_R] for mask in terms.clipped.values()]
        sums["clip_token_fraction"] = torch.stack(masks_R).any(0).double().sum() / num_tokens
    sums |= {f"loss/{name}": mean(values) for name, values in terms.metrics.items()}
    for name, values_R in token_means.items():
        if values_R is not None:
            sums[name] = values_R.double() @ in_sequence_R
    if (gap_R := token_means.get("logprob_gap_mean")) is not None:
        sums["logprob_gap_max"] = gap_R.max()
    values = torch.stack(list(sums.values())).tolist()  # one transfer from the device
    return dict(zip(sums, values, strict=True))


def _token_weights(
    lengths_S: Tensor, config: LossConfig, num_sequences: int, num_tokens: int | None
) -> Tensor:
    """a_i [S] of the equations.

    Denominators are those of the whole batch: one count for all micro-batches and ranks, so the split cannot
    matter. A sequence that loss.correction masks adds 0 to the loss and still counts in them.
    """
    match config.aggregation:
        case "sequence_mean":
            return 1.0 / (num_sequences * lengths_S.double())
        case "token_mean":
            assert num_tokens is not None
            weight = 1.0 / num_tokens
        case "dr_grpo":
            assert config.dr_grpo_length is not None
            weight = 1.0 / (num_sequences * config.dr_grpo_length)
    return torch.full_like(lengths_S, weight, dtype=torch.float64)


def check_clip_can_act(config: LossConfig, updates_per_batch: int) -> str | None:
    """A one-sentence warning where what bounds the ratio cannot do its work, else None."""
    bound = "the gate of loss.type=sapo" if config.type == "sapo" else config.clip
    if updates_per_batch == 1 and bound:
        return (
            "train.updates_per_batch=1: the policy equals the old policy during the only update, so every ratio is 1 "
            f"and nothing is bounded by {bound}; use 2 or more to train as the papers do."
        )
    if config.level != "token" and max(config.clip_low or 0.0, config.clip_high or 0.0) > 0.01:
        return (
            f"{bound} at loss.level={config.level} clip nothing, since such ratios stay within about 1e-3; "
            "the GSPO paper uses 3e-4 and 4e-4."
        )
    return None


def _lengths(cu_seqlens: Tensor, R: int, names: Sequence[str] | None) -> Tensor:
    offsets = cu_seqlens.tolist()
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != R:
        raise ValueError(
            f"cu_seqlens must run from 0 to the {R} tokens of logprobs and hold at least one sequence; it is "
            f"{offsets[:1]} to {offsets[-1:]} with {len(offsets)} entries"
        )
    lengths_S = cu_seqlens.long().diff()
    if bool((lengths_S < 1).any()):
        worst = int((lengths_S < 1).nonzero()[0])
        name = names[worst] if names else f"sequence {worst}"
        raise ValueError(
            f"{name} has no trained response token, so its ratio is undefined; leave it out of the batch"
        )
    return lengths_S


def _check_counts(
    config: LossConfig,
    S: int,
    num_sequences: int,
    num_tokens: int | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
) -> None:
    if num_sequences < S:
        raise ValueError(
            f"num_sequences={num_sequences} is below the {S} sequences at hand; pass the count of the whole "
            "batch"
        )
    if config.aggregation == "token_mean" and num_tokens is None:
        raise ValueError(
            "loss.aggregation=token_mean divides by num_tokens; pass the response tokens of the whole batch"
        )
    if config.aggregation == "dr_grpo" and config.dr_grpo_length is None:
        raise ValueError(
            "loss.aggregation=dr_grpo needs loss.dr_grpo_length; set it to rollout.sampling.max_new_tokens"
        )
    if config.kl_coef > 0 and ref_logprobs is None:
        raise ValueError(
            f"loss.kl_coef={config.kl_coef:g} needs log-probs of a reference model; pass them, or set it to 0"
        )
    if config.correction.kind != "none" and rollout_logprobs is None:
        raise ConfigError(
            f"loss.correction.kind={config.correction.kind} needs the log-probs of the engine that sampled, and "
            "these rollouts came without them; sample again instead of replaying, or set loss.correction.kind=none"
        )


def _check_tensors(
    given: Mapping[str, Tensor | None],
    advantages: Tensor,
    cu_seqlens: Tensor,
    names: Sequence[str],
    config: LossConfig,
) -> None:
    """Shapes and finiteness of the inputs; `given["logprobs"]` sets R."""
    assert given["logprobs"] is not None
    S, R = cu_seqlens.numel() - 1, given["logprobs"].numel()
    if len(names) != S:
        raise ValueError(f"names holds {len(names)} names for {S} sequences")
    for what, values in given.items():
        if values is None:
            continue
        if values.shape != (R,):
            raise ValueError(
                f"{what} has shape {list(values.shape)}; logprobs has [{R}] and both must be equal"
            )
        _require_finite(what, values, cu_seqlens, names)
    per_token = config.level != "sequence" and config.type != "gmpo"
    if advantages.shape != (S,) and not (per_token and advantages.shape == (R,)):
        allowed = f"[{S}] (sequences)" + (f" or [{R}] (tokens)" if per_token else "")
        raise ValueError(
            f"advantages has shape {list(advantages.shape)}; loss.type={config.type} at loss.level={config.level} takes "
            f"{allowed}"
        )
    _require_finite("advantages", advantages, cu_seqlens, names)


def _total(what: str, values: Tensor, cu_seqlens: Tensor, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    """Sum to `dtype`; where the sum does not fit, the largest summand is to blame."""
    total = values.sum().to(dtype)
    if not bool(torch.isfinite(total)):
        size = values.detach().abs().nan_to_num(nan=math.inf, posinf=math.inf)
        _blame(what, values.detach(), int(size.argmax()), cu_seqlens, names)
    return total


def _require_finite(what: str, values: Tensor, cu_seqlens: Tensor, names: Sequence[str]) -> None:
    finite = torch.isfinite(values.detach())
    if not bool(finite.all()):
        _blame(what, values.detach(), int((~finite).nonzero()[0]), cu_seqlens, names)


def _blame(what: str, values: Tensor, index: int, cu_seqlens: Tensor, names: Sequence[str]) -> None:
    """Raise for entry `index` of values that are [S] or [R] (the same where all have one token)."""
    sequence, place = index, ""
    if values.numel() != len(names):
        sequence = int(torch.searchsorted(cu_seqlens, index, right=True)) - 1
        place = f" at response token {index - int(cu_seqlens[sequence])}"
    raise NonFiniteError(
        f"{what} of {names[sequence]} is {float(values[index]):g}{place}; nothing was replaced: look at this "
        "sequence, and at the learning rate or the numeric format if it happens to many"
    )
