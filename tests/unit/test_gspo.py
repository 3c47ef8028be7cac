"""The loss against the equations of its docstring, written out again here one sequence and one token at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_mm.config import LossConfig
from gspo_mm.loss import check_clip_can_act, policy_loss, reduce_metrics, summarize
from gspo_mm.types import NonFiniteError

LEVELS = ["sequence", "token", "sequence_token"]
AGGREGATIONS = ["sequence_mean", "token_mean", "dr_grpo"]
C = 11  # the constant length of dr_grpo


def config_of(level="sequence", aggregation="sequence_mean", **changes) -> LossConfig:
    return LossConfig(level=level, aggregation=aggregation, dr_grpo_length=C, allow_wide_clip=True, **changes)


class Batch:
    """Random packed sequences whose ratios land on both sides of the clip range."""

    def __init__(self, lengths=(3, 1, 7, 4, 2, 5), seed=0, spread=4e-3, dtype=torch.float64):
        rng = np.random.default_rng(seed)
        self.lengths = list(lengths)
        self.R, self.S = sum(lengths), len(lengths)
        self.new = torch.tensor(-rng.exponential(size=self.R), dtype=dtype)
        self.old = self.new - torch.tensor(rng.normal(scale=spread, size=self.R), dtype=dtype)
        self.ref = self.new + torch.tensor(rng.normal(scale=0.3, size=self.R), dtype=dtype)
        self.rollout = self.old + torch.tensor(rng.normal(scale=0.01, size=self.R), dtype=dtype)
        self.entropy = torch.tensor(rng.exponential(size=self.R), dtype=dtype)
        self.advantages = torch.tensor(rng.normal(size=self.S), dtype=dtype)
        self.token_advantages = torch.tensor(rng.normal(size=self.R), dtype=dtype)

    def select(self, indices):
        """The sub-batch of these sequences, in this order."""
        offsets = np.cumsum([0, *self.lengths])
        tokens = torch.tensor([t for i in indices for t in range(offsets[i], offsets[i + 1])])
        part = object.__new__(Batch)
        part.lengths = [self.lengths[i] for i in indices]
        part.R, part.S = len(tokens), len(indices)
        for name in ("new", "old", "ref", "rollout", "entropy", "token_advantages"):
            setattr(part, name, getattr(self, name)[tokens])
        part.advantages = self.advantages[list(indices)]
        return part, tokens

    @property
    def cu_seqlens(self):
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)

    def loss(self, config, *, new=None, advantages=None, num_sequences=None, num_tokens=None, **more):
        return policy_loss(
            self.new if new is None else new,
            self.old,
            self.advantages if advantages is None else advantages,
            self.cu_seqlens,
            config=config,
            num_sequences=num_sequences or self.S,
            num_tokens=num_tokens or self.R,
            ref_logprobs=more.pop("ref", self.ref),
            **more,
        )

    def gradient(self, config, **more):
        new = self.new.clone().requires_grad_()
        output = self.loss(config, new=new, **more)
        (gradient,) = torch.autograd.grad(output.loss, new)
        return output, gradient


def by_hand(batch, config, token_advantages=None):
    """(loss, gradient [R]) by scalar arithmetic; the gradient from the derivative worked out on paper."""
    loss, gradient, start = 0.0, np.zeros(batch.R), 0
    for i, L in enumerate(batch.lengths):
        new = [float(batch.new[start + t]) for t in range(L)]
        old = [float(batch.old[start + t]) for t in range(L)]
        s = (math.prod(math.exp(a) for a in new) / math.prod(math.exp(a) for a in old)) ** (1 / L)
        per_token = {
            "sequence_mean": 1 / (batch.S * L),
            "token_mean": 1 / batch.R,
            "dr_grpo": 1 / (batch.S * C),
        }
        weight = per_token[config.aggregation]
        for t in range(L):
            ratio = math.exp(new[t]) / math.exp(old[t]) if config.level == "token" else s
            A = float(batch.advantages[i] if token_advantages is None else token_advantages[start + t])
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            objective = min(ratio * A, clipped * A)
            free = ratio * A <= clipped * A
            if config.dual_clip and A < 0 and objective < config.dual_clip * A:
                objective, free = config.dual_clip * A, False
            loss -= weight * objective
            if free and config.level == "sequence":  # ds/dx_u = s / L for every token u of the answer
                gradient[start : start + L] -= weight * A * s / L
            elif free:  # dw_t/dx_t = w_t, and ds_it/dx_t = s_i
                gradient[start + t] -= weight * A * ratio
            if config.kl_coef:
                r = math.exp(float(batch.ref[start + t])) / math.exp(new[t])
                loss += config.kl_coef * weight * (r - math.log(r) - 1)
                gradient[start + t] += config.kl_coef * weight * (1 - r)
        start += L
    return loss, gradient


@pytest.mark.parametrize("extra", [{}, {"dual_clip": 1.002}, {"kl_coef": 0.3}], ids=["plain", "dual", "kl"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_value_and_gradient_equal_the_equations_written_out(level, aggregation, extra):
    config = config_of(level, aggregation, clip_low=3e-4, clip_high=4e-4, **extra)
    for seed in range(4):
        batch = Batch(seed=seed)
        output, gradient = batch.gradient(config)
        loss, expected = by_hand(batch, config)
        assert output.loss.dtype == torch.float64
        assert output.loss.item() == pytest.approx(loss, abs=1e-12)
        np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", ["token", "sequence_token"])
def test_advantages_may_differ_per_token_below_sequence_level(level):
    batch, config = Batch(seed=5), config_of(level)
    output, gradient = batch.gradient(config, advantages=batch.token_advantages)
    loss, expected = by_hand(batch, config, batch.token_advantages)
    assert output.loss.item() == pytest.approx(loss, abs=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_gradient_equals_finite_differences(level):
    """Not for sequence_token, whose value is by design not what its gradient belongs to."""
    batch, config = Batch(lengths=(3, 2, 4)), config_of(level, clip_low=0.2, clip_high=0.3, kl_coef=0.1)
    new = batch.new.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: batch.loss(config, new=x).loss, new, atol=1e-8)


def test_sequence_token_with_one_advantage_per_answer_is_gspo():
    """GSPO paper, section 4.3: same objective, clipping and gradient when all advantages of an answer are equal."""
    batch = Batch(seed=3)
    one, two = (batch.gradient(config_of(level)) for level in ("sequence", "sequence_token"))
    assert one[0].loss.item() == pytest.approx(two[0].loss.item(), abs=1e-14)
    torch.testing.assert_close(one[1], two[1], atol=1e-15, rtol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_micro_batches_in_any_order_add_up_to_the_batch(level, aggregation):
    batch, config = Batch(seed=1), config_of(level, aggregation, kl_coef=0.1, dual_clip=1.002)
    given_too = ("entropy", "rollout")
    whole, gradient = batch.gradient(config, entropy=batch.entropy, rollout_logprobs=batch.rollout)
    for split in ([[0, 1, 2], [3, 4, 5]], [[5], [4, 0], [2, 3, 1]], [[i] for i in range(6)]):
        summed, collected, metrics = 0.0, torch.full_like(gradient, math.nan), []
        for indices in split:
            part, tokens = batch.select(indices)
            entropy, rollout = (getattr(part, name) for name in given_too)
            output, own = part.gradient(
                config, num_sequences=batch.S, num_tokens=batch.R, entropy=entropy, rollout_logprobs=rollout
            )
            summed += output.loss.item()
            collected[tokens] = own
            metrics.append(output.metrics)
        assert summed == pytest.approx(whole.loss.item(), abs=1e-13)
        torch.testing.assert_close(collected, gradient, atol=1e-14, rtol=0)
        assert summarize(reduce_metrics(metrics)) == pytest.approx(summarize(whole.metrics), abs=1e-12)


def test_packing_equals_padding():
    """The paper's objective on a padded [S, T] rectangle, in float64."""
    batch, config = Batch(seed=2), config_of()
    T = max(batch.lengths)
    mask = torch.arange(T) < torch.tensor(batch.lengths)[:, None]
    new, old = torch.full((batch.S, T), -99.0).double(), torch.full((batch.S, T), -7.0).double()
    new[mask], old[mask] = batch.new, batch.old
    new.requires_grad_()
    s = (((new - old) * mask).sum(1) / mask.sum(1)).exp()
    A = batch.advantages
    objective = torch.min(s * A, s.clamp(1 - config.clip_low, 1 + config.clip_high) * A)
    expected = -objective.mean()
    output, gradient = batch.gradient(config)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-14)
    (padded,) = torch.autograd.grad(expected, new)
    torch.testing.assert_close(gradient, padded[mask], atol=1e-15, rtol=0)
    assert not padded[~mask].any()


