"""A policy's weights under Hugging Face names, whatever ranks they lie on.

One list, the family's weight map, serves loading, export, gradients and checks. Loading is local: every rank reads
from the folder and keeps its part. Export is a collective that streams: an entry's parts are gathered over tensor-
and expert-parallel ranks of the stage that holds it, put in Hugging Face layout and sent to the other stages, so no
rank ever holds more than one entry whole.

Parameters are known here by their global names (layers and experts counted over the whole model).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from gspo_mm.families import Entry, HfFolder
from gspo_mm.families.base import StackExperts
from gspo_mm.policy.model import PolicyModel
from gspo_mm.policy.parallel import Groups, ParallelPlan

_LAYER = re.compile(r"(?<=^language\.decoder\.layers\.)(\d+)(?=\.)")
# megatron's plain experts, and Transformer Engine's grouped ones
_EXPERT = re.compile(r"(?<=\.experts\.local_experts\.)(\d+)|(?<=\.experts\.linear_fc[12]\.weight)(\d+)$")
_TIED = "language.output_layer.weight"  # the last stage's copy of a tied embedding
_EMBEDDING = "language.embedding.word_embeddings.weight"

type Take = Callable[[torch.nn.Parameter], torch.Tensor]


class Weights:
    """The parameters of this rank's model chunks, by global name."""

    def __init__(self, chunks: list[PolicyModel], weight_map: list[Entry], plan: ParallelPlan) -> None:
        self.entries = weight_map
        self.plan = plan
        self.groups = Groups.current()
        self._parameters: dict[str, torch.nn.Parameter] = {}
        for chunk in chunks:
            experts = (chunk.config.num_moe_experts or 0) // plan.ep * self.groups.ep.rank()
            for name, parameter in chunk.named_parameters():
                self._parameters[_global_name(name, chunk, experts)] = parameter
        # a tied output weight on a stage of its own is a second copy of the embedding
        self._tied_copy = self._parameters.pop(_TIED, None) if _is_tied(weight_map) else None

    def __getitem__(self, name: str) -> torch.nn.Parameter:
        return self._parameters[name]

    def names(self) -> list[str]:
        return list(self._parameters)

    @torch.no_grad()
    def load(self, folder: HfFolder) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Replace all weights by those of `folder`; each rank reads what it holds.

        Returns the exact values of parameters that keep only a rounded copy themselves (FP8 primary weights), for the
        optimizer. Raises ValueError when a shape is not the one that the folder's config.json describes.
        """
        exact: dict[torch.nn.Parameter, torch.Tensor] = {}
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
                    if _is_quantized(target):
                        exact[target] = part
                stale.discard(name)
        assert not stale, f"the weight map leaves out {sorted(stale)[:3]}"
        return exact

    @torch.no_grad()
    def export(self, take: Take | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor in transformers' in-memory layout) of every weight, on every rank.

        A collective: all ranks must run it to its end. `take` says what of a parameter is exported, its value by
        default. Tensors may share memory with the policy: use them before the next update.
        """
        take = take or value_of
        shapes = self._exchange_shapes() if self.plan.pp > 1 else []
        for number, entry in enumerate(self.entries):
            tensors = self._gather(entry, take)
            if self.plan.pp > 1:
                tensors = self._send_to_stages(tensors, shapes[number])
            assert tensors is not None
            yield from zip(entry.hf, tensors, strict=True)

    def _gather(self, entry: Entry, take: Take) -> list[torch.Tensor] | None:
        """The entry's Hugging Face tensors on the ranks of the stage that holds it; None on the others."""
        mine = [take(self._parameters[name]) for name in entry.megatron if name in self._parameters]
        if not mine:
            return None
        stack = torch.stack(mine) if len(mine) > 1 else mine[0].unsqueeze(0)
        size, _ = self._place(entry)
        if size > 1:
            parts = _all_gather(stack, self.groups.tp if entry.op.axis == "tp" else self.groups.etp)
            stack = torch.stack([entry.op.unshard(list(of_ranks)) for of_ranks in zip(*parts, strict=True)])
        if self.plan.ep > 1 and isinstance(entry.op, StackExperts):
            stack = torch.cat(_all_gather(stack, self.groups.ep))
        return entry.op.to_hf(list(stack.unbind(0)))

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

    def _exchange_shapes(self) -> list[list[tuple[int, torch.Size, torch.dtype]]]:
        """Owner stage, shape and dtype of every Hugging Face tensor of every entry, worked out without data."""
        own: dict[int, list[tuple[torch.Size, torch.dtype]]] = {}
        for number, entry in enumerate(self.entries):
            local = [self._parameters[name] for name in entry.megatron if name in self._parameters]
            if local:
                size, _ = self._place(entry)
                part = torch.empty(local[0].shape, dtype=local[0].dtype, device="meta")
                whole = entry.op.unshard([part] * size)
                own[number] = [(t.shape, t.dtype) for t in entry.op.to_hf([whole] * len(entry.megatron))]
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


def value_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's value; FP8 primary weights are turned back into the format they stand for."""
    return parameter.dequantize() if _is_quantized(parameter) else parameter.detach()


def _is_quantized(parameter: torch.Tensor) -> bool:
    """Whether it is one of Transformer Engine's FP8 tensors."""
    return hasattr(parameter, "_fp8_dtype") or hasattr(parameter, "_quantizer")


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What backward left in the gradient buffer; zeros for a frozen parameter."""
    main_grad = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter) if main_grad is None else main_grad


def _is_tied(weight_map: list[Entry]) -> bool:
    return not any(_TIED in entry.megatron for entry in weight_map)


def _global_name(name: str, chunk: PolicyModel, first_expert: int) -> str:
    def layer(match: re.Match[str]) -> str:
        own: Any = chunk.language.decoder.layers[int(match.group())]
        return str(own.layer_number - 1)

    return _EXPERT.sub(lambda m: str(int(m.group()) + first_expert), _LAYER.sub(layer, name))


def _all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group)
    return parts
