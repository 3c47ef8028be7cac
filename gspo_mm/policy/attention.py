"""Attention over packed sequences, behind rotary embedding: Transformer Engine's with CUDA, torch's without.

Rotary embedding is in the attention slot: angles are worked out once per micro-batch from the family's multi-axis positions,
where megatron's packed path reads sequence lengths back from the device at every layer. The local kind is here because
megatron-core's unfused attention refuses packed sequences.

Dims: N packed tokens of this context-parallel rank, S sequences, L longest of them, A heads, H head size, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import groupby
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)

from gspo_mm.families.sinks import attend_with_sinks
from gspo_mm.policy.collectives import GatherTokens
from gspo_mm.policy.layout import zigzag


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, and what our layers need on top; made once per micro-batch.

    `cu_seqlens_*` count the tokens of all context-parallel ranks, as Transformer Engine wants them.
    """

    angles: torch.Tensor | None = (
        None  # [N, H] float32, rotary angles; of fewer dims where the rest is not turned
    )
    # [T] of the trees in `cu_seqlens_*`, on the host: see MicroBatch. The last may be padding
    trees: tuple[tuple[int, ...], ...] = ()
    visual_index: torch.Tensor | None = None  # [image tokens] int64: their rows in this rank's hidden states
    deepstack: list[torch.Tensor] = field(default_factory=list)  # per level [image tokens, D]
    padding: torch.Tensor | None = None  # [1, N/tp] bool: this rank's hidden states that stand for nothing

    @cached_property
    def turns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the angles, [N, 1, F] float32; the same for all layers."""
        assert self.angles is not None
        return self.angles.cos().unsqueeze(1), self.angles.sin().unsqueeze(1)


def pack_params(
    cu_seqlens: torch.Tensor, angles_NH: torch.Tensor, trees: tuple[tuple[int, ...], ...] = ()
) -> PackedSequences:
    """From offsets [T+1] int32 (on the host) of the sequences over all context-parallel ranks, or of `trees`.

    Padding counts as tokens, behind the real ones, which never attend to it. Offsets of the real tokens beside those
    (`cu_seqlens_*_padded`) would save Transformer Engine a few rows, at the price of FlashAttention 2; without them it takes
    the one kind for both (dot_product_attention/backends.py of version 2.20).
    """
    lengths = cu_seqlens.diff().tolist()
    offsets = cu_seqlens.to(angles_NH.device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        angles=angles_NH,
        # behind them only padding may be
        trees=(*trees, *((length,) for length in lengths[len(trees) :])),
    )


class LocalAttention(MegatronModule):
    """Causal attention over packed sequences by torch's scaled_dot_product_attention, with sinks and windows where `config` has
    them, under megatron's names.

    Neighbours of equal length go together, others one by one: on a CPU a call costs less than padding them would. A tree of
    answers to one prompt is one square with a mask. Under context parallelism every rank gathers all keys and values and
    answers its own queries: simple, and only meant for machines without CUDA.
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
        self._cp: dist.ProcessGroup = pg_collection.cp
        self._tp: dist.ProcessGroup = pg_collection.tp
        is_windowed = is_layer_window_attention(
            config.window_size, cast(Any, config.window_attn_skip_freq), layer_number
        )
        # tokens that a query sees, its own among them
        self._window = config.window_size[0] + 1 if is_windowed and config.window_size else None
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // self._tp.size()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            _note_parts(self)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._tp,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )

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
        trees, size = packed_seq_params.trees, self._cp.size()
        query, key = (Rotate.apply(t, *packed_seq_params.turns) for t in (query_NAH, key_NGH))
        value = value_NGH
        if size > 1:
            lengths = tuple(map(sum, trees))
            key, value = (GatherTokens.apply(t, lengths, self._cp) for t in (key, value))
        runs = [(tree, len(list(equal))) for tree, equal in groupby(trees) if sum(tree)]
        if len(runs) == 1:
            return self._attend(query, key, value, *runs[0])
        own, whole = ([sum(tree) * count // by for tree, count in runs] for by in (size, 1))
        parts = zip(query.split(own), key.split(whole), value.split(whole), runs, strict=True)
        return torch.cat([self._attend(q, k, v, *run) for q, k, v, run in parts])

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tree: tuple[int, ...], count: int
    ) -> torch.Tensor:
        """[own tokens, A*H] of `count` trees like `tree` from their queries, keys and values."""
        query, key, value = (t.view(count, -1, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
        size, length = self._cp.size(), sum(tree)
        dropout = self._dropout if self.training else 0.0
        mask = None
        has_mask = len(tree) > 1 or self.softmax_offset is not None or (self._window or length) < length
        if has_mask or size > 1:
            mask = seen(tree, self._window)[zigzag([length], size, self._cp.rank())]
        if self.softmax_offset is not None:
            assert mask is not None
            scale = self._scale or query.shape[-1] ** -0.5
            sinks = self.softmax_offset[:, None, None]
            output_SAQH = attend_with_sinks(query, key, value, sinks, mask=mask, scale=scale, dropout=dropout)
        else:
            output_SAQH = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self._scale,
                dropout_p=dropout,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return output_SAQH.transpose(1, 2).flatten(2).flatten(0, 1)


@lru_cache(maxsize=256)  # the same for all layers
def seen(tree: tuple[int, ...], window: int | None) -> torch.Tensor:
    """[L, L] bool: which tokens (columns) of a tree each of them (rows) sees; see MicroBatch.

    Branches see what they share and themselves; `window` tokens of that at most, the token itself among them.
    """
    shared, *branches = tree
    place = torch.cat([torch.arange(shared), *(shared + torch.arange(length) for length in branches)])
    branch = torch.arange(len(tree)).repeat_interleave(torch.tensor(tree))  # 0: shared
    ahead = place[:, None] - place
    return (ahead >= 0) & (ahead < (window or sum(tree))) & ((branch[:, None] == branch) | (branch == 0))


@cache
def fused_attention() -> type:
    """Transformer Engine's attention behind rotary embedding; made on first use, since its import needs CUDA."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, fused_apply_rotary_pos_emb

    class FusedAttention(TEDotProductAttention):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _note_parts(self)

        def forward(
            self, query: Any, key: Any, value: Any, *args: Any, packed_seq_params: Any, **kwargs: Any
        ) -> Any:
            angles = packed_seq_params.angles[:, None, None]
            # Transformer Engine's kernel for packed sequences restarts positions; the plain one takes our angles
            query, key = (fused_apply_rotary_pos_emb(t.unsqueeze(1), angles).squeeze(1) for t in (query, key))
            return super().forward(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)

    return FusedAttention


def _note_parts(attention: Any) -> None:
    """Sinks, where there are some, are parts of heads' on each tensor-parallel rank: so they count in the gradient's norm.

    And in the format of all weights, which Transformer Engine leaves out: the distributed optimizer saves but one per buffer.
    """
    if isinstance(attention.softmax_offset, torch.nn.Parameter):
        attention.softmax_offset.data = attention.softmax_offset.data.to(attention.config.params_dtype)
        set_tensor_model_parallel_attributes(attention.softmax_offset, is_parallel=True, dim=0, stride=1)


class Rotate(torch.autograd.Function):
    """Rotary embedding of states [N, A, H]: every pair (h, h + F/2) turned by its angle, of the first F dims that have one.

    Cosine and sine are [N, 1, F]. Backward turns the gradient by the negative angle, and keeps no state for it.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, -sin), None, None


def _turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    (num, half), rest = (cos.shape[-1], cos.shape[-1] // 2), states[..., cos.shape[-1] :]
    turned = states[..., :num] * cos
    turned[..., :half].addcmul_(states[..., half:num], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
