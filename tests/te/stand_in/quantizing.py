"""FP8 as Transformer Engine's kernels make it, by torch's casts: scales, whole tensors, blocks, parts of weights.

Sources in transformer_engine/common: recipe/recipe_common.cuh (scales), transpose/quantize_transpose_*_blockwise.cu
(blocks), recipe/fp8_block_scaling.cu and recipe/current_scaling.cu (parts that ranks of a distributed optimizer hold).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor  # pyright: ignore[reportMissingImports]
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (  # pyright: ignore[reportMissingImports]
    Float8BlockwiseQTensorStorage,
)
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage  # pyright: ignore[reportMissingImports]

from tests.te.stand_in.names import DType

TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}
_BLOCKS = "Float8BlockQuantizer"


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop_flag: Any = None) -> Any:
    """A tensor in the quantizer's format, rows and, where they are wanted, columns; into `output` if there is one."""
    if quantizer is None:
        return tensor
    values = tensor.detach().contiguous()
    kind = type(quantizer).__name__
    if kind == _BLOCKS:
        parts = _in_blocks(values, quantizer)
    elif kind == "Float8CurrentScalingQuantizer":
        parts = _whole(values, quantizer, _current_scale(values, quantizer))
    elif kind == "Float8Quantizer":  # megatron casts its parts of a weight by the scale of the whole
        compute_amax(values, quantizer.amax)
        parts = _whole(values, quantizer, quantizer.scale.reshape(1))
    else:
        raise NotImplementedError(f"quantizer {kind} is not emulated")
    if output is None:
        return _made(quantizer, values.shape, tensor.dtype, parts)
    for name, value in parts.items():
        old = getattr(output, name)
        if old is not None and value is not None and old.shape == value.shape:
            old.copy_(value)
        else:
            setattr(output, name, value)
    if hasattr(output, "_transpose_invalid"):
        output._transpose_invalid = output._transpose is None
    return output


def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    """What a weight that is held in FP8 begins as."""
    q, shape = quantizer, tuple(shape)

    def bytes_of(size: Sequence[int], wanted: bool) -> torch.Tensor | None:
        return torch.zeros(tuple(size), dtype=torch.uint8) if wanted else None

    if type(q).__name__ == _BLOCKS:
        parts = {
            "_rowwise_data": bytes_of(shape, q.rowwise_usage),
            "_rowwise_scale_inv": torch.ones(q.get_scale_shape(shape, False)) if q.rowwise_usage else None,
            "_columnwise_data": bytes_of(q.get_columnwise_shape(shape), q.columnwise_usage),
            "_columnwise_scale_inv": torch.ones(q.get_scale_shape(shape, True))
            if q.columnwise_usage
            else None,
        }
    else:
        parts = {
            "_data": bytes_of(shape, q.rowwise_usage),
            "_transpose": bytes_of((shape[-1], *shape[:-1]), q.columnwise_usage),
            "_scale_inv": torch.ones(1),
        }
    return _made(q, shape, dtype, parts)


def dequantize(tensor: Any, dtype: int) -> torch.Tensor:
    return tensor.dequantize(dtype=TORCH[DType(dtype)])


def bgrad_quantize(tensor: torch.Tensor, quantizer: Any) -> list[Any]:
    """The gradient of a bias, and the quantized gradient that it is the sum of."""
    return [tensor.sum(0), quantize(tensor, quantizer)]


