"""One object says how the model is spread over ranks: `ParallelPlan`. Everything asks it, nothing asks torchrun.

A size of 1 takes the same path as any other: the groups exist, with one member.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Self

import torch
import torch.distributed as dist

from gspo_mm.config import ParallelConfig, check_world, data_parallel_size

# axes that the model code cannot be spread over yet; the plan, the groups and the weight map know them already
_NOT_YET = ("tp", "pp", "cp", "ep", "etp", "dp")


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """What a plan must fit: counts of the language decoder."""

    num_layers: int
    num_heads: int
    num_kv_groups: int
    num_experts: int  # 0: dense


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Sizes of the axes: tensor, expert, expert-tensor, pipeline, context and data parallel."""

    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int | None = None) -> Self:
        """Fill in the sizes left open. Raises ValueError when they do not make up `world_size`."""
        world = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
        check_world(config, world_size=world)
        return cls(
            tp=config.tp,
            ep=config.ep,
            etp=config.etp or config.tp,
            pp=config.pp,
            cp=config.cp,
            dp=data_parallel_size(config, world),
        )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def check_model(self, dims: ModelDims) -> None:
        """Raise ValueError naming the first size that does not divide its model dimension."""
        for key, size, what, count in (
            ("tp", self.tp, "num_attention_heads", dims.num_heads),
            ("tp", self.tp, "num_key_value_heads", dims.num_kv_groups),
            ("pp", self.pp, "num_hidden_layers", dims.num_layers),
            ("ep", self.ep, "num_experts", dims.num_experts),
        ):
            if count == 0 and size > 1:
                raise ValueError(f"policy.parallel.{key}={size} but the model has no experts; use 1")
            if count % size:
                raise ValueError(
                    f"policy.parallel.{key}={size} does not divide the model's {what}={count}; "
                    f"use one of {_some_divisors(count)}"
                )

    def check_supported(self) -> None:
        """Raise ValueError for an axis that the model code is not ready for."""
        for key in _NOT_YET:
            if getattr(self, key) > 1:
                raise ValueError(
                    f"policy.parallel.{key}={getattr(self, key)} is not supported yet: "
                    "this version trains in one process; use 1 (and start one rank)"
                )

    def initialize(self, seed: int) -> None:
        """Start torch.distributed and megatron's groups. May be called again, with the same or another plan."""
        from megatron.core import parallel_state, tensor_parallel

        start_process_group()
        if dist.get_world_size() != self.world_size:
            raise ValueError(
                f"the plan {self} is for {self.world_size} ranks but {dist.get_world_size()} started; "
                f"start {self.world_size}"
            )
        if parallel_state.model_parallel_is_initialized() and self != _current_plan():
            parallel_state.destroy_model_parallel()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                context_parallel_size=self.cp,
                expert_model_parallel_size=self.ep,
                expert_tensor_parallel_size=self.etp,
            )
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def device() -> torch.device:
    """This rank's device."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start_process_group() -> None:
    """Join the ranks that torchrun or srun started; without them be a world of one, which needs no port."""
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _current_plan() -> ParallelPlan:
    from megatron.core import parallel_state as state

    return ParallelPlan(
        tp=state.get_tensor_model_parallel_world_size(),
        ep=state.get_expert_model_parallel_world_size(),
        etp=state.get_expert_tensor_parallel_world_size() or 1,
        pp=state.get_pipeline_model_parallel_world_size(),
        cp=state.get_context_parallel_world_size(),
        dp=state.get_data_parallel_world_size(),
    )


def _some_divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