@pytest.mark.parametrize("level", LEVELS)
def test_gradient_is_exactly_zero_where_clipped_and_nowhere_else(level):
    lengths = (2, 2, 2, 2, 2)
    batch = Batch(lengths=lengths)
    shift = torch.tensor([0.1, 0.1, -0.1, -0.1, 2.0]).repeat_interleave(2).double()
    batch.old = batch.new - shift
    batch.advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0]).double()
    config = config_of(level, clip_low=0.05, clip_high=0.05, dual_clip=5.0)
    output, gradient = batch.gradient(config)
    zero = (gradient == 0).view(5, 2).all(1).tolist()
    # too high with A > 0; pulled back by A < 0; pulled back by A > 0; too low with A < 0; beyond the dual
    # clip
    assert zero == [True, False, False, True, True]
    assert (gradient.view(5, 2)[[1, 2]] != 0).all()
    for name in ("low", "high", "dual"):
        assert output.metrics[f"clip_{name}_fraction"] == pytest.approx(1 / 5)
    assert output.metrics["clip_token_fraction"] == pytest.approx(6 / 10)


def test_a_ratio_that_overflows_is_clipped_with_gradient_zero_and_not_nan():
    batch = Batch(lengths=(1, 1))
    batch.new, batch.old = torch.zeros(2).double(), torch.tensor([-2000.0, 0.0]).double()
    batch.advantages = torch.tensor([1.0, 1.0]).double()
    output, gradient = batch.gradient(config_of(), ref=None)
    assert gradient.tolist() == [0.0, -0.5]
    assert output.loss.item() == pytest.approx(-(1 + 4e-4 + 1) / 2)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_equal_policies_give_ratio_one_and_the_policy_gradient(level, aggregation):
    batch = Batch(seed=4)
    batch.old = batch.new.clone()
    output, gradient = batch.gradient(config_of(level, aggregation))
    assert {output.metrics[f"ratio_{name}"] for name in ("min", "max")} == {1.0}
    assert output.metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-15)
    assert output.metrics["approx_kl"] == 0.0
    assert output.metrics["clip_token_fraction"] == 0.0
    # REINFORCE: the gradient of −Σ a_i A_i log π(y_it)
    L = torch.tensor(batch.lengths).double()
    weight = {
        "sequence_mean": 1 / (batch.S * L),
        "token_mean": 1 / L.sum() + 0 * L,
        "dr_grpo": 1 / (batch.S * C) + 0 * L,
    }
    expected = -(weight[aggregation] * batch.advantages).repeat_interleave(L.long())
    torch.testing.assert_close(gradient, expected, atol=1e-15, rtol=0)


