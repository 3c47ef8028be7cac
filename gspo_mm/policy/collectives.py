"""Collectives that gradients go through, one for each kind of axis that is cut: images, tokens, predictions.

Megatron has its own for tensor parallelism. What its ranks do with what was gathered decides the backward pass: where
each goes on to use all of it for itself, gradients are summed; where all compute one and the same, they are complete.

Dims: N packed tokens of a rank, R trained response tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from gspo_mm.policy.layout import Layout, zigzag


class GatherRows(torch.autograd.Function):
    """Rows of all ranks one after the other, `counts` of each; backward sums the ranks' gradients of one's own."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, counts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_rows(own, counts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradients[0].contiguous().clone()
        if len(total):
            dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.counts)[ctx.group.rank()], None, None


class GatherTokens(torch.autograd.Function):
    """Tokens [N, ...] of every context-parallel rank put in sequence order; backward sums over the ranks."""

    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, lengths: tuple[int, ...], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.group = group
        ctx.order = torch.cat([zigzag(lengths, group.size(), rank) for rank in range(group.size())])
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, own.contiguous(), group=group)
        gathered = torch.cat(parts)
        return torch.empty_like(gathered).index_copy_(0, ctx.order, gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        own = ctx.order.chunk(ctx.group.size())[ctx.group.rank()]
        return total.index_select(0, own), None, None


class InResponseOrder(torch.autograd.Function):
    """[own R] of each context-parallel rank -> [R] on all of them.

    Every rank goes on to compute the same loss from all R, so the gradient of its own part is complete as it comes:
    backward takes its rows and sums nothing.
    """

    @staticmethod
    def forward(ctx: Any, own_R: torch.Tensor, layout: Layout, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.own = layout.response_order.split(layout.response_counts)[group.rank()]
        return in_response_order(own_R, layout, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0].index_select(0, ctx.own.to(gradients[0].device)), None, None


def gather_rows(own: torch.Tensor, counts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' rows; without gradient. Shorter parts are filled up, since gloo gathers equal shapes only."""
    longest = max(counts)
    if not longest:
        return own.detach()
    filled = own.new_zeros(longest, *own.shape[1:])
    filled[: len(own)] = own.detach()
    parts = [torch.empty_like(filled) for _ in counts]
    dist.all_gather(parts, filled, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def in_response_order(own_R: torch.Tensor, layout: Layout, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's values [own R], gathered and put in the order of `token_ids[response_mask]`; no gradient."""
    if group.size() == 1:
        return own_R.detach().clone()
    gathered = gather_rows(own_R, layout.response_counts, group)
    return torch.empty_like(gathered).index_copy_(0, layout.response_order.to(gathered.device), gathered)
