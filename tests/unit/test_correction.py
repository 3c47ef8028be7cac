"""The weights that answer for the mismatch of engine and policy: their equations, and all that they must leave alone."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_mm.config import ConfigError, CorrectionConfig, LossConfig, load_config, save_config
from gspo_mm.loss import reduce_metrics, summarize
from gspo_mm.loss.correction import compare, correction_weights
from gspo_mm.observe.metrics import is_documented
from gspo_mm.types import GspoError
from tests.unit.test_gspo import AGGREGATIONS, LEVELS, Batch, C, config_of

KINDS = ["none", "truncate", "mask"]
LOW, HIGH = 0.97, 1.04
# answers whose ratios lie below, within and above the bounds, some of them clipped too
LENGTHS = (3, 1, 7, 4, 2, 5, 6, 2)


def corrected(
    kind: str, level: str = "sequence", aggregation: str = "sequence_mean", **changes
) -> LossConfig:
    return config_of(
        level, aggregation, correction=CorrectionConfig(kind=kind, low=LOW, high=HIGH), **changes
    )


def mismatched(seed: int = 0, lengths=LENGTHS, spread: float = 0.1) -> Batch:
    batch = Batch(lengths, seed)
    noise = np.random.default_rng(seed + 1000).normal(scale=spread, size=batch.R)
    batch.rollout = batch.old - torch.tensor(noise)
    return batch


def weights_by_hand(batch: Batch, kind: str) -> tuple[list[float], list[float], list[bool]]:
    """(c_i, w_i, corrected) one sequence at a time, from probabilities instead of their logarithms."""
    ratios, weights, changed, start = [], [], [], 0
    for L in batch.lengths:
        product = 1.0
        for t in range(start, start + L):
            product *= math.exp(float(batch.old[t])) / math.exp(float(batch.rollout[t]))
        c = product ** (1 / L)
        ratios.append(c)
        changed.append({"none": False, "truncate": c > HIGH, "mask": c < LOW or c > HIGH}[kind])
        weights.append({"none": 1.0, "truncate": min(c, HIGH), "mask": 0.0 if changed[-1] else 1.0}[kind])
        start += L
    return ratios, weights, changed


def by_hand(batch: Batch, config: LossConfig) -> tuple[float, np.ndarray]:
    """(loss, gradient [R]) by scalar arithmetic; the gradient from the derivative worked out on paper."""
    loss, gradient, start = 0.0, np.zeros(batch.R), 0
    _, weights, _ = weights_by_hand(batch, config.correction.kind)
    for i, L in enumerate(batch.lengths):
        x = [float(batch.new[t] - batch.old[t]) for t in range(start, start + L)]
        s, A = math.exp(sum(x) / L), float(batch.advantages[i])
        share = {"sequence_mean": 1 / (batch.S * L), "token_mean": 1 / batch.R, "dr_grpo": 1 / (batch.S * C)}
        a = share[config.aggregation]
        for t in range(L):
            ratio = math.exp(x[t]) if config.level == "token" else s
            bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            loss -= weights[i] * a * min(ratio * A, bounded * A)
            if ratio * A <= bounded * A:  # not clipped: ds/dx_u = s / L for all tokens u, dw_t/dx_t = w_t
                touched = slice(start, start + L) if config.level == "sequence" else start + t
                gradient[touched] -= weights[i] * a * A * ratio / (L if config.level == "sequence" else 1)
            if config.kl_coef:  # has no weight
                d = float(batch.ref[start + t] - batch.new[start + t])
                loss += config.kl_coef * a * (math.exp(d) - d - 1)
                gradient[start + t] += config.kl_coef * a * (1 - math.exp(d))
        start += L
    return loss, gradient


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_equal_the_equations_written_out(kind, level, aggregation, kl_coef):
    config = corrected(kind, level, aggregation, kl_coef=kl_coef)
    for seed in range(3):
        batch = mismatched(seed)
        output, gradient = batch.gradient(config, rollout_logprobs=batch.rollout)
        loss, expected = by_hand(batch, config)
        assert output.loss.item() == pytest.approx(loss, abs=1e-12)
        np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-12, rtol=0)


def test_the_batches_hold_ratios_below_within_and_above_the_bounds():
    for seed in range(3):
        ratios = np.array(weights_by_hand(mismatched(seed), "none")[0])
        assert (ratios < LOW).any()
        assert (ratios > HIGH).any()
        assert ((ratios >= LOW) & (ratios <= 1)).any()
        assert ((ratios >= 1) & (ratios <= HIGH)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_those_by_hand(kind):
    batch = mismatched()
    config = corrected(kind).correction
    seen = compare(batch.old, batch.rollout, batch.cu_seqlens.long().diff(), config)
    ratios, weights, changed = weights_by_hand(batch, kind)
    assert seen.ratio.dtype == seen.weight.dtype == torch.float64
    np.testing.assert_allclose(seen.ratio.numpy(), ratios, rtol=1e-14)
    np.testing.assert_allclose(seen.weight.numpy(), weights, rtol=1e-14)
    assert (seen.corrected is None) == (kind == "none")
    assert seen.corrected is None or seen.corrected.tolist() == changed


def test_both_bounds_belong_to_the_range():
    just_below, just_above = math.nextafter(LOW, 0), math.nextafter(HIGH, 2)
    ratios = torch.tensor([LOW, HIGH, 1.0, just_below, just_above, math.inf], dtype=torch.float64)
    weights, outside = correction_weights(ratios, corrected("mask").correction)
    assert weights.tolist() == [1, 1, 1, 0, 0, 0]
    assert outside is not None
    assert outside.tolist() == [False, False, False, True, True, True]
    weights, above = correction_weights(ratios, corrected("truncate").correction)
    assert weights.tolist() == [LOW, HIGH, 1.0, just_below, HIGH, HIGH]
    assert above is not None
    assert above.tolist() == [False, False, False, False, True, True]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_without_a_correction_rollout_log_probs_change_no_bit(level, aggregation):
    for dtype in (torch.float32, torch.float64):
        batch = Batch(dtype=dtype)
        config = config_of(level, aggregation, kl_coef=0.1)
        alone, gradient = batch.gradient(config)
        beside, same = batch.gradient(config, rollout_logprobs=batch.rollout - 0.3)
        assert torch.equal(alone.loss, beside.loss)
        assert torch.equal(gradient, same)
        assert "mismatch/corrected_fraction" not in beside.metrics


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("level", LEVELS)
def test_ratios_and_all_other_metrics_do_not_see_the_correction(level, kind):
    batch = mismatched()
    given_too = {"rollout_logprobs": batch.rollout, "entropy": batch.entropy}
    plain, weighted = (batch.loss(corrected(k, level, kl_coef=0.1), **given_too) for k in ("none", kind))
    assert plain.loss != weighted.loss
    assert weighted.metrics["mismatch/corrected_fraction"] > 0
    assert {**weighted.metrics, "mismatch/corrected_fraction": 0.0} == {
        **plain.metrics,
        "mismatch/corrected_fraction": 0.0,
    }


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_masked_sequence_adds_nothing_and_still_counts_in_the_denominators(level, aggregation):
    batch = mismatched()
    _, gradient = batch.gradient(corrected("none", level, aggregation), ref=None)
    _, masked = batch.gradient(
        corrected("mask", level, aggregation), ref=None, rollout_logprobs=batch.rollout
    )
    outside = torch.tensor(weights_by_hand(batch, "mask")[2]).repeat_interleave(torch.tensor(batch.lengths))
    assert not masked[outside].any()
    assert torch.equal(masked[~outside], gradient[~outside])
    # the same sequences gone from the batch, but not from its counts
    kept = [i for i, gone in enumerate(weights_by_hand(batch, "mask")[2]) if not gone]
    part, _ = batch.select(kept)
    config = corrected("none", level, aggregation)
    without = part.loss(config, ref=None, num_sequences=batch.S, num_tokens=batch.R)
    whole = batch.loss(corrected("mask", level, aggregation), ref=None, rollout_logprobs=batch.rollout)
    assert whole.loss.item() == pytest.approx(without.loss.item(), abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_micro_batches_in_any_order_add_up_to_the_batch(level, kind):
    batch, config = mismatched(seed=1), corrected(kind, level, "token_mean", kl_coef=0.1)
    whole, gradient = batch.gradient(config, rollout_logprobs=batch.rollout)
    expected = summarize(reduce_metrics([whole.metrics]))
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[5], [4, 0], [7, 2, 6, 3, 1]], [[i] for i in range(8)]):
        summed, collected, metrics = 0.0, torch.full_like(gradient, math.nan), []
        for indices in split:
            part, tokens = batch.select(indices)
            counts = {"num_sequences": batch.S, "num_tokens": batch.R}
            output, own = part.gradient(config, rollout_logprobs=part.rollout, **counts)
            summed += output.loss.item()
            collected[tokens] = own
            metrics.append(output.metrics)
        assert summed == pytest.approx(whole.loss.item(), abs=1e-13)
        torch.testing.assert_close(collected, gradient, atol=1e-14, rtol=0)
        merged = summarize(reduce_metrics(metrics))
        assert merged == pytest.approx(expected, abs=1e-12)
        for name in ("mean", "min", "max", "p01", "p50", "p99"):
            assert merged[f"mismatch/ratio_{name}"] == expected[f"mismatch/ratio_{name}"]


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_equal_numpy(kind):
    batch = mismatched(seed=2)
    metrics = summarize(batch.loss(corrected(kind), rollout_logprobs=batch.rollout).metrics)
    pieces = np.split((batch.old - batch.rollout).numpy(), np.cumsum(batch.lengths)[:-1])
    ratios = np.array([np.exp(d.mean()) for d in pieces])
    expected = {
        "k1": -np.mean([d.mean() for d in pieces]),
        "k3": np.mean([(np.exp(d) - 1 - d).mean() for d in pieces]),
        "ratio_mean": ratios.mean(),
        "ratio_min": ratios.min(),
        "ratio_max": ratios.max(),
        "ratio_p01": np.quantile(ratios, 0.01),
        "ratio_p50": np.quantile(ratios, 0.5),
        "ratio_p99": np.quantile(ratios, 0.99),
    }
    if kind == "truncate":
        expected["corrected_fraction"] = (ratios > HIGH).mean()
    if kind == "mask":
        expected["corrected_fraction"] = ((ratios < LOW) | (ratios > HIGH)).mean()
    seen = {name.removeprefix("mismatch/"): v for name, v in metrics.items() if name.startswith("mismatch/")}
    assert seen == pytest.approx(expected, abs=1e-13)
    assert all(is_documented(name) for name in metrics)


def test_k1_and_k3_estimate_the_divergence_of_the_engine_from_the_policy():
    """Tokens drawn from the engine: both means come near Σ p log(p / q), from which the reverse differs."""
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.4, 0.3, 0.3])
    drawn = np.random.default_rng(0).choice(3, size=200_000, p=p)
    logs = lambda probabilities: torch.tensor(np.log(probabilities)[drawn])
    seen = compare(logs(q), logs(p), torch.tensor([len(drawn)]), CorrectionConfig())
    forward, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    assert abs(forward - reverse) > 0.01
    for values in seen.token_means().values():
        assert values.mean().item() == pytest.approx(forward, abs=0.005)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("level", LEVELS)
def test_one_update_without_an_old_pass_is_corrected_by_the_current_log_probs(level, kind):
    """The ratio is 1, so the gradient is REINFORCE's, times the weight of each sequence and nothing more."""
    batch = mismatched()
    batch.old = batch.new
    batch.rollout = batch.new - torch.tensor(np.random.default_rng(9).normal(scale=0.05, size=batch.R))
    new = batch.new.clone().requires_grad_()
    batch.old = new  # not detached here: no gradient may come by way of the weight
    output = batch.loss(corrected(kind, level), new=new, ref=None, rollout_logprobs=batch.rollout)
    (gradient,) = torch.autograd.grad(output.loss, new)
    batch.old = batch.new
    _, weights, changed = weights_by_hand(batch, kind)
    assert 0 < sum(changed) < batch.S
    assert output.metrics["ratio_min"] == output.metrics["ratio_max"] == 1.0
    L = torch.tensor(batch.lengths)
    expected = -(
        torch.tensor(weights, dtype=torch.float64) * batch.advantages / (batch.S * L)
    ).repeat_interleave(L)
    torch.testing.assert_close(gradient, expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize("per_token", [1e-3, -1e-3, 0.01, -0.01, 3.0])
def test_the_weight_of_a_long_sequence_is_that_of_a_short_one(per_token):
    """The product of 20,000 token ratios would be e^20 at 1e-3 nats each, and would not fit float64 at 0.1."""
    weights = []
    for L in (5, 3000, 20_000):
        old = torch.full((L,), -2.0).double()
        for kind in ("truncate", "mask"):
            config = corrected(kind).correction
            weights.append(compare(old, old - per_token, torch.tensor([L]), config).weight.item())
    c = math.exp(per_token)
    assert weights[::2] == pytest.approx([min(c, HIGH)] * 3, rel=1e-12)
    assert weights[1::2] == [float(LOW <= c <= HIGH)] * 3


def test_float32_log_probs_are_compared_in_float64():
    rng = np.random.default_rng(0)
    old = torch.tensor(-rng.exponential(size=4000), dtype=torch.float32)
    rollout = old + torch.tensor(rng.normal(scale=0.02, size=4000), dtype=torch.float32)
    exact = math.fsum((old.double() - rollout.double()).tolist()) / 4000
    seen = compare(old, rollout, torch.tensor([4000]), CorrectionConfig())
    assert math.log(seen.ratio.item()) == pytest.approx(exact, abs=1e-14)


def test_weights_carry_no_gradient():
    batch = mismatched()
    inputs = [batch.old.clone().requires_grad_(), batch.rollout.clone().requires_grad_()]
    seen = compare(*inputs, torch.tensor(batch.lengths), corrected("truncate").correction)
    assert not seen.weight.requires_grad
    new = batch.new.clone().requires_grad_()
    batch.rollout.requires_grad_()
    batch.loss(corrected("truncate"), new=new, rollout_logprobs=batch.rollout).loss.backward()
    assert new.grad is not None
    assert batch.rollout.grad is None


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_rollouts_without_log_probs_cannot_be_corrected(kind):
    batch = mismatched()
    with pytest.raises(
        ConfigError, match=rf"loss\.correction\.kind={kind} needs .* set loss\.correction\.kind=none"
    ):
        batch.loss(corrected(kind))
    assert issubclass(ConfigError, GspoError)  # which is told to all ranks, wherever the data lay
    assert batch.loss(corrected("none")).metrics.keys() == batch.loss(config_of()).metrics.keys()


MINIMAL = "run: {name: a}\nmodel: {path: m}\ndata: {train: [a.tar]}\nreward: {file: r.yaml}\n"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kind=clip"], ["loss.correction.kind='clip'", "'truncate'"]),
        (["knid=mask"], ["loss.correction.knid='mask'", "did you mean kind"]),
        (["low=1.01"], ["loss.correction.low=1.01", "use 0 <= low <= 1 <= high"]),
        (["low=-0.1"], ["loss.correction.low=-0.1", "use 0 <= low <= 1 <= high"]),
        (["high=0.99"], ["loss.correction.high=0.99", "use 0 <= low <= 1 <= high"]),
        (["high=.nan"], ["loss.correction.high=nan", "use 0 <= low <= 1 <= high"]),
        (["kind=mask", "low=1", "high=1"], ["loss.correction.low=1, loss.correction.high=1", "leave room"]),
    ],
)
def test_a_wrong_correction_is_named_with_its_fix(tmp_path: Path, overrides, words):
    (tmp_path / "c.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml", [f"loss.correction.{change}" for change in overrides])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_correction_is_off_by_default_and_reads_back_as_it_was_saved(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(MINIMAL)
    assert load_config(tmp_path / "c.yaml").loss.correction.kind == "none"
    overrides = ["loss.correction.kind=truncate", "loss.correction.high=1", "loss.correction.low=1"]
    config = load_config(tmp_path / "c.yaml", overrides)
    assert config.loss.correction == CorrectionConfig(kind="truncate", low=1.0, high=1.0)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 1e-3, 0.05, 1.0]),
    level=st.sampled_from(LEVELS),
    aggregation=st.sampled_from(AGGREGATIONS),
    kind=st.sampled_from(KINDS),
)
def test_any_batch_equals_the_equations(lengths, seed, spread, level, aggregation, kind):
    batch, config = mismatched(seed, lengths, spread), corrected(kind, level, aggregation)
    output, gradient = batch.gradient(config, rollout_logprobs=batch.rollout)
    loss, expected = by_hand(batch, config)
    assert output.loss.item() == pytest.approx(loss, abs=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-12, rtol=0)
    metrics = summarize(output.metrics)
    ordered = [metrics[f"mismatch/ratio_{name}"] for name in ("min", "p01", "p50", "p99", "max")]
    assert all(a <= b for a, b in pairwise(ordered))
    assert metrics["mismatch/k3"] >= -1e-15
    assert 0 <= metrics.get("mismatch/corrected_fraction", 0) <= 1
