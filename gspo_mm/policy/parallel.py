"""One object says how the model is spread over ranks: `ParallelPlan`. Everything asks it, nothing asks torchrun.

A size of 1 takes the same path as any other: the groups exist, with one member. Neighbouring ranks hold one
tensor-parallel model; then come context, expert and data parallelism, and the pipeline stages farthest apart:
megatron-core's order tp-cp-ep-dp-pp, which keeps the busiest traffic inside a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch.distributed as dist

from gspo_mm.config import ParallelConfig
from gspo_mm.config.layout import PlanError, Sizes
from gspo_mm.families.table import family_of
from gspo_mm.runtime.dist import start_process_group, world_size


@dataclass(frozen=True, kw_only=True)
class ParallelPlan(Sizes):
    """The sizes, and the process groups that they make."""

    @classmethod
    def from_config(cls, config: ParallelConfig, world: int | None = None) -> Self:
        """Fill in the sizes left open. Raises ValueError when they do not make up `world` ranks, or those started."""
        return super().from_config(config, world_size() if world is None else world)

    def initialize(self, seed: int) -> None:
        """Start torch.distributed and megatron's groups. May be called again, with the same or another plan."""
        from megatron.core import parallel_state, tensor_parallel

        start_process_group()
        if dist.get_world_size() != self.world_size:
            raise PlanError(
                f"the plan {self} is for {self.world_size} ranks but {dist.get_world_size()} started; "
                f"start {self.world_size}"
            )
        sizes = (self.tp, self.pp, self.vpp, self.cp, self.ep, self.etp)
        if parallel_state.model_parallel_is_initialized() and sizes != _sizes_in_use():
            parallel_state.destroy_model_parallel()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                virtual_pipeline_model_parallel_size=self.vpp if self.vpp > 1 else None,
                context_parallel_size=self.cp,
                expert_model_parallel_size=self.ep,
                expert_tensor_parallel_size=self.etp,
                create_gloo_process_groups=False,  # copies that only older checkpoint formats use
            )
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This rank's process groups and its places in them. Made by `Groups.current` once megatron's are set up."""

    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    tp_cp: dist.ProcessGroup  # all ranks that share one micro-batch on one pipeline stage; tp varies fastest
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    tp_dp_cp: dist.ProcessGroup  # all ranks of one pipeline stage

    @classmethod
    def current(cls) -> Self:
        from megatron.core import parallel_state

        state: Any = parallel_state
        return cls(
            tp=state.get_tensor_model_parallel_group(),
            cp=state.get_context_parallel_group(),
            tp_cp=state.get_tensor_and_context_parallel_group(),
            ep=state.get_expert_model_parallel_group(),
            etp=state.get_expert_tensor_parallel_group(),
            pp=state.get_pipeline_model_parallel_group(),
            dp=state.get_data_parallel_group(),
            tp_dp_cp=state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        )

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1


def check_layout(path: str, config: ParallelConfig, world: int) -> None:
    """Raise ValueError when the model folder `path` cannot be spread as `config` says; before any rank starts."""
    family = family_of(path)
    ParallelPlan.from_config(config, world).check_model(family.dims(family.load_config(path)))


def _sizes_in_use() -> tuple[int, ...]:
    from megatron.core import parallel_state as state

    return (
        state.get_tensor_model_parallel_world_size(),
        state.get_pipeline_model_parallel_world_size(),
        state.get_virtual_pipeline_model_parallel_world_size() or 1,
        state.get_context_parallel_world_size(),
        state.get_expert_model_parallel_world_size(),
        state.get_expert_tensor_parallel_world_size() or 1,
    )
