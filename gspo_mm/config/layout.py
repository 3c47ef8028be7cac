"""How a model is spread over ranks, as numbers: sizes of the axes, and whether a model's dims fit them. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Self

from gspo_mm.config.policy import ParallelConfig, check_world, data_parallel_size
from gspo_mm.types import GspoError


class PlanError(GspoError, ValueError):
    """A parallel layout that the model or the started ranks do not fit, or a run that cannot be planned."""


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """What a plan must fit: counts of the language decoder, and how deep DeepStack reaches into it."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_groups: int
    num_experts: int  # 0: dense
    expert_ffn: int = 0  # inner size of one expert
    deepstack_levels: int = 0
    linear_heads: int = 0  # key heads of linear attention; 0: none
    # key-value heads that context parallelism spreads too, as attention with sinks or windows needs; 0: tokens alone
    spread_groups: int = 0
    expert_biases: bool = False


@dataclass(frozen=True, kw_only=True)
class Sizes:
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
    def from_config(cls, config: ParallelConfig, world: int) -> Self:
        """Fill in the sizes left open. Raises ValueError when they do not make up `world` ranks."""
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

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """Decoder layers of each pipeline stage, vpp chunks together."""
        if self.pp == 1:
            return [num_layers]
        given = {0: self.first_stage_layers, self.pp - 1: self.last_stage_layers}
        rest = num_layers - sum(n for n in given.values() if n is not None)
        even = rest // max(1, self.pp - sum(n is not None for n in given.values()))
        return [n if (n := given.get(stage)) is not None else even for stage in range(self.pp)]

    def as_dict(self) -> dict[str, int]:
        """The sizes; what is rarely set (vpp and stages of their own length) only where it is."""
        rare = {"vpp": 1, "first_stage_layers": None, "last_stage_layers": None}
        return {key: size for key, size in asdict(self).items() if key not in rare or size != rare[key]}


def _some_divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)


def round_up(count: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit
