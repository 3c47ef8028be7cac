"""Names of megatron-core 0.19 and Transformer Engine 2 that are not public, all those that are used: cpu.py has the rest.

To look at when the bounds in pyproject.toml move: megatron-core 0.20, Transformer Engine 3.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.utils import _create_file_view

StorageInfo = _StorageInfo  # where a file of a distributed checkpoint has a piece: name, first byte, bytes
part_of_file = _create_file_view  # as a file to read, by first byte and bytes


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether it is one of Transformer Engine's FP8 tensors, which have no public class in common."""
    return hasattr(parameter, "_fp8_dtype") or hasattr(parameter, "_quantizer")


def held_by(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a parameter's value: its own, or of an FP8 one the bytes and their inverse scales.

    Copies that only gradients need are left out: they are the same bytes turned.
    """
    if not is_quantized(parameter):
        return [parameter.data]
    both = type(parameter).__name__.startswith("MXFP8")  # its columns are not its rows turned
    parts = ["_data", "_scale_inv", "_rowwise_data", "_rowwise_scale_inv"]
    parts += ["_columnwise_data", "_columnwise_scale_inv"] if both else []
    return [tensor for part in parts if (tensor := getattr(parameter, part, None)) is not None]


def own_range(optimizer: Any, parameter: torch.Tensor) -> slice | None:
    """The part of a parameter, flattened, that this rank's distributed optimizer steps; None: another optimizer's."""
    if parameter not in optimizer.model_param_gbuf_map:
        return None
    own = optimizer._get_model_param_range_map(parameter)["param"]
    return slice(own.start, own.end)


def fuse_weight_gradients(decoder: torch.nn.Module) -> None:
    """Have Transformer Engine's products add weight gradients to the float32 sums themselves.

    megatron-core 0.19 has one setting for them and for its own output layer, which then refuses to be built without apex,
    though its product is not used here.
    """
    modules: Iterator[Any] = decoder.modules()
    for module in modules:
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def await_parameters(module: torch.nn.Module) -> None:
    """Wait until a module's parameters are gathered, for one whose weight is used without its forward.

    megatron's DistributedDataParallel waits in hooks before a module's forward.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def make_optimizer_state(optimizer: Any) -> None:
    """Moments of zeros, which a checkpoint is read into; before its first step an optimizer has none."""
    optimizer._init_optimizer_states_with_dummy_values()


def write_checkpoints_by_thread() -> None:
    """What writes a checkpoint is a thread of this process: megatron would start a process to hold its results."""
    filesystem_async._results_queue = queue.Queue()