def split_quantize(
    tensor: torch.Tensor,
    splits: Sequence[int],
    quantizers: Sequence[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    """Rows of each expert by a quantizer of its own."""
    return [quantize(part, q) for part, q in zip(tensor.split(list(splits)), quantizers, strict=True)]


def multi_tensor_quantize(tensors: Sequence[torch.Tensor], quantizers: Sequence[Any]) -> list[Any]:
    return [quantize(tensor, q) for tensor, q in zip(tensors, quantizers, strict=True)]


def fp8_transpose(data: torch.Tensor, dtype: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
    transposed = data.movedim(-1, 0).contiguous()
    return transposed if out is None else out.copy_(transposed)


def compute_amax(tensor: torch.Tensor, amax: torch.Tensor) -> None:
    if tensor.numel() and amax.numel():
        amax.copy_(tensor.detach().float().abs().amax().reshape(amax.shape))


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, noop: Any, lists: Sequence[Sequence[torch.Tensor]], max_fp8: float, pow2: bool, eps: float
) -> None:
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_scale_of(amax, max_fp8, eps, pow2))
        inverse.copy_(1.0 / scale)


def fp8_block_scaling_compute_partial_amax(
    part: torch.Tensor, amax: torch.Tensor, rows: int, columns: int, start: int, block: int
) -> None:
    """Largest elements of a weight's blocks, as far as this rank's part of the flat weight reaches."""
    whole = _placed(part, rows, columns, start).abs()
    padded = functional.pad(whole, (0, -columns % block, 0, -rows % block))
    blocks = padded.view(len(padded) // block, block, -1, block).amax((1, 3))
    amax[:, : blocks.shape[1]].copy_(blocks)


def fp8_block_scaling_partial_cast(
    part: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    rows: int,
    columns: int,
    start: int,
    block: int,
    dtype: Any,
) -> None:
    each = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns]
    whole = _to_fp8(_placed(part, rows, columns, start), each, dtype)
    out.copy_(whole.view(-1)[start : start + part.numel()])


def _scale_of(amax: torch.Tensor, max_fp8: float, eps: float, pow2: bool) -> torch.Tensor:
    """recipe_common.cuh: compute_scale_from_amax."""
    amax = amax.float().clamp(min=eps)
    scale = max_fp8 / amax
    scale = torch.where((amax == 0) | torch.isinf(amax), torch.ones_like(scale), scale)
    scale = torch.where(torch.isinf(scale), torch.finfo(torch.float32).max, scale)
    return torch.exp2(torch.floor(torch.log2(scale))) if pow2 else scale


def _largest(dtype: Any) -> float:
    return torch.finfo(TORCH[DType(int(dtype))]).max


def _to_fp8(values: torch.Tensor, scale: torch.Tensor, dtype: Any) -> torch.Tensor:
    limit = _largest(dtype)
    return (values.float() * scale).clamp(-limit, limit).to(TORCH[DType(int(dtype))]).view(torch.uint8)


def _current_scale(values: torch.Tensor, q: Any) -> torch.Tensor:
    """By the largest element that it has now."""
    amax = values.float().abs().amax() if values.numel() else torch.zeros(())
    if q.with_amax_reduction:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=q.amax_reduction_group)
    return _scale_of(amax, _largest(q.dtype), q.amax_epsilon, q.force_pow_2_scales).reshape(1)


def _whole(values: torch.Tensor, q: Any, scale: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """One scale for all of it."""
    data = _to_fp8(values, scale, q.dtype)
    return {
        "_data": data if q.rowwise_usage else None,
        "_transpose": data.movedim(-1, 0).contiguous() if q.columnwise_usage else None,
        "_scale_inv": 1.0 / scale,
    }


def _in_blocks(values: torch.Tensor, q: Any) -> dict[str, torch.Tensor | None]:
    flat = values.view(-1, values.shape[-1])
    parts: dict[str, torch.Tensor | None] = dict.fromkeys(
        ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv")
    )
    if q.rowwise_usage:
        data, parts["_rowwise_scale_inv"] = _blocks(flat, q)
        parts["_rowwise_data"] = data.view(values.shape)
    if q.columnwise_usage:
        data, parts["_columnwise_scale_inv"] = _blocks(flat.t().contiguous(), q)
        parts["_columnwise_data"] = data.view(values.shape[-1], *values.shape[:-1])
    return parts


def _blocks(values: torch.Tensor, q: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and inverse scales: of squares (weights), or of pieces of rows, whose scales are kept [pieces, rows]."""
    size, is_square = q.block_len, q.block_scaling_dim == 2
    rows, columns = values.shape
    height = size if is_square else 1
    padded = functional.pad(values.float(), (0, -columns % size, 0, -rows % size if is_square else 0))
    tiles = padded.view(len(padded) // height, height, padded.shape[1] // size, size)
    scale = _scale_of(tiles.abs().amax((1, 3)), _largest(q.dtype), q.amax_epsilon, q.force_pow_2_scales)
    data = _to_fp8(tiles, scale[:, None, :, None], q.dtype).view(padded.shape)[:rows, :columns].contiguous()
    inverse = 1.0 / scale if is_square else (1.0 / scale).t().contiguous()
    return data, functional.pad(inverse, (0, -inverse.shape[1] % 4))


def _placed(part: torch.Tensor, rows: int, columns: int, start: int) -> torch.Tensor:
    whole = torch.zeros(rows * columns)
    whole[start : start + part.numel()] = part.float().reshape(-1)
    return whole.view(rows, columns)


def _made(q: Any, shape: Sequence[int], dtype: torch.dtype, parts: dict[str, Any]) -> Any:
    """Transformer Engine's tensor of these parts, or the bare storage that it uses inside autograd functions."""
    if type(q).__name__ == _BLOCKS:
        full, bare = Float8BlockwiseQTensor, Float8BlockwiseQTensorStorage
        given = {name.removeprefix("_"): part for name, part in parts.items()}
        given |= {"fp8_dtype": q.dtype, "quantizer": q, "is_2D_scaled": q.block_scaling_dim == 2}
    else:
        full, bare = Float8Tensor, Float8TensorStorage
        given = {"data": parts["_data"], "data_transpose": parts["_transpose"]}
        given |= {"fp8_scale_inv": parts["_scale_inv"], "fp8_dtype": q.dtype, "quantizer": q}
    if q.internal:
        return bare(fake_dtype=dtype, **given)
    return full(shape=tuple(shape), dtype=dtype, device=torch.device("cpu"), requires_grad=False, **given)
