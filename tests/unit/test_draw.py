"""Tokens are drawn from the distribution whose log-probs are reported."""

import pytest
import torch

from gspo_mm.rollout.embedded import draw
from gspo_mm.types import SamplingParams


def logits() -> torch.Tensor:
    return torch.tensor([0.1, 2.0, -1.0, 1.0, -float("inf")])


def frequencies(sampling: SamplingParams, count: int = 200_000) -> torch.Tensor:
    uniform_B = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token_B, _ = draw(logits().expand(count, -1), uniform_B, sampling)
    return token_B.bincount(minlength=5) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    expected = (logits() / temperature).softmax(-1)
    torch.testing.assert_close(
        frequencies(SamplingParams(temperature=temperature)), expected, atol=5e-3, rtol=0
    )


def test_top_k_keeps_the_k_most_likely() -> None:
    expected = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0]).where(
        torch.tensor([0, 1, 0, 1, 0]).bool(), torch.tensor(-1e9)
    )
    torch.testing.assert_close(frequencies(SamplingParams(top_k=2)), expected.softmax(-1), atol=5e-3, rtol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    # softmax: 0.09, 0.61, 0.03, 0.22 and 0: p = 0.7 needs the two most likely
    observed = frequencies(SamplingParams(top_p=0.7))
    assert (observed > 0).tolist() == [False, True, False, True, False]
    assert (frequencies(SamplingParams(top_p=0.01)) > 0).tolist() == [False, True, False, False, False]


def test_log_probs_are_of_the_scaled_distribution_before_any_filter() -> None:
    expected = (logits() / 0.7).log_softmax(-1)
    for sampling in (SamplingParams(temperature=0.7), SamplingParams(temperature=0.7, top_k=1, top_p=0.5)):
        token_B, logprob_B = draw(logits()[None], torch.tensor([0.4], dtype=torch.float64), sampling)
        torch.testing.assert_close(logprob_B, expected[token_B])


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 1e-16, 1.0])
def test_the_ends_of_the_unit_interval_give_possible_tokens(uniform: float) -> None:
    token_B, logprob_B = draw(logits()[None], torch.tensor([uniform], dtype=torch.float64), SamplingParams())
    assert token_B.item() < 4
    assert torch.isfinite(logprob_B).all()


def test_greedy_takes_the_most_likely_at_temperature_one() -> None:
    token_B, logprob_B = draw(logits()[None], torch.tensor([0.9]), SamplingParams(temperature=0.0))
    assert token_B.item() == 1
    torch.testing.assert_close(logprob_B, logits().log_softmax(-1)[1:2])
