"""What makes transformers' own forward decode cheaply: a cache with room, attention that copies no keys, torch's RMSNorm.

All of it holds for any model of transformers, and leaves alone what it does not know.
Dims: B rows, A query heads, G key heads, T tokens in the cache, H head size.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gspo_mm.families.sinks import attend_with_sinks


def cache_argument(model: torch.nn.Module) -> str:
    """What the model's forward calls its cache: `cache` since transformers 5.24, which remarks on the older name until 5.40."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Room(DynamicLayer):
    """One layer's keys and values in tensors that have room for what will be decoded: a new token is written, not appended
    by a copy of all.
    """

    def __init__(self, layer: DynamicLayer, rows: torch.Tensor, *, tokens: int) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.length = layer.keys.shape[2]
        self.keys, self.values = (
            F.pad(t, (0, 0, 0, tokens)).index_select(0, rows) for t in (layer.keys, layer.values)
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


class Running(LinearAttentionLayer):
    """One layer's last inputs of a convolution and its memory, which every token changes in place."""

    def __init__(self, inputs: torch.Tensor, memory: torch.Tensor) -> None:
        super().__init__()
        self.conv_states[0], self.recurrent_states[0] = inputs, memory
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.conv_kernel_size[0], self.has_previous_state[0] = inputs.shape[-1], True
        self.dtype, self.device = inputs.dtype, inputs.device


def make_room(cache: Any, rows: torch.Tensor, *, tokens: int) -> None:
    """Make a filled DynamicCache one of `rows` [B] of it; layers that hold keys get room for that many more.

    Those of windows then keep what leaves the window too, which attention passes over.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            cache.layers[number] = Room(layer, rows, tokens=tokens)
        else:
            layer.reorder_cache(rows)


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
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' "sdpa", and with sinks `s_aux` [A]; for one query a row, heads of a group stand where queries do, so that
    no key is repeated, and only the last `sliding_window` keys are looked at: with more queries the mask says that.
    """
    rows, heads, queries, size = query_BAQH.shape
    if queries > 1:
        if s_aux is not None:
            return _attend_to_sinks(query_BAQH, key_BGTH, value_BGTH, attention_mask, scaling, s_aux), None
        return sdpa_attention_forward(
            module, query_BAQH, key_BGTH, value_BGTH, attention_mask, scaling=scaling, **kwargs
        )
    if sliding_window is not None:
        key_BGTH, value_BGTH = (t[:, :, -sliding_window:] for t in (key_BGTH, value_BGTH))
        attention_mask = None if attention_mask is None else attention_mask[..., -sliding_window:]
    grouped = query_BAQH.reshape(rows, key_BGTH.shape[1], -1, size)
    if s_aux is not None:
        sinks = s_aux.view(key_BGTH.shape[1], -1)
        output = _attend_to_sinks(grouped, key_BGTH, value_BGTH, attention_mask, scaling, sinks)
        output = output.transpose(1, 2)
    else:
        output = F.scaled_dot_product_attention(
            grouped, key_BGTH, value_BGTH, attn_mask=attention_mask, scale=scaling
        )
    return output.reshape(rows, 1, heads, size), None


def _attend_to_sinks(
    query_BAQH: torch.Tensor,
    key_BGTH: torch.Tensor,
    value_BGTH: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """[B, Q, A, H]; `sinks` [A], or [A, Q] where queries are heads. Without a mask, each query sees what is before it."""
    if mask is None:
        mask = query_BAQH.new_ones(query_BAQH.shape[2], key_BGTH.shape[2], dtype=torch.bool).tril()
    sinks = sinks[..., None] if sinks.dim() > 1 else sinks[:, None, None]
    scale = query_BAQH.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_with_sinks(query_BAQH, key_BGTH, value_BGTH, sinks, mask=mask, scale=scale).transpose(1, 2)


@torch.no_grad()
def use_torch_norms(model: torch.nn.Module) -> None:
    """Let modules that compute what torch's RMSNorm does in seven steps call that instead; others keep their forward.

    Which do is found out by trying, for which their weights, arbitrary so far, are set.
    """
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        takes = list(inspect.signature(module.forward).parameters)
        if eps is None or len(takes) != 1 or [name for name, _ in module.named_parameters()] != ["weight"]:
            continue
        weight: Any = module.weight
        weight.copy_(torch.linspace(0.5, 1.5, weight.numel()).view_as(weight))
        sample = torch.linspace(-2, 3, 2 * weight.numel()).view(2, *weight.shape).to(weight)
        for centre in (0, 1):
            norm = partial(_norm, weight, eps, centre)
            if torch.allclose(
                norm(sample), module(sample), rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-6
            ):
                module.forward = norm
                break


def _norm(weight: torch.Tensor, eps: float, centre: int, hidden_states: torch.Tensor) -> torch.Tensor:
    """`centre` is added to the weight."""
    return F.rms_norm(hidden_states, weight.shape, weight + centre if centre else weight, eps)