def test_float32_log_probs_give_a_float32_loss_and_gradient_near_float64():
    batch = Batch(lengths=(200, 900, 1500), dtype=torch.float32)
    exact = Batch(lengths=(200, 900, 1500))
    exact.new, exact.old, exact.advantages = batch.new.double(), batch.old.double(), batch.advantages.double()
    output, gradient = batch.gradient(config_of(), ref=None)
    reference, wanted = exact.gradient(config_of(), ref=None)
    assert output.loss.dtype == gradient.dtype == torch.float32
    assert output.loss.item() == pytest.approx(reference.loss.item(), rel=1e-7)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-6, atol=0)
    assert output.metrics == pytest.approx(reference.metrics, rel=1e-12)


def test_metrics_equal_numpy():
    batch, config = Batch(seed=6), config_of(kl_coef=0.1)
    metrics = batch.loss(config, entropy=batch.entropy, rollout_logprobs=batch.rollout).metrics
    pieces = lambda x: np.split(x.numpy(), np.cumsum(batch.lengths)[:-1])
    mean = lambda x: np.mean([piece.mean() for piece in pieces(x)])
    x, d = batch.new - batch.old, batch.ref - batch.new
    s = np.array([math.exp(piece.mean()) for piece in pieces(x)])
    A = batch.advantages.numpy()
    low, high = (A < 0) & (s < 1 - 3e-4), (A > 0) & (s > 1 + 4e-4)
    assert low.any()
    assert high.any()
    assert not (low | high).all()
    gap = (batch.old - batch.rollout).abs()
    of_mismatch = {name for name in metrics if name.startswith("mismatch/")}  # see test_correction.py
    assert of_mismatch == {"mismatch/k1", "mismatch/k3", "mismatch/ratio"}
    assert {name: metrics[name] for name in metrics.keys() - of_mismatch} == pytest.approx(
        {
            "ratio_mean": s.mean(),
            "ratio_min": s.min(),
            "ratio_max": s.max(),
            "clip_low_fraction": low.mean(),
            "clip_high_fraction": high.mean(),
            "clip_token_fraction": ((low | high) * np.array(batch.lengths)).sum() / batch.R,
            "approx_kl": mean(torch.exp(x) - 1 - x),
            "entropy": mean(batch.entropy),
            "kl_ref": mean(torch.exp(d) - 1 - d),
            "logprob_gap_mean": mean(gap),
            "logprob_gap_max": gap.max().item(),
        },
        abs=1e-12,
    )


