"""Products, norms, rotary embedding, packing and the optimizer's kernels of Transformer Engine, by torch in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import transformer_engine_torch as tex  # pyright: ignore[reportMissingImports]
from megatron.core import parallel_state

from tests.te.stand_in.names import DType
from tests.te.stand_in.quantizing import TORCH, quantize


def generic_gemm(
    a: Any,
    transa: bool,
    b: Any,
    transb: bool,
    out: torch.Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: torch.Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    size: int,
    accumulate: bool,
    split: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, torch.Tensor | None, None, None]:
    """pytorch/csrc/extensions/gemm.cpp: gemm. Of `grad` with a bias, the bias's gradient is returned beside the product."""
    assert comm_overlap is None
    assert not gelu
    product = alpha * _product(a, transa, b, transb)
    bias_grad = None
    if bias is not None and grad:
        rows = _plain(b)
        bias_grad = rows.reshape(-1, rows.shape[-1]).float().sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if out is None:
        product = product.to(a.dtype if out_dtype is None else TORCH[DType(int(out_dtype))])
        return quantize(product, quantizer), bias_grad, None, None
    product = product.view(out.shape)
    out.copy_(out.float() + product if accumulate else product)
    return out, bias_grad, None, None


def te_general_grouped_gemm(
    a: Sequence[Any],
    transa: bool,
    b: Sequence[Any],
    transb: bool,
    d: Sequence[torch.Tensor],
    d_type: Any,
    splits: Sequence[int],
    bias: list[torch.Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu: Any,
    grad: bool,
    workspace: Any,
    size: int,
    accumulate: bool,
    split: bool,
    sm_count: int,
) -> list[torch.Tensor]:
    """The same for each expert; one without tokens gives zeros."""
    outs = list(d[0].split(list(splits))) if single_output else d
    for number, (left, right, out) in enumerate(zip(a, b, outs, strict=True)):
        if not out.numel():
            continue
        is_empty = 0 in (*right.size(), *left.size())
        product = torch.zeros(out.shape) if is_empty else _product(left, transa, right, transb)
        if bias and bias[number].numel() and grad:
            bias[number].copy_(_plain(right).float().sum(0))
        elif bias and bias[number].numel():
            product = product + bias[number].float()
        out.copy_(out.float() + product if accumulate else product)
    return bias


def rmsnorm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    zero_centred: bool,
) -> tuple[Any, None, torch.Tensor]:
    """(y, mean: none, 1 / root of the mean square) of common/normalization/rmsnorm."""
    scale = torch.rsqrt(x.float().pow(2).mean(-1) + eps).view(-1)
    y = (x.float() * scale.view(*x.shape[:-1], 1) * _gamma(weight, zero_centred)).to(TORCH[DType(int(dtype))])
    if quantizer is not None:
        return quantize(y, quantizer, out), None, scale
    return (y if out is None else out.copy_(y)), None, scale


