"""Our loss equals TRL's for the cases that both have: two independent implementations of the same objective."""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

from gspo_mm.config import CorrectionConfig, LossConfig
from gspo_mm.loss import policy_loss

LENGTHS = (3, 1, 7, 4, 2, 5)
TRL_MAX_LENGTH = 9


def trl_loss(
    new,
    old,
    advantages,
    mask,
    *,
    level,
    loss_type,
    low,
    high,
    beta=0.0,
    ref=None,
    delta=None,
    weights=None,
):
    """GRPOTrainer._compute_loss of TRL 1.16 on a stub, or GMPOTrainer's: log-probs [S, T] in, scalar loss out."""
    S, T = new.shape
    trainer = SimpleNamespace(
        importance_sampling_level=level,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        max_completion_length=TRL_MAX_LENGTH,
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=False,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=2.0,
        ),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(
            gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
        ),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, torch.zeros_like(new), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(S, 1, dtype=torch.long),
        "prompt_mask": torch.ones(S, 1, dtype=torch.long),
        "completion_ids": torch.zeros(S, T, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": weights,
    }
    loss = (GMPOTrainer if loss_type == "gmpo" else GRPOTrainer)._compute_loss(trainer, None, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def batch(seed, spread):
    generator = torch.Generator().manual_seed(seed)
    S, T = len(LENGTHS), max(LENGTHS)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    new = -draw(S, T).abs()
    return new, new - spread * draw(S, T), new + 0.2 * draw(S, T), draw(S), mask


# Our (level, aggregation) -> TRL's loss_type; sequence_token has no counterpart there. TRL's dapo broadcasts
# the [S, 1] loss of level sequence over the mask, Σ_i L_i o_i / N as here; its bnpo and dr_grpo do the same.
CASES = [
    ("sequence", "sequence_mean", "grpo"),
    ("token", "sequence_mean", "grpo"),
    ("sequence", "token_mean", "dapo"),
    ("sequence", "token_mean", "bnpo"),
    ("sequence", "dr_grpo", "dr_grpo"),
    ("token", "token_mean", "bnpo"),
    ("token", "token_mean", "dapo"),
    ("token", "dr_grpo", "dr_grpo"),
]


@pytest.mark.parametrize("dual_clip", [None, 1.6])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("level", "aggregation", "loss_type"), CASES)
def test_loss_and_gradient_equal_trl(level, aggregation, loss_type, beta, dual_clip):
    low, high, spread = (3e-4, 4e-4, 3e-3) if level == "sequence" else (0.2, 0.28, 0.5)
    if dual_clip:
        spread = 1.0
    case = {"level": level, "beta": beta}
    config = LossConfig(
        level=level,
        aggregation=aggregation,
        clip_low=low,
        clip_high=high,
        kl_coef=beta,
        dual_clip=dual_clip,
        dr_grpo_length=TRL_MAX_LENGTH,
    )
    seen: dict[str, float] = defaultdict(float)
    for seed in range(8):
        new, old, ref, advantages, mask = batch(seed, spread)
        theirs_in, ours_in = new.clone().requires_grad_(), new[mask].clone().requires_grad_()
        # TRL's delta bounds the ratio from above for both signs of A; above 1 + clip_high that is the dual
        # clip
        theirs, metrics = trl_loss(
            theirs_in,
            old,
            advantages,
            mask,
            loss_type=loss_type,
            low=low,
            high=high,
            ref=ref,
            delta=dual_clip,
            **case,
        )
        ours = policy_loss(
            ours_in,
            old[mask],
            advantages,
            torch.tensor([0, *accumulate(LENGTHS)]),
            config=config,
            num_sequences=len(LENGTHS),
            num_tokens=sum(LENGTHS),
            ref_logprobs=ref[mask],
        )
        assert ours.loss.item() == pytest.approx(theirs.item(), abs=1e-12)
        (their_gradient,) = torch.autograd.grad(theirs, theirs_in)
        (our_gradient,) = torch.autograd.grad(ours.loss, ours_in)
        torch.testing.assert_close(our_gradient, their_gradient[mask], atol=1e-12, rtol=0)
        if level == "sequence":
            for side in ("low", "high"):
                assert ours.metrics[f"clip_{side}_fraction"] == pytest.approx(
                    metrics[f"clip_ratio/{side}_mean"]
                )
        elif not dual_clip:
            assert ours.metrics["clip_token_fraction"] == pytest.approx(metrics["clip_ratio/region_mean"])
        for name, value in ours.metrics.items():
            seen[name] += value
    sides = ["low", "high"] + (["dual"] if dual_clip else [])
    assert all(seen[f"clip_{side}_fraction"] > 0 for side in sides), (
        "the cases must hold every kind of clipping"
    )
    assert seen["clip_token_fraction"] < 8


