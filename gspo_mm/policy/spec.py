"""Which modules a decoder layer is made of: Transformer Engine's with CUDA, plain torch ones without.

Same model and parallel code for both. The local modules are here because megatron-core's own refuse what we need:
its torch norm refuses sequence parallelism, its unfused attention refuses packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

# dims: N packed tokens, S sequences, L longest sequence, A heads, H head size, D hidden


def has_fused_modules() -> bool:
    """Whether Transformer Engine's layers are used."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, and what our layers need on top; made once per micro-batch."""

    padded_index: torch.Tensor | None = (
        None  # [N] int64: place of each token in [S*L]; None: no padding needed
    )
    visual_index: torch.Tensor | None = None  # [image tokens] int64: their places in N
    deepstack: list[torch.Tensor] = field(default_factory=list)  # per level [image tokens, D]


def pack_params(cu_seqlens: torch.Tensor) -> PackedSequences:
    """From offsets [S+1] int32 of the sequences in N."""
    lengths = cu_seqlens.diff().long()
    longest = int(lengths.max())
    index = None
    if int(lengths.min()) != longest:
        shift = torch.arange(len(lengths), device=lengths.device) * longest - cu_seqlens[:-1]
        index = torch.arange(int(cu_seqlens[-1]), device=lengths.device) + shift.repeat_interleave(lengths)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        padded_index=index,
    )


def block_spec(config: TransformerConfig, *, attention_bias: bool) -> TransformerBlockSubmodules:
    """The decoder's layers. `attention_bias`: the attention's output projection has a bias too."""
    fused = has_fused_modules()
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=fused, normalization=config.normalization
    )
    if not fused:
        block.layer_norm = RMSNorm
    layers: list[Any] = block.layer_specs or []
    for layer in layers:
        layer.module = DeepStackLayer
        attention = layer.submodules.self_attention.submodules
        if not fused:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
            attention.q_layernorm = attention.k_layernorm = RMSNorm
            attention.core_attention = LocalAttention
        if attention_bias and not isinstance(attention.linear_proj, partial):
            attention.linear_proj = partial(_with_bias, attention.linear_proj)
    return block


class DeepStackLayer(TransformerLayer):
    """A decoder layer after which image tokens receive the features of its DeepStack level, if it has one."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_N1D, context = cast(tuple[torch.Tensor, torch.Tensor | None], super().forward(*args, **kwargs))
        packed = kwargs.get("packed_seq_params")
        level = self.layer_number - 1  # counts from 1 over the whole model
        if isinstance(packed, PackedSequences) and level < len(packed.deepstack):
            assert packed.visual_index is not None
            features_1D = packed.deepstack[level].to(hidden_N1D.dtype).unsqueeze(1)
            hidden_N1D = hidden_N1D.index_add(0, packed.visual_index, features_1D)
        return hidden_N1D, context


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, tagged so that megatron sums its gradient over ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class LocalAttention(MegatronModule):
    """Causal attention over packed sequences by torch's scaled_dot_product_attention.

    Sequences are moved to a right-padded [S, L] and back, so that the cost is S*L^2, not N^2. Padding keys stand
    after every real query, so the causal mask is the only one needed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self._scale = softmax_scale
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query_NAH: torch.Tensor,
        key_NGH: torch.Tensor,
        value_NGH: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        assert packed_seq_params is not None
        assert attention_mask is None
        assert attention_bias is None
        query, key, value = (_pad(t, packed_seq_params) for t in (query_NAH, key_NGH, value_NGH))
        output_SALH = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self._scale,
            dropout_p=self._dropout if self.training else 0.0,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return _unpad(output_SALH, packed_seq_params)


def _pad(packed_NAH: torch.Tensor, params: PackedSequences) -> torch.Tensor:
    num_sequences, longest = len(params.cu_seqlens_q) - 1, params.max_seqlen_q
    if params.padded_index is not None:
        zeros = packed_NAH.new_zeros(num_sequences * longest, *packed_NAH.shape[1:])
        packed_NAH = zeros.index_copy(0, params.padded_index, packed_NAH)
    return packed_NAH.view(num_sequences, longest, *packed_NAH.shape[1:]).transpose(1, 2)


def _unpad(padded_SALH: torch.Tensor, params: PackedSequences) -> torch.Tensor:
    rows = padded_SALH.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows if params.padded_index is None else rows.index_select(0, params.padded_index)


def _with_bias(linear: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Build `linear` with a bias; megatron's configuration has one switch for this layer and the MLP's."""
    return linear(*args, **{**kwargs, "bias": True})
