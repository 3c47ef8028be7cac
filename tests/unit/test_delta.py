"""The gated delta rule and its convolution over packed sequences are what their equations say of each sequence alone."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import causal_conv1d_fn

from gspo_mm.policy.delta import CHUNK, convolution, delta_rule, l2norm

HEADS, K, V = 3, 8, 12
LENGTHS = [[5], [1, 2], [CHUNK], [CHUNK + 1, 3, 2 * CHUNK + 2, CHUNK, 1], [200, 64, 65, 1, 1]]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(count: int, *, decay: float = 2.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, count, HEADS, *shape, generator=generator)

    made = {
        "query": l2norm(random(K)),
        "key": l2norm(random(K)),
        "value": random(V),
        "g": -decay * random().abs(),
        "beta": random().sigmoid(),
    }
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def by_the_equation(made: dict[str, torch.Tensor], lengths: list[int]) -> torch.Tensor:
    """Token by token in float64: equation 10 of arXiv 2412.06464."""
    wide = {name: tensor.double()[0] for name, tensor in made.items()}
    outputs: list[torch.Tensor] = []
    for start, end in pairwise(offsets(lengths).tolist()):
        memory = torch.zeros(HEADS, K, V, dtype=torch.float64)
        for t in range(start, end):
            key, step = wide["key"][t], wide["beta"][t]
            memory = memory * wide["g"][t].exp()[:, None, None]
            held = torch.einsum("hk,hkv->hv", key, memory)
            memory = memory + torch.einsum("h,hk,hv->hkv", step, key, wide["value"][t] - held)
            outputs.append(torch.einsum("hk,hkv->hv", wide["query"][t] / K**0.5, memory))
    return torch.stack(outputs)[None]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
# strong decays: their sums over a chunk reach a thousand, of which float32 keeps four digits after the point
@pytest.mark.parametrize("decay", [0.01, 2.0, 20.0])
def test_outputs_and_gradients_are_those_of_the_equation(lengths: list[int], decay: float) -> None:
    made = inputs(sum(lengths), decay=decay)
    ours, _ = delta_rule(**made, cu_seqlens=offsets(lengths))
    expected = by_the_equation(made, lengths)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=3e-6)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((ours * weights).sum(), list(made.values()))
    wanted = torch.autograd.grad((expected * weights).sum(), list(made.values()))
    for name, a, b in zip(made, found, wanted, strict=True):
        scale = float(b.abs().max()) or 1.0
        assert float((a - b).abs().max()) / scale < 1e-5, name


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("width", [1, 4])
def test_the_convolution_is_that_of_each_sequence_alone(lengths: list[int], width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, sum(lengths), 10, generator=generator)
    weight = torch.randn(10, width, generator=generator)
    ours, _ = convolution(x, weight, None, cu_seqlens=offsets(lengths))
    alone = [causal_conv1d_fn(part.mT, weight, activation="silu").mT for part in x.split(lengths, dim=1)]
    torch.testing.assert_close(ours, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


def test_no_sequence_sees_another_to_the_bit() -> None:
    lengths = [70, 9, 130]
    made, x = inputs(sum(lengths)), torch.randn(1, sum(lengths), 10)
    weight, middle = torch.randn(10, 4), slice(70, 79)
    changed = {name: tensor.detach().clone() for name, tensor in made.items()}
    for tensor in (changed["value"], changed["key"], changed["query"]):
        tensor[:, middle] *= -0.5
    y = x.clone()
    y[:, middle] += 1
    cu_seqlens = offsets(lengths)
    for before, after in (
        (delta_rule(**made, cu_seqlens=cu_seqlens)[0], delta_rule(**changed, cu_seqlens=cu_seqlens)[0]),
        (
            convolution(x, weight, None, cu_seqlens=cu_seqlens)[0],
            convolution(y, weight, None, cu_seqlens=cu_seqlens)[0],
        ),
    ):
        same = (before == after).flatten(2).all(-1)[0]
        assert same[:70].all()
        assert same[79:].all()
        assert not same[middle].any()


def test_a_bias_of_the_convolution_is_added_before_its_activation() -> None:
    x, weight, bias = torch.randn(1, 6, 4), torch.randn(4, 3), torch.randn(4)
    ours, _ = convolution(x, weight, bias, cu_seqlens=offsets([6]))
    expected = F.silu(F.conv1d(x.mT, weight[:, None], bias, padding=2, groups=4)[..., :6]).mT
    torch.testing.assert_close(ours, expected)
