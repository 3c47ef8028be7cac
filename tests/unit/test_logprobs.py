"""Log-probs from hidden states and the output weight, against torch's log_softmax over full logits in float64."""

from typing import Any

import pytest
import torch

from gspo_mm.loss import logprobs as module
from gspo_mm.loss.logprobs import linear_logprobs

VOCAB, ROWS, DIM = 37, 40, 8


def inputs(tokens: int = 11, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, DIM, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float) -> Any:
    logprobs = (hidden @ weight[:VOCAB].T / temperature).log_softmax(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 11, 50, None])
def test_values_gradients_and_entropy_are_those_of_full_logits(
    temperature: float, chunk_tokens: int | None
) -> None:
    ours, reference = inputs(), inputs()
    upstream = torch.randn(11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected, expected_entropy = plain(*reference, temperature)
    (expected * upstream).sum().backward()
    found, entropy = linear_logprobs(
        *ours, vocab=VOCAB, temperature=temperature, entropy=True, chunk_tokens=chunk_tokens
    )
    (found * upstream).sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=0, atol=1e-12)
    for mine, theirs in zip(ours[:2], reference[:2], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)
    assert not ours[1].grad[VOCAB:].any()


def test_autograd_agrees_with_finite_differences() -> None:
    hidden, weight, targets = inputs(5)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, targets, vocab=VOCAB, temperature=0.7, chunk_tokens=2)[0],
        (hidden, weight),
    )


def test_float32_is_within_rounding_of_float64() -> None:
    expected = plain(*inputs(), 0.7)
    found = linear_logprobs(
        *inputs(dtype=torch.float32), vocab=VOCAB, temperature=0.7, entropy=True, chunk_tokens=4
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert mine is not None
        assert mine.dtype is torch.float32
        assert float((mine - theirs).detach().abs().max()) < 1e-5


def test_bfloat16_inputs_give_float32_results_and_bfloat16_gradients_summed_in_float32() -> None:
    hidden, weight, targets = inputs(301, dtype=torch.bfloat16)
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    found, _ = linear_logprobs(hidden, weight, targets, vocab=VOCAB, chunk_tokens=1)
    found.sum().backward()
    plain(exact_hidden, exact_weight, targets, 1.0)[0].sum().backward()
    assert found.dtype is torch.float32
    assert weight.grad.dtype is torch.bfloat16
    # 301 sums rounded to bfloat16 one after the other would be off by several percent
    error = (weight.grad.double() - exact_weight.grad).abs().max() / exact_weight.grad.abs().max()
    assert float(error) < 0.02


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_large_logits_neither_overflow_nor_vanish(scale: float) -> None:
    hidden, weight, targets = inputs(scale=scale)
    found, entropy = linear_logprobs(hidden, weight, targets, vocab=VOCAB, entropy=True, chunk_tokens=3)
    expected, expected_entropy = plain(*inputs(scale=scale), 1.0)
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-9, atol=1e-9)
    assert torch.isfinite(hidden.grad).all()


def test_no_tokens_give_no_values_and_zero_gradients() -> None:
    hidden, weight, targets = inputs(0)
    found, entropy = linear_logprobs(hidden, weight, targets, vocab=VOCAB, entropy=True)
    assert found.shape == entropy.shape == (0,)
    found.sum().backward()
    assert not weight.grad.any()


def test_only_wanted_gradients_are_made_and_entropy_has_none() -> None:
    hidden, weight, targets = inputs()
    found, entropy = linear_logprobs(hidden, weight.detach(), targets, vocab=VOCAB, entropy=True)
    assert not entropy.requires_grad
    found.sum().backward()
    assert hidden.grad is not None
    frozen, _ = linear_logprobs(hidden.detach(), weight, targets, vocab=VOCAB)
    frozen.sum().backward()
    assert weight.grad is not None
    assert linear_logprobs(*inputs(), vocab=VOCAB)[1] is None


def test_equal_inputs_give_equal_bits() -> None:
    results = []
    for _ in range(2):
        hidden, weight, targets = inputs(50, dtype=torch.float32)
        linear_logprobs(hidden, weight, targets, vocab=VOCAB, chunk_tokens=7)[0].sum().backward()
        results.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_chunks_are_as_large_as_the_bytes_they_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    logits = module._logits
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * ROWS * 4)  # four tokens of float32 logits
    monkeypatch.setattr(
        module, "_logits", lambda hidden, *rest: (sizes.append(len(hidden)), logits(hidden, *rest))[1]
    )
    linear_logprobs(*inputs(), vocab=VOCAB)[0].sum().backward()
    assert sizes == [4, 4, 3] * 2


def test_shapes_and_targets_that_do_not_fit_are_refused() -> None:
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match=r"hidden \[11, 8\], weight \[40, 8\] and targets \[10\] do not fit"):
        linear_logprobs(hidden, weight, targets[:10], vocab=VOCAB)
    with pytest.raises(ValueError, match="outside the vocabulary of 37"):
        linear_logprobs(hidden, weight, targets + VOCAB, vocab=VOCAB)
