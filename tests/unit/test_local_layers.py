"""The layers that stand in for Transformer Engine's: values and gradients are those of torch's own operations, in float64."""

import torch

from gspo_mm.policy.spec import Normalized, Rotate


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
