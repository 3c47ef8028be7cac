"""A policy's weights under Hugging Face names, whatever ranks they lie on.

One list, the family's weight map, serves loading, export, gradients and checks. Loading is local: every rank reads
from the folder and keeps its part. Export is a collective that streams: an entry's parts are gathered over tensor-
and expert-parallel ranks of the stage that holds it, put in Hugging Face layout and sent to the other stages, so no
rank ever holds more than one entry whole. Weight sync takes experts one by one, and may leave them, and the stages,
where they are: `export_own`.

Parameters, and buffers that checkpoints hold, are known here by their global names (layers and experts counted over the
whole model).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gspo_mm.families.folder import HfFolder
from gspo_mm.families.operations import Entry, StackExperts
from gspo_mm.hf.tensors import held
from gspo_mm.policy.compat import is_quantized
from gspo_mm.policy.model import PolicyModel
from gspo_mm.policy.parallel import Groups, ParallelPlan
from gspo_mm.runtime.dist import Ranks
from gspo_mm.runtime.watchdog import beat

_LAYER = re.compile(r"(?<=^language\.decoder\.layers\.)(\d+)(?=\.)")
# megatron's plain experts, and Transformer Engine's grouped ones
_EXPERT = re.compile(
    r"(?<=\.experts\.local_experts\.)(\d+)|(?<=\.experts\.linear_fc[12]\.weight)(\d+)$|(?<=\.experts\.linear_fc[12]\.bias)(\d+)$"
)
_TIED = "language.output_layer.weight"  # the last stage's copy of a tied embedding
_EMBEDDING = "language.embedding.word_embeddings.weight"

type Take = Callable[[torch.Tensor], torch.Tensor]


class Weights:
    """The parameters of this rank's model chunks, by global name."""

    def __init__(
        self, chunks: list[PolicyModel], weight_map: list[Entry], plan: ParallelPlan, groups: Groups
    ) -> None:
        self.entries = weight_map
        self.plan = plan
        self.groups = groups
        self._parameters: dict[str, torch.Tensor] = {}
        for chunk in chunks:
            experts = (chunk.config.num_moe_experts or 0) // plan.ep * self.groups.ep.rank()
            for name, parameter in held(chunk).items():
                self._parameters[_global_name(name, chunk, experts)] = parameter
        # what of a parameter is exported unless a caller says otherwise
        self.value: Take = value_of
        # a tied output weight on a stage of its own is a second copy of the embedding
        self._tied_copy = self._parameters.pop(_TIED, None) if _is_tied(weight_map) else None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._parameters[name]

    def get(self, name: str) -> torch.Tensor | None:
        """None for a parameter that another rank holds."""
        return self._parameters.get(name)

    def names(self) -> list[str]:
        return list(self._parameters)

    @torch.no_grad()
    def load(self, folder: HfFolder) -> dict[torch.Tensor, torch.Tensor]:
        """Replace all weights by those of `folder`; each rank reads what it holds.

        Returns the exact values of parameters that keep only a rounded copy themselves (FP8 primary weights), for the
        optimizer. Raises ValueError when a shape is not the one that the folder's config.json describes.
        """
        exact: dict[torch.Tensor, torch.Tensor] = {}
        stale = set(self._parameters)
        for entry in self.entries:
            wanted = [name for name in entry.megatron if name in self._parameters]
            copy = self._tied_copy if _EMBEDDING in entry.megatron else None
            if not wanted and copy is None:
                continue
            merged = entry.op.to_megatron([folder.tensor(name) for name in entry.hf])
            for name, whole in zip(entry.megatron, merged, strict=True):
                part = entry.op.shard(whole, *self._place(entry))
                targets = [(name, self._parameters.get(name)), (_TIED, copy)]
                for target_name, target in targets:
                    if target is None:
                        continue
                    if part.shape != target.shape:
                        raise ValueError(
                            f"{folder.path}: {' + '.join(entry.hf)} gives {tuple(part.shape)} but {target_name} is "
                            f"{tuple(target.shape)}; config.json does not describe these weights"
                        )
                    target.copy_(part)
                    if is_quantized(target):
                        exact[target] = part
                stale.discard(name)
        assert not stale, f"the weight map leaves out {sorted(stale)[:3]}"
        return exact

    @torch.no_grad()
    def export(
        self, take: Take | None = None, *, experts_apart: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor in transformers' in-memory layout) of every weight, on every rank.

        A collective: all ranks must run it to its end. `take` says what of a parameter is exported, its value by
        default. With `experts_apart`, experts come one by one, under `StackExperts.names_apart`, as servers take them: those
        that they take together stay so.
        Tensors may share memory with the policy: use them before the next update.
        """
        take = take or self.value
        shapes = self._exchange_shapes(take, experts_apart) if self.plan.pp > 1 else []
        for number, entry in enumerate(self.entries):
            for names, tensors in self._pieces(entry, take, experts_apart):
                if self.plan.pp > 1:
                    tensors = self._send_to_stages(tensors, shapes[number])
                assert tensors is not None
                yield from zip(names, tensors, strict=True)

    @torch.no_grad()
    def export_own(self, sender: int, take: Take | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """As `export` with experts apart, but only the share of the rank `sender`, one of `senders`, on that rank.

        A collective of the ranks that hold other parts of its tensors; on those that hold none there is nothing to do.
        With `meta_of` each rank is on its own.
        """
        take = take or self.value
        if sender == _first(self.groups.tp) == _first(self.groups.tp_dp_cp):
            for entry in self.entries:
                if not isinstance(entry.op, StackExperts) and (whole := self._whole(entry, take)):
                    yield from zip(entry.hf, entry.op.to_hf(whole), strict=True)
        if sender == _first(self.groups.ep):
            for entry in self.entries:
                if isinstance(entry.op, StackExperts) and not _leaves_apart(entry):
                    assert self.plan.etp == 1, (
                        "ranks of other expert-parallel groups would hold parts of them"
                    )
                    for names, tensors in self._pieces(entry, take, experts_apart=True):
                        yield from zip(names, tensors or (), strict=False)
        if sender == _first(self.groups.etp):
            for entry in self.entries:
                for number, name in enumerate(entry.megatron):
                    if _leaves_apart(entry) and name in self._parameters:
                        assert isinstance(entry.op, StackExperts)
                        one = entry.op.apart(self._whole_one(entry, name, take))
                        yield from zip(entry.op.names_apart(entry.hf[0], number), one, strict=True)

    def senders(self, ranks: Ranks) -> list[int]:
        """The ranks whose shares make up all weights: one per pipeline stage and expert-parallel rank. A collective."""
        places = ranks.gather((self.groups.pp.rank(), self.groups.ep.rank()))
        return [places.index(place) for place in sorted(set(places))]

    def _pieces(
        self, entry: Entry, take: Take, experts_apart: bool
    ) -> Iterator[tuple[Sequence[str], list[torch.Tensor] | None]]:
        """The entry's Hugging Face names and tensors, in one piece or several; None on stages that hold another part."""
        beat()
        if not (experts_apart and _leaves_apart(entry)):
            whole = self._whole(entry, take)
            if whole and self.plan.ep > 1 and isinstance(entry.op, StackExperts):
                whole = list(torch.cat(_all_gather(torch.stack(whole), self.groups.ep)).unbind(0))
            yield entry.hf, entry.op.to_hf(whole) if whole else None
            return
        assert isinstance(entry.op, StackExperts)
        each = len(entry.megatron) // self.plan.ep
        for number in range(each):  # of every expert-parallel rank one
            name = entry.megatron[number + each * self.groups.ep.rank()]
            names = [
                n
                for rank in range(self.plan.ep)
                for n in entry.op.names_apart(entry.hf[0], number + each * rank)
            ]
            tensors = None
            if name in self._parameters:
                one = self._whole_one(entry, name, take)
                of_ranks = _all_gather(one, self.groups.ep) if self.plan.ep > 1 else [one]
                tensors = [tensor for one in of_ranks for tensor in entry.op.apart(one)]
            yield names, tensors

    def _whole(self, entry: Entry, take: Take) -> list[torch.Tensor]:
        """Those of an entry's megatron tensors that this rank holds a part of, whole."""
        return [self._whole_one(entry, n, take) for n in entry.megatron if n in self._parameters]

    def _whole_one(self, entry: Entry, name: str, take: Take) -> torch.Tensor:
        part = take(self._parameters[name])
        size, _ = self._place(entry)
        if size == 1:
            return part
        return entry.op.unshard(
            _all_gather(part, self.groups.tp if entry.op.axis == "tp" else self.groups.etp)
        )

    def _send_to_stages(
        self, tensors: list[torch.Tensor] | None, shapes: list[tuple[int, torch.Size, torch.dtype]]
    ) -> list[torch.Tensor]:
        group, received = self.groups.pp, []
        for index, (owner, shape, dtype) in enumerate(shapes):
            if tensors is None:
                tensor = torch.empty(shape, dtype=dtype, device=self._device())
            else:
                tensor = tensors[index].contiguous()
            dist.broadcast(tensor, src=dist.get_global_rank(group, owner), group=group)
            received.append(tensor)
        return received

    def _exchange_shapes(
        self, take: Take, experts_apart: bool
    ) -> list[list[tuple[int, torch.Size, torch.dtype]]]:
        """Owner stage, shape and dtype of every Hugging Face tensor of a piece of every entry, worked out without data.

        The dtype is that of what is taken: gradients of BF16 weights are float32.
        """
        own: dict[int, list[tuple[torch.Size, torch.dtype]]] = {}
        for number, entry in enumerate(self.entries):
            local = [self._parameters[name] for name in entry.megatron if name in self._parameters]
            if local:
                size, _ = self._place(entry)
                part = torch.empty(local[0].shape, dtype=take(local[0]).dtype, device="meta")
                whole = entry.op.unshard([part] * size)
                if experts_apart and _leaves_apart(entry):
                    assert isinstance(entry.op, StackExperts)
                    hf = entry.op.apart(whole) * self.plan.ep
                else:
                    hf = entry.op.to_hf([whole] * len(entry.megatron))
                own[number] = [(t.shape, t.dtype) for t in hf]
        of_stages: list[Any] = [None] * self.groups.pp.size()
        dist.all_gather_object(of_stages, own, group=self.groups.pp)
        shapes: list[list[tuple[int, torch.Size, torch.dtype]]] = []
        for number in range(len(self.entries)):
            owner = next(stage for stage, held in enumerate(of_stages) if number in held)
            shapes.append([(owner, shape, dtype) for shape, dtype in of_stages[owner][number]])
        return shapes

    def _place(self, entry: Entry) -> tuple[int, int]:
        """Size and rank of the axis that an entry's megatron tensors are cut along."""
        if entry.op.axis == "tp":
            return self.plan.tp, self.groups.tp.rank()
        if entry.op.axis == "etp":
            return self.plan.etp, self.groups.etp.rank()
        return 1, 0

    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device


def value_of(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's value; FP8 primary weights are turned back into the format they stand for."""
    return parameter.dequantize() if is_quantized(parameter) else parameter.detach()


def meta_of(parameter: torch.Tensor) -> torch.Tensor:
    """A tensor without data, of the shape and dtype of the parameter's value."""
    return torch.empty(parameter.shape, dtype=value_of(parameter).dtype, device="meta")


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """What backward left in the gradient buffer; zeros for a frozen parameter, or a buffer."""
    main_grad = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter) if main_grad is None else main_grad


def _leaves_apart(entry: Entry) -> bool:
    """Whether servers take the entry's tensors expert by expert."""
    return isinstance(entry.op, StackExperts) and not entry.op.together


def _is_tied(weight_map: list[Entry]) -> bool:
    return not any(_TIED in entry.megatron for entry in weight_map)


def _global_name(name: str, chunk: PolicyModel, first_expert: int) -> str:
    def layer(match: re.Match[str]) -> str:
        own: Any = chunk.language.decoder.layers[int(match.group())]
        return str(own.layer_number - 1)

    return _EXPERT.sub(lambda m: str(int(m.group()) + first_expert), _LAYER.sub(layer, name))


def _first(group: dist.ProcessGroup) -> int:
    """The global rank of a group's first member."""
    return min(dist.get_process_group_ranks(group))


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    if tensor.is_meta:
        return [tensor] * group.size()
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group)
    return parts