def test_metrics_that_need_what_was_not_given_are_absent():
    batch = Batch()
    output = policy_loss(
        batch.new, batch.old, batch.advantages, batch.cu_seqlens, config=config_of(), num_sequences=6
    )
    assert set(output.metrics) == {
        *("ratio_mean", "ratio_min", "ratio_max", "clip_low_fraction", "clip_high_fraction", "approx_kl")
    }


def test_the_gradient_reaches_only_the_log_probs():
    batch = Batch()
    inputs = {name: getattr(batch, name).requires_grad_() for name in ("old", "ref", "advantages")}
    new = batch.new.clone().requires_grad_()
    batch.loss(config_of(kl_coef=0.1), new=new).loss.backward()
    assert new.grad is not None
    assert all(value.grad is None for value in inputs.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["new", "old", "ref", "rollout", "entropy"])
def test_a_non_finite_token_stops_with_the_name_of_its_sequence(what, value):
    batch = Batch()  # token 12 is the second of sequence 3
    getattr(batch, what)[12] = value
    names = [f"group 7 completion {i}" for i in range(6)]
    with pytest.raises(
        NonFiniteError, match=r"group 7 completion 3 is -?(nan|inf) at response token 1"
    ) as error:
        batch.loss(config_of(), entropy=batch.entropy, rollout_logprobs=batch.rollout, names=names)
    assert {"new": "logprobs", "old": "old_logprobs"}.get(what, what) in str(error.value)


def test_a_non_finite_advantage_stops_with_the_name_of_its_sequence():
    batch = Batch()
    batch.advantages[4] = math.nan
    with pytest.raises(NonFiniteError, match="advantages of sequence 4 is nan"):
        batch.loss(config_of())


def test_a_loss_that_overflows_stops_with_the_name_of_the_sequence():
    batch = Batch(lengths=(2, 3, 1), dtype=torch.float32)
    batch.old[2:5] = batch.new[2:5] - 200.0  # finite in float64, not in the dtype that comes back
    batch.advantages = torch.tensor([1.0, -1.0, 1.0])
    with pytest.raises(NonFiniteError, match="loss of sequence 1"):
        batch.loss(config_of(), ref=None)
    batch.old[2:5] = batch.new[2:5] - 2000.0
    for level in LEVELS:
        with pytest.raises(NonFiniteError, match="loss of sequence 1"):
            batch.loss(config_of(level), ref=None)


