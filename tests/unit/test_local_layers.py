"""The layers that stand in for Transformer Engine's: values and gradients are those of torch's own operations, in float64."""

import torch

from gspo_mm.families.sinks import attend_with_sinks
from gspo_mm.policy.attention import Rotate
from gspo_mm.policy.spec import Normalized


def test_the_norm_is_torchs_in_value_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(3, 2, 8, generator=generator, dtype=torch.float64)
    found = []
    for function in (
        lambda: Normalized.apply(x, weight, 1e-3),
        lambda: torch.nn.functional.rms_norm(x, (8,), weight, 1e-3),
    ):
        value = function()
        found.append((value, *torch.autograd.grad(value, (x, weight), gradient)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_rotation_is_a_complex_product_in_value_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 2, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 1, 4, generator=generator, dtype=torch.float64)
    gradient = torch.randn(5, 2, 10, generator=generator, dtype=torch.float64)
    both = angles.repeat(1, 1, 2)  # 8 of 10 dims are turned
    ours = Rotate.apply(states, both.cos(), both.sin())
    turned = torch.complex(states[..., :4], states[..., 4:8]) * torch.polar(torch.ones_like(angles), angles)
    theirs = torch.cat([turned.real, turned.imag, states[..., 8:]], dim=-1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, states, gradient), torch.autograd.grad(theirs, states, gradient)
    )


def test_a_sink_takes_its_part_of_the_softmax_in_value_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value, sinks = rand(2, 6, 5, 4), rand(2, 3, 7, 4), rand(2, 3, 7, 4), rand(6)
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2).triu(-1)
    mask[1] = False  # a query that sees the sink alone
    ours = attend_with_sinks(query, key, value, sinks[:, None, None], mask=mask, scale=0.3)
    scores = 0.3 * query @ key.repeat_interleave(2, 1).mT
    scores = scores.masked_fill(~mask, -torch.inf)
    scores = torch.cat([scores, sinks[:, None, None].expand(2, 6, 5, 1)], -1)
    theirs = scores.softmax(-1)[..., :-1] @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    inputs = (query, key, value, sinks)
    found = (torch.autograd.grad(output, inputs, gradient) for output in (ours, theirs))
    torch.testing.assert_close(*found)
