"""LoRA: frozen weights, and beside each a product of two small ones that is trained (Hu et al., 2021, arXiv 2106.09685).

    y = W x + (α / r) B A x        A [r, in], B [out, r]; B begins at 0, so that a run begins with the model itself

There is a pair for every matrix of a Hugging Face folder, as peft has it: queries, keys and values have pairs of their own
though megatron-core holds them in one weight, and gate and up of an expert share one, since transformers holds them in one.
The weight map says how rows of the B's lie in megatron's weight. Every rank of a tensor-parallel group holds pairs whole and uses
its part; they are small, and so are written, exported and continued under any layout.

Dims: N packed tokens, D a matrix's input, O its output, r rank, E experts of this rank.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from gspo_mm.config.layout import PlanError
from gspo_mm.config.policy import LoraConfig
from gspo_mm.families.base import Family
from gspo_mm.families.operations import Entry, StackExperts
from gspo_mm.policy.model import PolicyModel
from gspo_mm.policy.parallel import Groups
from gspo_mm.policy.weights import Take, Weights, value_of


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where pairs act: one of megatron's weights."""

    entry: Entry
    module: torch.nn.Module
    # of the pairs, one for every Hugging Face tensor in the weight
    keys: tuple[str, ...]


class Adapters(MegatronModule):
    """The pairs of one model chunk, acting on its modules through hooks."""

    def __init__(
        self, chunk: PolicyModel, weights: Weights, config: LoraConfig, groups: Groups, *, seed: int = 0
    ) -> None:
        super().__init__(config=chunk.config)
        self.on = True
        self._scale = config.alpha / config.rank
        self._groups = groups
        self._places: dict[torch.Tensor, Place] = {}
        grouped: dict[torch.nn.Module, list[Place]] = {}
        for place, parameter in _places(chunk, weights, config):
            for key, rows in zip(place.keys, _rows(place.entry, parameter, groups), strict=True):
                columns = _columns(place.entry, parameter, groups)
                self._add(key, rows, columns, parameter, rank=config.rank, seed=seed)
            self._places[parameter] = place
            grouped.setdefault(place.module, []).append(place)
            if chunk.visual is not None and place.module in set(chunk.visual.modules()):
                assert chunk.features is not None
                chunk.features.adapted = True
        for module, places in grouped.items():
            if hasattr(module, "layer_norm_weight"):  # Transformer Engine's, whose norm's output is our input
                cast(Any, module).return_layernorm_output = True
            module.register_forward_hook(self._hook(places))

    def pair(self, key: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """A [r, in] and B [out, r] of a matrix, by its name (see `_places`)."""
        return getattr(self, _name(key, "A")), getattr(self, _name(key, "B"))

    def names(self) -> list[str]:
        return [key for place in self._places.values() for key in place.keys]

    def __contains__(self, parameter: torch.Tensor) -> bool:
        return parameter in self._places

    @torch.no_grad()
    def merged(self, parameter: torch.Tensor, read: Take = value_of) -> torch.Tensor:
        """This rank's part of a weight with its pairs added, rounded once to the weight's format; `read`: a parameter's value."""
        value, place = read(parameter), self._places.get(parameter)
        if place is None:
            return value
        pairs = [tuple(map(read, self.pair(key))) for key in place.keys]
        products = [self._scale * (b.float() @ a.float()) for a, b in pairs]
        if isinstance(place.entry.op, StackExperts):
            (whole,) = products
        else:
            (whole,) = place.entry.op.to_megatron(products)
        size, rank = _place_of(place.entry, self._groups)
        return (value.float() + place.entry.op.shard(whole, size, rank)).to(value.dtype)

    def own_pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """On the host, of those that no rank before this one holds: over all ranks each once."""
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for key in self.names():
            a, b = self.pair(key)
            if self._is_first(a):
                found[key] = (a.detach().cpu(), b.detach().cpu())
        return found

    def _is_first(self, pair: torch.nn.Parameter) -> bool:
        from megatron.core import parallel_state as state

        if getattr(pair, "allreduce", True):
            return self._groups.tp_dp_cp.rank() == 0
        return self._groups.etp.rank() == 0 and state.get_expert_data_parallel_group().rank() == 0

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Whole on every rank; an expert's are written by the first of the ranks that hold it."""
        from megatron.core import parallel_state as state

        found: dict[str, Any] = {}
        own = dict(self.named_parameters())
        experts = {name: p for name, p in own.items() if not getattr(p, "allreduce", True)}
        for part, tp, dp in (
            (
                {n: p for n, p in own.items() if n not in experts},
                self._groups.tp,
                (metadata or {}).get("dp_cp_group"),
            ),
            (experts, self._groups.etp, state.get_expert_data_parallel_group()),
        ):
            found |= make_sharded_tensors_for_checkpoint(
                part, prefix, {}, sharded_offsets, tp_group=tp, dp_cp_group=dp
            )
        return found

    def _add(self, key: str, rows: int, columns: int, like: torch.Tensor, *, rank: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) ^ seed)  # alike on all ranks
        bound = 1 / math.sqrt(columns)
        values = {
            "A": torch.empty(rank, columns).uniform_(-bound, bound, generator=generator),
            "B": torch.zeros(rows, rank),
        }
        for letter, value in values.items():
            pair = torch.nn.Parameter(value.to(like.device, self.config.params_dtype))
            pair.allreduce = getattr(like, "allreduce", True)  # pyright: ignore[reportAttributeAccessIssue]
            # each tensor-parallel rank sees its tokens, or its part of the rows: megatron sums what it finds
            pair.sequence_parallel = pair.allreduce and (  # pyright: ignore[reportAttributeAccessIssue]
                self.config.sequence_parallel or key.startswith("visual.")
            )
            self.register_parameter(_name(key, letter), pair)

    def _hook(self, places: list[Place]) -> Callable[..., Any]:
        def add(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            result, *rest = output if isinstance(output, tuple) else (output,)
            states = args[0]
            if isinstance(result, tuple):
                result, states = result
            if self.on:
                if len(args) > 1:
                    result = result + self._of_groups(states, args[1], places)
                else:
                    result = result + self._of(states, places[0])
            return (result, *rest) if isinstance(output, tuple) else result

        return add

    def _of(self, states: torch.Tensor, place: Place) -> torch.Tensor:
        """What the pairs add to the output of a module that was given `states` [N, ..., D]."""
        op, groups = place.entry.op, self._groups
        a, b = self._joined(place)
        experts = isinstance(op, StackExperts)
        group = groups.etp if experts else groups.tp
        if op.axis is None or group.size() == 1:
            return F.linear(F.linear(states, a), b)
        if experts:  # each rank sees all tokens of the expert, and a part of its weight
            a, b = (copy_to_tensor_model_parallel_region(t, group=group) for t in (a, b))
        if _cuts_columns(place.entry):
            a = a.chunk(group.size(), 1)[group.rank()]
            low = F.linear(states, a)
            # of experts the dispatcher sums the parts
            low = low if experts else reduce_scatter_to_sequence_parallel_region(low, group=group)
            return F.linear(low, b)
        low = F.linear(states, a)
        if not experts:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=group)
        return F.linear(low, op.shard(b, group.size(), group.rank()))

    def _of_groups(self, states: torch.Tensor, counts: Any, places: list[Place]) -> torch.Tensor:
        """As `_of`, for a module that holds a weight for each of E experts; `counts` [E] of their tokens."""
        parts = states.split([int(count) for count in counts])
        return torch.cat([self._of(part, place) for part, place in zip(parts, places, strict=True)])

    def _joined(self, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """One A [k*r, in] and one B [rows of megatron's weight, k*r] that do what its k pairs do, scaled."""
        pairs = [self.pair(key) for key in place.keys]
        if len(pairs) == 1:
            a, b = pairs[0]
        else:
            rank = pairs[0][0].shape[0]
            a = torch.cat([a for a, _ in pairs])
            wide = [
                F.pad(b, (rank * number, rank * (len(pairs) - 1 - number)))
                for number, (_, b) in enumerate(pairs)
            ]
            (b,) = place.entry.op.to_megatron(wide)
        return a, b * self._scale


def add_adapters(
    chunks: list[PolicyModel], weights: Weights, config: LoraConfig, groups: Groups
) -> list[Adapters]:
    """Give each chunk its pairs; from then on `weights` exports what was merged."""
    made: list[Adapters] = []
    for chunk in chunks:
        chunk.adapters = Adapters(chunk, weights, config, groups)
        made.append(chunk.adapters)

    def merged(parameter: torch.Tensor) -> torch.Tensor:
        owner = next((adapters for adapters in made if parameter in adapters), None)
        return value_of(parameter) if owner is None else owner.merged(parameter)

    weights.value = merged
    return made


@contextlib.contextmanager
def without_adapters(adapters: list[Adapters]) -> Iterator[None]:
    """The model that the adapters were added to."""
    for one in adapters:
        one.on = False
    try:
        yield
    finally:
        for one in adapters:
            one.on = True


def check_targets(family: Family, hf: Any, targets: Sequence[str]) -> None:
    """Raise PlanError for targets that the model does not have."""
    made = family.transformer_arguments(hf)
    if "experts" in targets and family.dims(hf).expert_biases:
        raise PlanError(
            f"policy.lora.targets names experts, and those of models of type {hf.model_type} have biases and are stored "
            "turned, beside which no adapters are made here; take it off the list"
        )
    experts = made.get("num_moe_experts", 0)
    dense = (
        not experts or 0 in made.get("moe_layer_freq", [1]) or made.get("moe_shared_expert_intermediate_size")
    )
    there = {"experts": bool(experts), "mlp": bool(dense), "projector": family.image_token_id(hf) is not None}
    for target in targets:
        if not there.get(target, True):
            raise PlanError(
                f"policy.lora.targets names {target}, and models of type {hf.model_type} like this one have none; take it off "
                "the list"
            )


def _places(chunk: PolicyModel, weights: Weights, config: LoraConfig) -> Iterator[tuple[Place, torch.Tensor]]:
    """The chunk's weights that `config.targets` name. Pairs are named after Hugging Face's tensors, experts' by number too."""
    owners: dict[torch.Tensor, torch.nn.Module] = {
        p: m for m in chunk.modules() for p in m.parameters(recurse=False)
    }
    for entry in weights.entries:
        for number, name in enumerate(entry.megatron):
            parameter = weights.get(name)
            if parameter is None or parameter not in owners or parameter.dim() != 2:
                continue
            if _target_of(chunk, entry, name) not in config.targets:
                continue
            keys = (f"{entry.hf[0]}.{number}",) if isinstance(entry.op, StackExperts) else entry.hf
            yield Place(entry=entry, module=owners[parameter], keys=keys), parameter


def _target_of(chunk: PolicyModel, entry: Entry, name: str) -> str | None:
    """Which of `policy.lora.targets` a weight belongs to."""
    if isinstance(entry.op, StackExperts):
        return "experts"
    if name.startswith("visual."):
        return chunk.family.part_of(name) if chunk.family.part_of(name) == "projector" else None
    if ".self_attention." in name:
        return "attention"
    return "mlp" if ".linear_fc" in name else None


def _place_of(entry: Entry, groups: Groups) -> tuple[int, int]:
    if entry.op.axis is None:
        return 1, 0
    group = groups.tp if entry.op.axis == "tp" else groups.etp
    return group.size(), group.rank()


def _cuts_columns(entry: Entry) -> bool:
    """Whether ranks hold parts of a weight's input, not of its output."""
    if isinstance(entry.op, StackExperts):
        return not entry.op.gated
    return getattr(entry.op, "dim", 0) == 1


def _rows(entry: Entry, parameter: torch.Tensor, groups: Groups) -> list[int]:
    """Rows of each Hugging Face tensor in a weight, whole."""
    size, _ = _place_of(entry, groups)
    part = torch.empty(parameter.shape, device="meta")
    whole = entry.op.unshard([part] * size)
    return [len(whole)] if isinstance(entry.op, StackExperts) else [len(t) for t in entry.op.to_hf([whole])]


def _columns(entry: Entry, parameter: torch.Tensor, groups: Groups) -> int:
    size, _ = _place_of(entry, groups)
    return parameter.shape[1] * (size if _cuts_columns(entry) else 1)


def _name(key: str, letter: str) -> str:
    """As torch allows it: without dots."""
    return f"{key.replace('.', '/')}/{letter}"