def test_a_kl_that_overflows_stops_with_the_name_of_the_sequence():
    batch = Batch(lengths=(2, 3, 1))
    batch.ref[5] = batch.new[5] + 1000.0
    with pytest.raises(NonFiniteError, match="KL to the reference of sequence 2"):
        batch.loss(config_of(kl_coef=0.1))


def test_a_sequence_without_response_tokens_is_refused_by_name():
    x = torch.zeros(5)
    cu_seqlens = torch.tensor([0, 3, 3, 5])
    with pytest.raises(ValueError, match="b has no trained response token"):
        policy_loss(
            x, x, torch.ones(3), cu_seqlens, config=config_of(), num_sequences=3, names=["a", "b", "c"]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "from 0 to the 5 tokens"),
        ({"cu_seqlens": torch.tensor([1, 2, 5])}, "from 0 to the 5 tokens"),
        ({"cu_seqlens": torch.tensor([0])}, "at least one sequence"),
        ({"old_logprobs": torch.zeros(4)}, "old_logprobs has shape"),
        ({"advantages": torch.zeros(5)}, "advantages has shape"),
        ({"num_sequences": 1}, "num_sequences=1 is below the 2 sequences"),
        ({"names": ["a"]}, "names holds 1"),
        ({"config": LossConfig(aggregation="token_mean")}, "pass the response tokens of the whole batch"),
        ({"config": LossConfig(aggregation="dr_grpo")}, "loss.dr_grpo_length"),
        ({"config": LossConfig(kl_coef=0.1)}, "loss.kl_coef=0.1 needs log-probs of a reference"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    fitting = {
        "logprobs": torch.zeros(5),
        "old_logprobs": torch.zeros(5),
        "advantages": torch.ones(2),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "config": LossConfig(),
        "num_sequences": 2,
    }
    policy_loss(**fitting)
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**fitting, **change})


def test_a_clip_that_cannot_act_is_told():
    assert check_clip_can_act(LossConfig(), 2) is None
    assert "updates_per_batch=1" in (check_clip_can_act(LossConfig(), 1) or "")
    wide = LossConfig(clip_low=0.2, clip_high=0.28, allow_wide_clip=True)
    assert "loss.clip_low=0.2" in (check_clip_can_act(wide, 4) or "")
    assert check_clip_can_act(LossConfig(level="token", clip_low=0.2, clip_high=0.28), 4) is None


lengths_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@settings(max_examples=60)
@given(
    lengths=lengths_strategy,
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 1e-4, 1e-3, 0.3]),
    level=st.sampled_from(LEVELS),
    aggregation=st.sampled_from(AGGREGATIONS),
    dual=st.sampled_from([None, 1.0005, 3.0]),
    kl=st.sampled_from([0.0, 0.05]),
)
def test_any_batch_equals_the_equations(lengths, seed, spread, level, aggregation, dual, kl):
    batch, config = Batch(lengths, seed, spread), config_of(level, aggregation, dual_clip=dual, kl_coef=kl)
    output, gradient = batch.gradient(config)
    loss, expected = by_hand(batch, config)
    assert output.loss.item() == pytest.approx(loss, abs=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-12, rtol=0)
    metrics = output.metrics
    assert metrics["ratio_min"] - 1e-15 <= metrics["ratio_mean"] <= metrics["ratio_max"] + 1e-15
    assert 0 <= metrics["clip_low_fraction"] + metrics["clip_high_fraction"] <= 1 + 1e-12
    assert metrics["approx_kl"] >= -1e-15


@settings(max_examples=30)
@given(lengths=lengths_strategy, seed=st.integers(0, 2**31), data=st.data(), level=st.sampled_from(LEVELS))
def test_order_of_sequences_does_not_matter(lengths, seed, data, level):
    batch = Batch(lengths, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    permuted, tokens = batch.select(order)
    one, two = batch.gradient(config_of(level)), permuted.gradient(config_of(level))
    assert one[0].loss.item() == pytest.approx(two[0].loss.item(), abs=1e-14)
    torch.testing.assert_close(one[1][tokens], two[1], atol=1e-15, rtol=0)
