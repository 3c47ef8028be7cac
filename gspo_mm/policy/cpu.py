"""Run megatron-core 0.19 on a machine without CUDA. Does nothing where CUDA exists.

megatron-core names `torch.cuda` in places that its unfused path reaches: the current device, streams, the random
state, `device="cuda"` literals. `install()` replaces those names, once, before parallel state and models are
built. Everything that is CPU-only in this project is here and in `LocalAttention` (attention.py).

Which literals are still there: look again when megatron-core's bound in pyproject.toml moves.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import types
import warnings
from typing import Any

import torch
import torch.distributed as dist

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
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)

_installed = False


def install() -> None:
    """Make `torch.cuda` mean the CPU for megatron-core. Idempotent; no-op with CUDA."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
    _replace_device_and_streams()
    _replace_random_state()
    _replace_literals()
    _replace_type_names()
    _replace_uneven_collectives()
    _copy_where_one_rank_is_alone()
    _fix_loading_of_torch_adam()
    _replace_linear_attention()
    _run_as_written()


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
    tensor.cuda = lambda self, *args, **kwargs: self  # the distributed optimizer gathers its state with it


def _replace_uneven_collectives() -> None:
    """gloo gathers and scatters equal shapes only; expert-tensor parallelism has ragged ones."""
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(
        own: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if group.size() == 1 or sizes is None:
            return gather(own, group, sizes, *args, **kwargs)
        filled = own.new_zeros(max(sizes), *own.shape[1:])
        filled[: len(own)] = own
        parts = [torch.empty_like(filled) for _ in sizes]
        dist.all_gather(parts, filled, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def scatter_uneven(
        own: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if group.size() == 1 or sizes is None:
            return scatter(own, group, sizes, *args, **kwargs)
        total = own.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_uneven, scatter_uneven


def _copy_where_one_rank_is_alone() -> None:
    """The distributed optimizer's two collectives are copies for a rank without peers; make them so.

    gloo would do it on a thread of its own, where the copy of a large tensor starts OpenMP workers beside ours: more
    workers than cores, whereupon OpenMP stops waiting actively, and every later operation takes about twice as long.
    """
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")

    def or_copy(collective: Any) -> Any:
        def run(output: torch.Tensor, own: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if kwargs["group"].size() > 1:
                return collective(output, own, *args, **kwargs)
            if output.data_ptr() != own.data_ptr():
                output.copy_(own)
            return None

        return run

    buffers.dist_all_gather_func = or_copy(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = or_copy(buffers.dist_reduce_scatter_func)


def _fix_loading_of_torch_adam() -> None:
    """torch's AdamW, which stands in for the fused ones, keeps its step count as a tensor per parameter.

    megatron-core 0.19's distributed optimizer then misses the key `step` on loading, and shares one tensor among
    all parameters, so that it counts once per parameter.
    """
    module: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer = module.DistributedOptimizer
    set_state, load = optimizer._set_main_param_and_optimizer_states, optimizer.load_state_dict

    def set_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if torch.is_tensor(state.get("step")) and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        return set_state(self, model_param, tensors)

    def load_with_own_steps(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    optimizer._set_main_param_and_optimizer_states = set_with_step
    optimizer.load_state_dict = load_with_own_steps


def _replace_linear_attention() -> None:
    """The kernels of flash-linear-attention run on GPUs only; megatron-core names them in two modules."""
    from gspo_mm.policy import delta

    common: Any = importlib.import_module("megatron.core.ssm.gated_delta_net.common")
    layer: Any = importlib.import_module("megatron.core.ssm.gated_delta_net.gdn")
    common.HAVE_FLA, common.l2norm = True, delta.l2norm
    layer.causal_conv1d, layer.chunk_gated_delta_rule = delta.convolution, delta.delta_rule


def _run_as_written() -> None:
    """Undo torch.compile around small pieces of layers: on a CPU it takes a C++ compiler and minutes."""
    layer: Any = importlib.import_module("megatron.core.ssm.gated_delta_net.common")._GDNBase
    attention: Any = importlib.import_module("megatron.core.transformer.attention").Attention
    for owner, names in (
        (layer, ("_apply_gated_norm", "_prepare_input_for_gated_delta_rule")),
        (attention, ("_apply_output_gate",)),
    ):
        for name in names:
            setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    activations: Any = importlib.import_module("megatron.core.fusions.fused_bias_geglu")
    written = inspect.unwrap(activations.quick_gelu)
    for name in ("transformer.transformer_config", "transformer.mlp", "transformer.moe.experts"):
        importlib.import_module(f"megatron.core.{name}").quick_gelu = written  # pyright: ignore[reportAttributeAccessIssue]
    activations.quick_gelu = written
