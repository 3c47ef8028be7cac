"""Puts the stand-in in place of the compiled module, and has CPU tensors pass for CUDA ones inside Transformer Engine."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tests.te.stand_in.names import Names

# modules of transformer_engine.pytorch that ask torch.cuda whether it is there, or make tensors on "cuda"
_ON_CUDA = (
    "module.base",
    "quantization",
    "optimizers.fused_adam",
    "cpp_extensions.gemm",
    "attention.dot_product_attention.backends",
    "attention.dot_product_attention.dot_product_attention",
    "attention.dot_product_attention.utils",
)


def install() -> None:
    """Import transformer_engine with the stand-in. Once, before anything else imports it."""
    assert "transformer_engine" not in sys.modules
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # upstream's switch: transformer_engine.common loads no library
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"  # softmax by torch
    _replace_cuda()
    names = Names()
    sys.modules["transformer_engine_torch"] = names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_engine  # pyright: ignore[reportMissingImports]  # its `pytorch` fails here, for want of the library
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda name: None  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["transformer_engine_torch"] = names
    transformer_engine.pytorch = importlib.import_module("transformer_engine.pytorch")  # pyright: ignore[reportAttributeAccessIssue]
    _replace_in_transformer_engine()
    names.define(importlib.import_module("tests.te.stand_in.quantizing"))
    names.define(importlib.import_module("tests.te.stand_in.kernels"))
    names.define(importlib.import_module("tests.te.stand_in.routing"))
    backends: Any = importlib.import_module(
        "transformer_engine.pytorch.attention.dot_product_attention.backends"
    )
    backends.attn_forward_func_with_cp = importlib.import_module("tests.te.stand_in.attention").over_ranks
    _gather_bytes()


class _Properties:
    """What torch.cuda.get_device_properties says: Transformer Engine then chooses as on a Hopper card."""

    major, minor, multi_processor_count, name = 9, 0, 132, "no GPU, in the role of an H100"


def _replace_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: _Properties
    cuda.get_device_name = lambda *_: _Properties.name
    cuda.is_current_stream_capturing = lambda: False
    cuda.synchronize = lambda *_: None
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda _: True)
    tensor.cuda = lambda self, *_, **__: self
    tensor.to = _on_cpu(tensor.to)


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, with "cpu" wherever an argument says "cuda"."""

    def here(value: Any) -> Any:
        is_cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
        return torch.device("cpu") if is_cuda else value

    def made(*args: Any, **kwargs: Any) -> Any:
        return make(*map(here, args), **{name: here(value) for name, value in kwargs.items()})

    return made


class _Cuda(types.ModuleType):
    """torch.cuda, which says that it is there: in Transformer Engine's own modules only."""

    def __getattr__(self, name: str) -> Any:
        return (lambda: True) if name == "is_available" else getattr(torch.cuda, name)


class _Torch(types.ModuleType):
    """torch, for the same modules."""

    cuda = _Cuda("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        makes = ("tensor", "zeros", "ones", "empty", "empty_like", "zeros_like", "arange", "full")
        return _on_cpu(found) if name in makes else found


def _replace_in_transformer_engine() -> None:
    root = "transformer_engine.pytorch"
    seen: Any = _Torch("torch")
    for name in _ON_CUDA:
        importlib.import_module(f"{root}.{name}").torch = seen  # pyright: ignore[reportAttributeAccessIssue]
    distributed: Any = importlib.import_module(f"{root}.distributed")
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    distributed._get_active_autocast_contexts = lambda: (contextlib.nullcontext(), contextlib.nullcontext())
    utils: Any = importlib.import_module(f"{root}.utils")
    before = utils.canonicalize_device
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and getattr(module, "canonicalize_device", None) is before:
            module.canonicalize_device = lambda device: torch.device("cpu" if device is None else device)  # pyright: ignore[reportAttributeAccessIssue]
    flash: Any = importlib.import_module(f"{root}.attention.dot_product_attention.utils").FlashAttentionUtils
    flash.is_installed = flash.v3_is_installed = flash.v4_is_installed = False  # sglang brings one, for GPUs


def _gather_bytes() -> None:
    """megatron gathers FP8 and BF16 parameters in one coalesced call, of which gloo would make values of one type."""
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    gather = buffers.dist_all_gather_func

    def gather_bytes(output: torch.Tensor, own: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return gather(output.view(torch.uint8), own.view(torch.uint8), *args, **kwargs)

    buffers.dist_all_gather_func = gather_bytes