# loss.type as it is named -> TRL's loss_type and range. Its bound of cispo is the ratio itself, those of gmpo are
# logarithms, and its temperatures of sapo are float32: a power of two is exact
NAMED = [
    ({"type": "gspo"}, "sequence", "grpo", (3e-4, 4e-4)),
    ({"type": "grpo"}, "token", "grpo", (0.2, 0.2)),
    ({"type": "dr_grpo"}, "token", "dr_grpo", (0.2, 0.2)),
    ({"type": "dapo"}, "token", "dapo", (0.2, 0.28)),
    ({"type": "gmpo"}, "token", "gmpo", (0.4, 0.4)),
    ({"type": "cispo"}, "token", "cispo", (None, 5.0)),
    ({"type": "cispo", "level": "sequence_token", "clip_high": 1e-3}, "sequence", "cispo", (None, 1.001)),
    ({"type": "sapo", "tau_negative": 2.0}, "token", "sapo", (None, None)),
    ({"type": "sapo", "tau_negative": 2.0, "level": "sequence"}, "sequence", "sapo", (None, None)),
]


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("named", "level", "loss_type", "range_"), NAMED)
def test_a_named_loss_and_its_gradient_equal_trl(named, level, loss_type, range_, beta):
    config = LossConfig.model_validate({**named, "kl_coef": beta, "dr_grpo_length": TRL_MAX_LENGTH})
    low, high = range_
    clipped = 0.0
    for seed in range(6):
        new, old, ref, advantages, mask = batch(seed, spread=3e-3 if level == "sequence" else 0.6)
        if loss_type == "cispo" and level == "token":
            old[0] -= 1.5  # ratios beyond 5
        theirs_in, ours_in = new.clone().requires_grad_(), new[mask].clone().requires_grad_()
        theirs, metrics = trl_loss(
            theirs_in, old, advantages, mask, level=level, loss_type=loss_type, low=low, high=high, beta=beta, ref=ref
        )  # fmt: skip
        ours = policy_loss(
            ours_in,
            old[mask],
            advantages,
            torch.tensor([0, *accumulate(LENGTHS)]),
            config=config,
            num_sequences=len(LENGTHS),
            num_tokens=sum(LENGTHS),
            ref_logprobs=ref[mask],
        )
        assert ours.loss.item() == pytest.approx(theirs.item(), abs=1e-12)
        (their_gradient,) = torch.autograd.grad(theirs, theirs_in)
        (our_gradient,) = torch.autograd.grad(ours.loss, ours_in)
        torch.testing.assert_close(our_gradient, their_gradient[mask], atol=1e-12, rtol=0)
        if "clip_ratio/region_mean" in metrics and level == "token":
            assert ours.metrics["clip_token_fraction"] == pytest.approx(metrics["clip_ratio/region_mean"])
        clipped += ours.metrics.get("clip_token_fraction", 1.0)
    assert clipped > 0


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize(("level", "aggregation", "loss_type"), CASES)
def test_a_sequence_weight_enters_where_trl_lets_it(level, aggregation, loss_type, kind):
    """On the surrogate, not on the KL term, and not in any denominator.

    TRL's own weights of sequences are of another kind and are not compared: sequence_truncate and sequence_mask bound
    the product of an answer's token ratios (which grows with its length) and keep that ratio where they do not mask.
    """
    bounds = {"low": 0.98, "high": 1.03}
    config = LossConfig(
        level=level,
        aggregation=aggregation,
        clip_low=3e-3,
        clip_high=4e-3,
        kl_coef=0.04,
        dr_grpo_length=TRL_MAX_LENGTH,
        correction=CorrectionConfig(kind=kind, **bounds),
    )
    below = above = 0
    for seed in range(4):
        new, old, ref, advantages, mask = batch(seed, spread=5e-3)
        rollout = old + 0.08 * torch.randn(old.shape, generator=torch.Generator().manual_seed(seed)).double()
        c = torch.stack([((old - rollout)[i, :L].sum() / L).exp() for i, L in enumerate(LENGTHS)])
        below, above = below + int((c < 0.98).sum()), above + int((c > 1.03).sum())
        weights = c.clamp(max=1.03) if kind == "truncate" else ((c >= 0.98) & (c <= 1.03)).double()
        theirs_in, ours_in = new.clone().requires_grad_(), new[mask].clone().requires_grad_()
        theirs, _ = trl_loss(
            theirs_in,
            old,
            advantages,
            mask,
            level=level,
            loss_type=loss_type,
            low=3e-3,
            high=4e-3,
            beta=0.04,
            ref=ref,
            weights=weights[:, None],
        )
        ours = policy_loss(
            ours_in,
            old[mask],
            advantages,
            torch.tensor([0, *accumulate(LENGTHS)]),
            config=config,
            num_sequences=len(LENGTHS),
            num_tokens=sum(LENGTHS),
            ref_logprobs=ref[mask],
            rollout_logprobs=rollout[mask],
        )
        assert ours.loss.item() == pytest.approx(theirs.item(), abs=1e-12)
        (their_gradient,) = torch.autograd.grad(theirs, theirs_in)
        (our_gradient,) = torch.autograd.grad(ours.loss, ours_in)
        torch.testing.assert_close(our_gradient, their_gradient[mask], atol=1e-12, rtol=0)
    assert below > 1
    assert above > 1
