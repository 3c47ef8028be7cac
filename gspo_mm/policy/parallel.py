"""One object says how the model is spread over ranks: `ParallelPlan`. Everything asks it, nothing asks torchrun.

A size of 1 takes the same path as any other: the groups exist, with one member. Neighbouring ranks hold one
tensor-parallel model; then come context, expert and data parallelism, and the pipeline stages farthest apart:
megatron-core's order tp-cp-ep-dp-pp, which keeps the busiest traffic inside a node.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch.distributed as dist

from gspo_mm.config import ParallelConfig, check_world, data_parallel_size
from gspo_mm.families import family_of
from gspo_mm.families.base import ModelDims
from gspo_mm.runtime.dist import start_process_group, world_size
from gspo_mm.types import GspoError


class PlanError(GspoError, ValueError):
    """A parallel layout that the model or the started ranks do not fit."""


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Sizes of the axes: tensor (with sequence), expert, expert-tensor, pipeline, context and data parallel."""

    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    vpp: int = 1  # model chunks per pipeline stage (interleaved schedule)
    cp: int = 1
    dp: int = 1
    first_stage_layers: int | None = None  # of the pipeline; None: layers are spread evenly
    last_stage_layers: int | None = None

    @classmethod
    def from_config(cls, config: ParallelConfig, world: int | None = None) -> Self:
        """Fill in the sizes left open. Raises ValueError when they do not make up `world` ranks."""
        world = world_size() if world is None else world
        check_world(config, world_size=world)
        return cls(
            tp=config.tp,
            ep=config.ep,
            etp=config.etp or config.tp,
            pp=config.pp,
            vpp=config.vpp,
            cp=config.cp,
            dp=data_parallel_size(config, world),
            first_stage_layers=config.first_stage_layers,
            last_stage_layers=config.last_stage_layers,
        )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def sequence_multiple(self) -> int:
        """Tokens that every sequence's length is rounded up to: context parallelism cuts it into 2*cp pieces."""
        return 2 * self.cp if self.cp > 1 else 1

    def check_model(self, dims: ModelDims) -> None:
        """Raise ValueError naming the first size that does not fit its model dimension."""
        for key, size, what, count in (
            ("tp", self.tp, "num_attention_heads", dims.num_heads),
            ("tp", self.tp, "num_key_value_heads", dims.num_kv_groups),
            ("ep", self.ep, "num_experts", dims.num_experts),
            ("etp", self.etp if dims.num_experts else 1, "moe_intermediate_size", dims.expert_ffn),
        ):
            if count == 0 and size > 1:
                raise PlanError(f"policy.parallel.{key}={size} but the model has no experts; use 1")
            if count % size:
                raise PlanError(
                    f"policy.parallel.{key}={size} does not divide the model's {what}={count}; "
                    f"use one of {_some_divisors(count)}"
                )
        if dims.linear_heads % (self.tp * self.cp):
            raise PlanError(
                f"policy.parallel.tp={self.tp} times cp={self.cp} does not divide the model's "
                f"linear_num_key_heads={dims.linear_heads}, which linear attention spreads over both; use tp and cp whose "
                f"product is one of {_some_divisors(dims.linear_heads)}"
            )
        if dims.spread_groups % (self.tp * self.cp):
            raise PlanError(
                f"policy.parallel.tp={self.tp} times cp={self.cp} does not divide the model's "
                f"num_key_value_heads={dims.spread_groups}, which attention with sinks or windows spreads over both; use tp "
                f"and cp whose product is one of {_some_divisors(dims.spread_groups)}"
            )
        if dims.expert_biases and self.etp > 1:
            raise PlanError(
                f"policy.parallel.etp={self.etp} (null: tp) would cut experts that have biases, which megatron-core cannot; "
                "set policy.parallel.etp=1"
            )
        first = self._check_stages(dims.num_layers)
        if self.pp > 1 and first < dims.deepstack_levels:
            raise PlanError(
                f"policy.parallel.pp={self.pp} vpp={self.vpp} puts {first} layers on the first pipeline stage, but "
                f"image features enter the first {dims.deepstack_levels} (DeepStack), which must be on the stage of "
                f"the vision tower; lower pp or vpp, or set first_stage_layers={dims.deepstack_levels} or more"
            )

    def _check_stages(self, num_layers: int) -> int:
        """Layers of the first (virtual) pipeline stage; raises ValueError when the layers cannot be spread."""
        first, last = self.first_stage_layers, self.last_stage_layers
        if self.pp == 1:
            return num_layers
        given = [n for n in (first, last) if n is not None]
        middle_stages, middle_layers = self.pp - len(given), num_layers - sum(given)
        even = middle_layers == 0 if middle_stages == 0 else middle_layers % (middle_stages * self.vpp) == 0
        if middle_layers < middle_stages or not even or any(n % self.vpp for n in given):
            raise PlanError(
                f"policy.parallel.pp={self.pp} vpp={self.vpp} (first_stage_layers={first}, last_stage_layers={last}) "
                f"does not divide the model's num_hidden_layers={num_layers}; with vpp=1 use pp as one of "
                f"{_some_divisors(num_layers)}, or give the first and last stages layers of their own"
            )
        return (middle_layers // middle_stages if first is None else first) // self.vpp

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
            )
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    def as_dict(self) -> dict[str, int]:
        """The sizes; what is rarely set (vpp and stages of their own length) only where it is."""
        rare = {"vpp": 1, "first_stage_layers": None, "last_stage_layers": None}
        return {key: size for key, size in asdict(self).items() if key not in rare or size != rare[key]}


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


def _some_divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)


def round_up(count: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit
