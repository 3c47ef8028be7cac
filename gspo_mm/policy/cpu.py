"""Run megatron-core 0.19 on a machine without CUDA. Does nothing where CUDA exists.

megatron-core names `torch.cuda` in places that its unfused path reaches: the current device, streams, the random
state, `device="cuda"` literals. `install()` replaces those names, once, before parallel state and models are
built. Everything that is CPU-only in this project is here and in `LocalAttention` (spec.py).

Which literals are still there: look again when megatron-core's bound in pyproject.toml moves.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from typing import Any

import torch

_CPU = torch.device("cpu")

# modules that write device="cuda" on the unfused training path
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.transformer.utils",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.utils",
)

_installed = False


def install() -> None:
    """Make `torch.cuda` mean the CPU for megatron-core. Idempotent; no-op with CUDA."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _replace_device_and_streams()
    _replace_random_state()
    _replace_literals()
    _replace_type_names()


class _Nothing:
    """Stands for a CUDA stream or event: every method does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


def _replace_device_and_streams() -> None:
    cuda: Any = torch.cuda
    stream = _Nothing()
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = _Nothing
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda *args, **kwargs: None
    # the all-to-all dispatcher copies split sizes off the GPU on a side stream; here they are on the host already
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


def _replace_random_state() -> None:
    cuda: Any = torch.cuda
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


class _TorchOnCpu(types.ModuleType):
    """What the name `torch` means inside a module with literals: the factories leave device="cuda" out."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
            setattr(self, name, _without_cuda(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _without_cuda(factory: Any) -> Any:
    def made_on_cpu(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made_on_cpu


def _replace_literals() -> None:
    stand_in = _TorchOnCpu()
    for name in _MODULES_WITH_CUDA_LITERALS:
        module: Any = importlib.import_module(name)
        module.torch = stand_in


def _replace_type_names() -> None:
    """The mixed-precision optimizer sorts parameters by names such as 'torch.cuda.FloatTensor'."""
    plain = torch.Tensor.type

    def cuda_like(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    tensor: Any = torch.Tensor
    tensor.type = cuda_like
