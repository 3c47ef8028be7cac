"""What makes transformers' own forward decode cheaply: a cache with room, attention that copies no keys, torch's RMSNorm.

All of it holds for any model of transformers, and leaves alone what it does not know.
Dims: B rows, A query heads, G key heads, T tokens in the cache, H head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class Room(DynamicLayer):
    """One layer's keys and values in tensors that have room for what will be decoded: a new token is written, not appended
    by a copy of all.
    """

    def __init__(self, layer: DynamicLayer, *, copies: int, tokens: int) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.length = layer.keys.shape[2]
        self.keys, self.values = (
            F.pad(t, (0, 0, 0, tokens)).repeat_interleave(copies, dim=0) for t in (layer.keys, layer.values)
        )
        self.is_initialized = True

    def grow(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, G, T, H] with places for that many tokens at their end, to be filled."""
        assert self.keys is not None
        assert self.values is not None
        self.length += tokens
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return Window(*self.grow(key_states.shape[2])).update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.length


class Window(DynamicLayer):
    """Keys and values of which the last place is still to be filled."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] - 1


def make_room(cache: Any, *, copies: int, tokens: int) -> None:
    """Repeat every row of a filled DynamicCache; layers that grow by every token get room for that many more."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = Room(layer, copies=copies, tokens=tokens)
        else:
            layer.batch_repeat_interleave(copies)


def share_keys_in_decoding(model: Any) -> None:
    """Let the decoder's attention read each key once for all query heads that share it."""
    AttentionInterface.register("sdpa_grouped", grouped_attention)
    AttentionMaskInterface.register("sdpa_grouped", sdpa_mask)
    text = model.config.get_text_config()
    text._attn_implementation = "sdpa_grouped"


def grouped_attention(
    module: torch.nn.Module,
    query_BAQH: torch.Tensor,
    key_BGTH: torch.Tensor,
    value_BGTH: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' "sdpa"; for one query a row, heads of a group stand where queries do, so that no key is repeated."""
    rows, heads, queries, size = query_BAQH.shape
    if queries > 1:
        return sdpa_attention_forward(
            module, query_BAQH, key_BGTH, value_BGTH, attention_mask, scaling=scaling, **kwargs
        )
    grouped = query_BAQH.reshape(rows, key_BGTH.shape[1], -1, size)
    output = F.scaled_dot_product_attention(
        grouped, key_BGTH, value_BGTH, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, heads, size), None


@torch.no_grad()
def use_torch_norms(model: torch.nn.Module) -> None:
    """Let modules that compute what torch's RMSNorm does in seven steps call that instead; others keep their forward.

    Which do is found out by trying, for which their weights, arbitrary so far, are set.
    """
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", None)
        if eps is None or [name for name, _ in module.named_parameters()] != ["weight"]:
            continue
        weight: Any = module.weight
        weight.copy_(torch.linspace(0.5, 1.5, weight.numel()).view_as(weight))
        sample = torch.linspace(-2, 3, 2 * weight.numel()).view(2, *weight.shape).to(weight)
        norm = partial(_norm, weight, eps)
        if torch.allclose(norm(sample), module(sample), rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-6):
            module.forward = norm


def _norm(weight: torch.Tensor, eps: float, hidden_states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden_states, weight.shape, weight, eps)
