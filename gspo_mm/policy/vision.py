"""The vision tower on the ranks that share a micro-batch: its images are dealt out, its features gathered.

Every tensor- and context-parallel rank holds the whole tower and runs it on its own share of the images. The
features of all images are then gathered; each rank puts those it needs at the image tokens it holds. Backward,
the gradients of the features are summed over the ranks and each rank carries its own images' back through the
tower: its parameters' gradients are then parts, summed over data- and context-parallel ranks by megatron's
gradient buffers and over tensor-parallel ranks because the parameters are marked `sequence_parallel`.

A rank without images runs the tower on a blank one and keeps none of its features, so that every parameter gets a
gradient on every rank and nobody waits for a collective that one rank left out.

The features of a tower that nothing trains never change: they are kept, by the image's content hash, up to a given
number of bytes, for the G answers and the old, reference and update passes alike.

Dims: I image tokens of the micro-batch, D hidden, K DeepStack levels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.attention.varlen as varlen
from cachetools import LRUCache
from transformers import AttentionInterface

from gspo_mm.families.base import Family
from gspo_mm.policy.collectives import GatherRows
from gspo_mm.types import MicroBatch


class Features:
    """Features [I, (1+K)*D] of a micro-batch's distinct images: those for the embedding, then each level's."""

    def __init__(
        self, family: Family, hf: Any, tower: torch.nn.Module, group: dist.ProcessGroup, *, cache_bytes: int
    ) -> None:
        self._family = family
        self._hf = hf
        self._tower = tower
        self._group = group
        self.adapted = False  # whether something is trained beside its weights
        self._cache = LRUCache[str, torch.Tensor](cache_bytes, getsizeof=lambda features: features.nbytes)

    @property
    def trained(self) -> bool:
        return self.adapted or any(p.requires_grad for p in self._tower.parameters())

    def forget(self) -> None:
        """Drop what is kept: the weights are others now."""
        self._cache.clear()

    def of(self, batch: MicroBatch, device: torch.device) -> torch.Tensor:
        """Rows in the order of the micro-batch's distinct images. A collective of the ranks that share it."""
        grids = torch.empty(0, 3, dtype=torch.int64) if batch.image_grid_thw is None else batch.image_grid_thw
        patches = grids.prod(-1).tolist()
        shares = split_by_weight(patches, self._group.size())
        mine = shares[self._group.rank()]
        tokens = self._family.tokens_per_image(self._hf, grids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trained):
            own = self._encode(batch, grids, list(mine), patches, device)
            if self._group.size() == 1:
                return own
            counts = [sum(tokens[i] for i in share) for share in shares]
            return GatherRows.apply(own, counts, self._group)  # pyright: ignore[reportReturnType]

    def _encode(
        self,
        batch: MicroBatch,
        grids: torch.Tensor,
        images: list[int],
        patches: list[int],
        device: torch.device,
    ) -> torch.Tensor:
        if not images:
            return self._blank(device)
        starts = list(accumulate(patches, initial=0))

        def run(chosen: Sequence[int]) -> torch.Tensor:
            pixels = batch.pixels()
            own = torch.cat([pixels[starts[i] : starts[i + 1]] for i in chosen])
            return self._run(own.to(device, non_blocking=True), grids[list(chosen)].to(device))

        if self.trained or not self._cache.maxsize:
            return run(images)
        keys = [batch.image_keys[i] for i in images]
        missing = [i for i, key in zip(images, keys, strict=True) if key not in self._cache]
        fresh: dict[str, torch.Tensor] = {}
        if missing:
            sizes = self._family.tokens_per_image(self._hf, grids[missing])
            parts = run(missing).split(sizes)
            fresh = {batch.image_keys[i]: part.clone() for i, part in zip(missing, parts, strict=True)}
        rows = torch.cat([fresh[key] if key in fresh else self._cache[key] for key in keys])
        self._cache.update((key, f) for key, f in fresh.items() if f.nbytes <= self._cache.maxsize)
        return rows

    def _run(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        dtype = next(self._tower.parameters()).dtype
        features, levels = self._family.encode_images(self._tower, pixels.to(dtype), grids)
        return torch.cat([features, *levels], dim=-1)

    def _blank(self, device: torch.device) -> torch.Tensor:
        """No rows, but connected to every parameter of the tower."""
        if self.trained and torch.is_grad_enabled():
            grid = torch.tensor([self._family.grid_of(self._hf, 1, 1)])
            pixels = torch.zeros(int(grid.prod()), self._family.patch_dim(self._hf))
            return self._run(pixels.to(device), grid.to(device))[:0]
        dims = self._family.dims(self._hf)
        width, dtype = dims.hidden * (1 + dims.deepstack_levels), next(self._tower.parameters()).dtype
        return torch.empty(0, width, dtype=dtype, device=device)


# transformers gives the images' offsets to implementations that have "flash" in their name, to others one image a call
_PACKED = "packed_flash"


def attend_to_all_images(tower: torch.nn.Module) -> None:
    """Have the tower's blocks attend within all images of a call by one kernel, torch's for variable lengths.

    Left as it is: a tower whose images are all of one size, which needs no offsets.
    """
    if "grid_thw" not in inspect.signature(tower.forward).parameters:
        return
    AttentionInterface.register(_PACKED, _packed_attention)
    modules: Iterator[Any] = tower.modules()
    for module in modules:
        if hasattr(module, "config"):  # set_attn_implementation would look for a package of this name
            module.config._attn_implementation = _PACKED


def _packed_attention(
    module: torch.nn.Module,
    query_1AIH: torch.Tensor,
    key_1AIH: torch.Tensor,
    value_1AIH: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[1, I, A, H], as transformers takes it, of A heads for the I patches of all images."""
    query, key, value = (t[0].transpose(0, 1).contiguous() for t in (query_1AIH, key_1AIH, value_1AIH))
    offsets = cu_seq_lens_q.to(torch.int32)
    assert scaling == query.shape[-1] ** -0.5, "torch 2.11's function knows no other"
    output_IAH: Any = varlen.varlen_attn(query, key, value, offsets, offsets, max_length_q, max_length_q)
    return output_IAH.unsqueeze(0), None


class Port(torch.autograd.Function):
    """Carries the gradient of DeepStack features back to the tower past the decoder's recomputed layers.

    A recomputed layer runs its own backward, which may not reach outside it. So its features are leaves: their
    gradients are complete when that of the embeddings arrives, since the first layer is the last to go backward,
    and are handed on from there.
    """

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, leaves: list[torch.Tensor], *levels: torch.Tensor
    ) -> torch.Tensor:
        ctx.leaves = leaves
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0], None, *(leaf.grad for leaf in ctx.leaves)


def deepstack_leaves(
    features: torch.Tensor, levels: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(features, leaves): the levels as leaves whose gradients return through `features`."""
    if not (torch.is_grad_enabled() and features.requires_grad):
        return features, list(levels)
    leaves = [level.detach().requires_grad_() for level in levels]
    return Port.apply(features, leaves, *levels), leaves  # pyright: ignore[reportReturnType]


def split_by_weight(weights: Sequence[int], parts: int) -> list[range]:
    """Consecutive runs of items, one per part, whose weights are as even as cutting at item borders allows."""
    if parts == 1:
        return [range(len(weights))]
    total = sum(weights)
    edges = [0]
    middles = [before + w / 2 for before, w in zip(accumulate(weights, initial=0), weights, strict=False)]
    for part in range(1, parts):
        limit = total * part / parts
        edges.append(max(edges[-1], sum(middle < limit for middle in middles)))
    edges.append(len(weights))
    return [range(a, b) for a, b in pairwise(edges)]
