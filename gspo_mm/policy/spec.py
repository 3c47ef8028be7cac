"""Which modules a decoder layer is made of: Transformer Engine's with CUDA, plain torch ones without.

Same model and parallel code for both. The local modules are here because megatron-core's own refuse what we need:
its torch norm refuses sequence parallelism, its unfused attention refuses packed sequences. Rotary embedding is in
the attention slot too: angles are worked out once per micro-batch from the family's multi-axis positions, where
megatron's packed path reads sequence lengths back from the device at every layer.

Dims: N packed tokens of this context-parallel rank, S sequences, L longest of them, A heads, H head size, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.util import find_spec
from itertools import groupby
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)

from gspo_mm.families.sinks import attend_with_sinks
from gspo_mm.policy.collectives import GatherTokens
from gspo_mm.policy.delta import delta_layer
from gspo_mm.policy.layout import zigzag

FUSED: bool | None = None  # whether Transformer Engine's layers are used; None: where CUDA and it are there


def has_fused_modules() -> bool:
    """Whether Transformer Engine's layers are used. All that depends on it asks here."""
    if FUSED is not None:
        return FUSED
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, and what our layers need on top; made once per micro-batch.

    `cu_seqlens_*` count the tokens of all context-parallel ranks, as Transformer Engine wants them.
    """

    angles: torch.Tensor | None = (
        None  # [N, H] float32, rotary angles; of fewer dims where the rest is not turned
    )
    lengths: tuple[int, ...] = ()  # [S] of the sequences in `cu_seqlens_*`, on the host
    visual_index: torch.Tensor | None = None  # [image tokens] int64: their rows in this rank's hidden states
    deepstack: list[torch.Tensor] = field(default_factory=list)  # per level [image tokens, D]
    padding: torch.Tensor | None = None  # [1, N/tp] bool: this rank's hidden states that stand for nothing

    @cached_property
    def turns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the angles, [N, 1, F] float32; the same for all layers."""
        assert self.angles is not None
        return self.angles.cos().unsqueeze(1), self.angles.sin().unsqueeze(1)


def pack_params(cu_seqlens: torch.Tensor, angles_NH: torch.Tensor) -> PackedSequences:
    """From offsets [S+1] int32 (on the host) of the sequences over all context-parallel ranks.

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
        lengths=tuple(lengths),
    )


def block_spec(
    config: TransformerConfig, *, attention_bias: bool, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The decoder's layers on this stage. `attention_bias`: the attention's output projection has a bias too."""
    fused = has_fused_modules()
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=fused, normalization=config.normalization, vp_stage=vp_stage
    )
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    if not fused:
        block.layer_norm = norm
    layers: list[Any] = block.layer_specs or []
    for layer in layers:
        layer.module = DeepStackLayer
        attention = layer.submodules.self_attention.submodules
        if fused:
            attention.core_attention = _fused_attention()
        else:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
            if config.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = norm
            attention.core_attention = LocalAttention
        if getattr(layer.submodules.mlp, "func", None) is MoELayer:
            mixture = layer.submodules.mlp.keywords["submodules"]
            mixture.router = Router
            if not fused:
                mixture.experts.keywords["submodules"].linear_fc2 = ExpertOutput
            # names of checkpoints: the local spec renames this norm as if the MLP's first layer held it, which in a mixture
            # neither it nor Transformer Engine's spec does (gpt_layer_specs.py of megatron-core 0.19)
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        if attention_bias and not isinstance(attention.linear_proj, partial):
            attention.linear_proj = partial(_with_bias, attention.linear_proj)
    if isinstance(config.linear_attention_freq, list):
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        is_linear = config.linear_attention_freq[first : first + len(layers)]
        norm = block.layer_norm
        block.layer_specs = [
            delta_layer(layer, norm=norm) if linear else layer
            for layer, linear in zip(layers, is_linear, strict=True)
        ]
    return block


