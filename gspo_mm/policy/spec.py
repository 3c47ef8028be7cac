"""Which modules a decoder layer is made of: Transformer Engine's with CUDA, plain torch ones without.

Same model and parallel code for both. The local modules are here because megatron-core's own refuse what we need:
its torch norm refuses sequence parallelism, its experts' last product a bias. Attention is in attention.py.

Dims: N packed tokens of this context-parallel rank, D hidden.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from gspo_mm.policy.attention import LocalAttention, PackedSequences, fused_attention
from gspo_mm.policy.delta import delta_layer

FUSED: bool | None = None  # whether Transformer Engine's layers are used; None: where CUDA and it are there


def has_fused_modules() -> bool:
    """Whether Transformer Engine's layers are used. All that depends on it asks here."""
    if FUSED is not None:
        return FUSED
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


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
            attention.core_attention = fused_attention()
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
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
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
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


def _with_bias(linear: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Build `linear` with a bias; megatron's configuration has one switch for this layer and the MLP's."""
    return linear(*args, **{**kwargs, "bias": True})
