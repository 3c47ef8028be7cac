"""The operations that weight maps are written in: whole Hugging Face tensors <-> whole megatron tensors, bit for bit.

A weight map is a list of `Entry(hf names <-> megatron names, operation)`. Loading, exporting, weight sync and the
conversion tools all read that one list. Names are global: layer and expert numbers count over the whole model,
whatever the rank; `shard` says what part of a whole megatron tensor a rank holds.

Dims: V vocabulary, D hidden, E experts, F one expert's (or the MLP's) inner size, H head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

type Axis = Literal["tp", "etp"]


class Operation(Protocol):
    """Turns whole Hugging Face tensors into whole megatron tensors and back, bit for bit."""

    @property
    def axis(self) -> Axis | None:
        """The parallel axis that the megatron tensors are cut along; None: every rank holds them whole."""
        ...

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]: ...
    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]: ...

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        """Rank `rank` of `size`'s part of one whole megatron tensor."""
        ...

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """One whole megatron tensor from the parts of all ranks, in rank order: the inverse of `shard`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`hf` tensors are `megatron` tensors under `op`; a tuple on either side when they are merged or stacked."""

    hf: tuple[str, ...]
    megatron: tuple[str, ...]
    op: Operation


@dataclass(frozen=True)
class Copy:
    """The same tensor on both sides, cut along `dim` over `axis`."""

    axis: Axis | None = None
    dim: int = 0

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        return hf

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        return megatron

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return whole if self.axis is None else _part(whole, self.dim, size, rank)

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return parts[0] if self.axis is None else torch.cat(parts, self.dim)


@dataclass(frozen=True)
class VocabPad:
    """Rows of zeros appended up to `padded`; they are never looked up and their logits are cut off."""

    vocab: int
    padded: int
    axis: Axis | None = "tp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        (weight_VD,) = hf
        padding = weight_VD.new_zeros(self.padded - self.vocab, weight_VD.shape[1])
        return [torch.cat([weight_VD, padding]) if len(padding) else weight_VD]

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        return [megatron[0][: self.vocab]]

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return _part(whole, 0, size, rank)

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts)


@dataclass(frozen=True)
class MergeQkv:
    """q, k, v (weights or biases) <-> one tensor laid out group by group: [its queries, its key, its value]."""

    num_groups: int
    head_dim: int
    axis: Axis | None = "tp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        inner = hf[0].shape[1:]
        grouped = [t.reshape(self.num_groups, -1, *inner) for t in hf]
        return [torch.cat(grouped, dim=1).reshape(-1, *inner)]

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        inner = megatron[0].shape[1:]
        grouped = megatron[0].reshape(self.num_groups, -1, *inner)
        queries = grouped.shape[1] - 2 * self.head_dim
        parts = grouped.split([queries, self.head_dim, self.head_dim], dim=1)
        return [part.reshape(-1, *inner) for part in parts]

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return _part(whole, 0, size, rank)

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts)


@dataclass(frozen=True)
class MergeGatedQkv:
    """As MergeQkv, where q holds [its query, its gate] head by head: every group becomes [queries, gates, key, value]."""

    num_groups: int
    head_dim: int
    axis: Axis | None = "tp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        query, *rest = hf
        inner = query.shape[1:]
        heads = query.reshape(self.num_groups, -1, 2, self.head_dim, *inner).transpose(1, 2)
        return self._plain().to_megatron([heads.reshape(-1, *inner), *rest])

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        query, *rest = self._plain().to_hf(megatron)
        inner = query.shape[1:]
        heads = query.reshape(self.num_groups, 2, -1, self.head_dim, *inner).transpose(1, 2)
        return [heads.reshape(-1, *inner), *rest]

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return self._plain().shard(whole, size, rank)

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return self._plain().unshard(parts)

    def _plain(self) -> MergeQkv:
        return MergeQkv(self.num_groups, self.head_dim)


@dataclass(frozen=True)
class Sections:
    """Tensors <-> one, row after row, made of sections of that many rows; each rank holds its part of every section."""

    sections: tuple[int, ...]  # of the whole tensor
    tensors: tuple[int, ...]  # rows of each tensor on the Hugging Face side
    axis: Axis | None = "tp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(hf)]

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(megatron[0].split(self.tensors))

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return torch.cat([_part(section, 0, size, rank) for section in whole.split(self.sections)])

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        sizes = [rows // len(parts) for rows in self.sections]
        by_section = zip(*(part.split(sizes) for part in parts), strict=True)
        return torch.cat([part for section in by_section for part in section])


@dataclass(frozen=True)
class MergeGateUp:
    """gate [F, D] and up [F, D] <-> [2F, D], gate first; each rank holds its part of both."""

    axis: Axis | None = "tp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(hf)]

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(megatron[0].chunk(2))

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return torch.cat([_part(half, 0, size, rank) for half in whole.chunk(2)])

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])


@dataclass(frozen=True)
class StackExperts:
    """One [E, out, in] tensor <-> E tensors [out, in], or biases [E, out] <-> [out]; `gated`: out is gate and up, one after
    the other.
    """

    gated: bool
    # Hugging Face's tensor is [E, in, out]
    turned: bool = False
    # in it, gate and up take turns: out is gate 0, up 0, gate 1, up 1, ...
    in_turns: bool = False
    # folders and servers have all experts at once, as Hugging Face's tensor, and not one by one
    together: bool = False
    axis: Axis | None = "etp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        stacked = hf[0].transpose(1, 2) if self.turned else hf[0]
        if self.in_turns:
            stacked = torch.cat([stacked[:, ::2], stacked[:, 1::2]], 1)
        return list(stacked.unbind(0))

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        stacked = torch.stack(megatron) if len(megatron) > 1 else megatron[0][None]
        if self.in_turns:
            stacked = torch.stack(stacked.chunk(2, 1), 2).flatten(1, 2)
        return [stacked.transpose(1, 2).contiguous() if self.turned else stacked]

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        if self.gated:
            return MergeGateUp().shard(whole, size, rank)
        return whole if self.axis is None else _part(whole, 1, size, rank)

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        if self.gated:
            return MergeGateUp().unshard(parts)
        return parts[0] if self.axis is None else torch.cat(parts, 1)

    def names_apart(self, hf: str, expert: int) -> list[str]:
        """Names of one expert's tensors in checkpoints that store experts one by one; servers take these as well."""
        parent, _, last = hf.rpartition(".")
        kind = "bias" if last.endswith("_bias") else "weight"
        return [f"{parent}.{expert}.{x}_proj.{kind}" for x in (("gate", "up") if self.gated else ("down",))]

    def apart(self, megatron: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of `names_apart`, from one expert's megatron tensor."""
        return list(megatron.chunk(2)) if self.gated else [megatron]

    def all_apart(self, hf: str, stacked: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """`names_apart` and `apart` of every expert in turn, from Hugging Face's one tensor."""
        for expert, one in enumerate(self.to_megatron([stacked])):
            yield from zip(self.names_apart(hf, expert), self.apart(one), strict=True)


def _part(whole: torch.Tensor, dim: int, size: int, rank: int) -> torch.Tensor:
    return whole if size == 1 else whole.chunk(size, dim)[rank]