class DeepStackLayer(TransformerLayer):
    """A decoder layer after which image tokens receive the features of its DeepStack level, if it has one."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        packed = kwargs["packed_seq_params"]
        assert isinstance(packed, PackedSequences)
        kwargs["padding_mask"] = packed.padding  # read by the router's balancing loss alone
        hidden_N1D, context = cast(tuple[torch.Tensor, torch.Tensor | None], super().forward(*args, **kwargs))
        level = self.layer_number - 1  # counts from 1 over the whole model
        if level < len(packed.deepstack):
            assert packed.visual_index is not None
            features_1D = packed.deepstack[level].to(hidden_N1D.dtype).unsqueeze(1)
            hidden_N1D = hidden_N1D.index_add(0, packed.visual_index, features_1D)
        return hidden_N1D, context


class Router(TopKRouter):
    """megatron's router, whose balancing loss is here weighed by the real tokens of a micro-batch, and whose bias stays as it is.

    megatron-core 0.19 multiplies it by the ranks of the group times a rank's own count of tokens, and counts that after
    the sum over the group has replaced it: too much by the number of ranks. Padding on one rank only would be wrong too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen_expert_bias = True  # read where megatron finishes gradients

    def _apply_expert_bias(self, *args: Any, **kwargs: Any) -> None:
        """Count no tokens for an update of the bias: it is a value of the checkpoint."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._padding = padding_mask
        return super().routing(logits, padding_mask)

    def attach_and_log_load_balancing_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self._padding is not None
        tokens = (~self._padding).sum().float()
        dist.all_reduce(tokens, group=self.tp_cp_group)
        kwargs["valid_token_count"] = tokens / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(*args, **kwargs)


class ExpertOutput(RowParallelLinear):
    """The last product of one expert, with what megatron-core 0.19 lacks for a bias.

    On a single rank its product gives a view, which its MLP then cannot add a bias to. And it has tensor-parallel ranks sum the
    bias's gradient once more, though each holds whole experts, whose gradients their own data-parallel group has summed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = (
            True  # what ranks have is summed by the dispatcher, as for experts of several ranks
        )
        if self.bias is not None:
            self.bias.sequence_parallel = False  # pyright: ignore[reportAttributeAccessIssue]


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, tagged so that megatron sums its gradient over ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self.centre = float(config.layernorm_zero_centered_gamma)  # what is added to the weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.float() + self.centre if self.centre else self.weight
        if x.is_cuda:
            return F.rms_norm(x.to(weight.dtype), self.normalized_shape, weight, self.eps).to(x.dtype)
        return Normalized.apply(x, weight, self.eps)  # pyright: ignore[reportReturnType]


class Normalized(torch.autograd.Function):
    """x / rms(x) * weight over the last dim, in float32 at least; half the passes over memory of what torch does on a CPU.

    With n = x / rms(x) and p = g * n for a gradient g of [..., D]:

        d weight = Σ p        d x = (g * weight − n * (p · weight) / D) / rms(x)
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        normal = wide * scale
        ctx.save_for_backward(normal, scale, weight)
        return (normal * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normal, scale, weight = ctx.saved_tensors
        product, wide = gradient * normal, weight.to(normal.dtype)
        along = (product @ wide).div_(len(weight)).unsqueeze(-1)
        of_x = (gradient * wide).addcmul_(normal, along, value=-1).mul_(scale)
        return of_x.to(gradient.dtype), product.flatten(0, -2).sum(0).to(weight.dtype), None


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm, tagged as `RMSNorm` is."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel


class LocalAttention(MegatronModule):
    """Causal attention over packed sequences by torch's scaled_dot_product_attention, with sinks and windows where `config` has
    them, under megatron's names.

    Neighbours of equal length go together, others one by one: on a CPU a call costs less than padding them would. Under
    context parallelism every rank gathers all keys and values and answers its own queries: simple, and only meant for
    machines without CUDA.
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
        lengths, size = packed_seq_params.lengths, self._cp.size()
        query, key = (Rotate.apply(t, *packed_seq_params.turns) for t in (query_NAH, key_NGH))
        value = value_NGH
        if size > 1:
            key, value = (GatherTokens.apply(t, lengths, self._cp) for t in (key, value))
        runs = [(length, len(list(equal))) for length, equal in groupby(lengths) if length]
        if len(runs) == 1:
            return self._attend(query, key, value, *runs[0])
        own, whole = ([length * count // by for length, count in runs] for by in (size, 1))
        parts = zip(query.split(own), key.split(whole), value.split(whole), runs, strict=True)
        return torch.cat([self._attend(q, k, v, *run) for q, k, v, run in parts])

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, count: int
    ) -> torch.Tensor:
        """[own tokens, A*H] of `count` sequences of `length` tokens from their queries, keys and values."""
        query, key, value = (t.view(count, -1, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
        size = self._cp.size()
        dropout = self._dropout if self.training else 0.0
        mask = None
        if size > 1 or self.softmax_offset is not None or (self._window or length) < length:
            ahead = zigzag([length], size, self._cp.rank())[:, None] - torch.arange(length)
            mask = (ahead >= 0) & (ahead < (self._window or length))
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


@cache
def _fused_attention() -> type:
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


def _with_bias(linear: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Build `linear` with a bias; megatron's configuration has one switch for this layer and the MLP's."""
    return linear(*args, **{**kwargs, "bias": True})