def rmsnorm_bwd(
    gradient: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    margin: int,
    zero_centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    each, values, upper = scale.view(*x.shape[:-1], 1), x.float(), gradient.float().view(x.shape)
    of_weight = (upper * values * each).reshape(-1, x.shape[-1]).sum(0)
    upper = upper * _gamma(weight, zero_centred)
    of_x = each * (upper - values * each * each * (upper * values).mean(-1, keepdim=True))
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


def fused_rope_forward(
    states: torch.Tensor,
    angles: torch.Tensor,
    start: Any,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Any,
    *cp: int,
) -> torch.Tensor:
    assert start is None
    assert not interleaved
    assert layout == tex.NVTE_QKV_Format.NVTE_SBHD
    assert angles.shape[0] >= states.shape[0]
    assert angles.dtype == torch.float32
    return _turned(states, angles, 1.0)


def fused_rope_backward(gradient: torch.Tensor, angles: torch.Tensor, *_: Any) -> torch.Tensor:
    return _turned(gradient, angles, -1.0)


def convert_thd_to_bshd(
    packed: torch.Tensor, cu_seqlens: torch.Tensor, batch: int, longest: int
) -> torch.Tensor:
    out = packed.new_zeros(batch, longest, *packed.shape[1:])
    for row, (start, end) in enumerate(_spans(cu_seqlens)):
        out[row, : end - start] = packed[start:end]
    return out


def convert_bshd_to_thd(padded: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    out = padded.new_zeros(tokens, *padded.shape[2:])
    for row, (start, end) in enumerate(_spans(cu_seqlens)):
        out[start:end] = padded[row, : end - start]
    return out


def get_fused_attn_backend(*_: Any) -> tuple[Any, str]:
    """None, so that Transformer Engine computes attention by torch, except where it cannot: see attention.py."""
    if parallel_state.get_context_parallel_world_size() > 1:
        return tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""
    return tex.NVTE_Fused_Attn_Backend.NVTE_No_Backend, "no GPU"


def multi_tensor_adam(
    chunk: int,
    noop: Any,
    lists: Sequence[Sequence[torch.Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: bool,
    decay: float,
) -> None:
    """common/multi_tensor/adam.cu; `mode` 1 decays weights apart from the gradient. A fifth list is float32 weights."""
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, m, v, *main in zip(*lists, strict=True):
        weight, slope = (main[0] if main else parameter).float(), gradient.float()
        slope = slope if mode else slope + decay * weight
        m.copy_(m.float() * beta1 + (1 - beta1) * slope)
        v.copy_(v.float() * beta2 + (1 - beta2) * slope * slope)
        update = (m.float() / first) / ((v.float() / second).sqrt() + eps)
        weight = weight - lr * (update + decay * weight if mode else update)
        for target in (parameter, *main):
            target.copy_(weight)


def multi_tensor_l2norm(
    chunk: int, noop: Any, lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else torch.empty(0)


def multi_tensor_scale(chunk: int, noop: Any, lists: Sequence[Sequence[torch.Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * float(scale))


def multi_tensor_scale_tensor(
    chunk: int, noop: Any, lists: Sequence[Sequence[torch.Tensor]], scale: torch.Tensor
) -> None:
    multi_tensor_scale(chunk, noop, lists, float(scale))


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _plain(tensor: Any) -> torch.Tensor:
    return tensor if _is_plain(tensor) else tensor.dequantize(dtype=torch.float32)


def _product(a: Any, transa: bool, b: Any, transb: bool) -> torch.Tensor:
    """op(b) @ op(a) in rows: the kernels count in columns.

    In FP8 cuBLAS wants the sides that lie together in memory, which are those that it sums over, in multiples of 16
    (common/gemm/cublaslt_gemm.cu: CanonicalizeGemmInput).
    """
    for one, side in ((a, -1 if transa else 0), (b, 0 if transb else -1)):
        length = math.prod(one.size()[:-1]) if side == 0 else one.size()[-1]
        assert _is_plain(one) or length % 16 == 0, f"{tuple(one.size())}: Caller must pad."
    left, right = _plain(a).float(), _plain(b).float()
    left = left.reshape(-1, left.shape[-1])
    right = right.reshape(-1, right.shape[-1]) if right.dim() > 2 and transb else right
    return (right.t() if transb else right) @ (left.t() if transa else left)


def _gamma(weight: torch.Tensor, zero_centred: bool) -> torch.Tensor:
    return weight.float() + 1 if zero_centred else weight.float()


def _turned(states: torch.Tensor, angles: torch.Tensor, sign: float) -> torch.Tensor:
    angles = angles[: states.shape[0]].float()
    turning, rest = states.float().split([angles.shape[-1], states.shape[-1] - angles.shape[-1]], -1)
    first, second = turning.chunk(2, -1)
    turned = turning * angles.cos() + torch.cat([-second, first], -1) * angles.sin() * sign
    return torch.cat([turned, rest], -1).to(states.dtype)


def _spans(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    offsets = cu_seqlens.tolist()
    return list(pairwise(offsets))
