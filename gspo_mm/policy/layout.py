"""Where the tokens of a micro-batch lie on the ranks that share it. Worked out on the host, once per pass.

    sequences         |aaaaa|bbb|                  as packed by batch/
    padded   [Np]     |aaaaa...|bbb.|..|           each to a multiple of 2*cp, then a tail up to the total's multiple
    CP rank  [N]      pieces r and 2*cp-1-r        of every padded sequence: each rank gets an early and a late piece,
                                                   so that causal attention costs all of them alike
    TP rank  [N/tp]   consecutive rows             of its CP rank's tokens, between attention and experts (sequence
                                                   parallelism)

The tail is a sequence of its own made of padding; no real token ever attends to padding, and padding is never
trained on. A micro-batch without sequences is all tail: its rank takes part in every collective all the same.

Dims: Np padded tokens of the micro-batch, N those of one context-parallel rank, S sequences with the tail,
R trained response tokens, I image tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gspo_mm.config.layout import round_up
from gspo_mm.policy.parallel import ParallelPlan
from gspo_mm.types import MicroBatch

_NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One rank's view of a micro-batch; every tensor is on the host."""

    cu_seqlens: torch.Tensor  # [S+1] int32, padded sequences in Np
    token_ids: torch.Tensor  # [N] int64, of this CP rank
    positions: torch.Tensor  # [A, N] int64, rotary positions of this CP rank
    visual_index: torch.Tensor  # [own I] int64, rows among this TP rank's N/tp that show an image token
    # [own I] int64, which image token of the micro-batch stands there, in packed order
    visual_feature: torch.Tensor
    predicting_rows: torch.Tensor  # [own R] int64, rows of N whose next token is a trained response token
    targets: torch.Tensor  # [own R] int64, that token's id
    response_order: torch.Tensor  # [R] int64, place in R of the predictions of CP rank 0, then rank 1, ...
    response_counts: list[int]  # own R of every CP rank
    own_is_real: torch.Tensor  # [N/tp] bool, rows of this TP rank that are not padding
    own_tokens: torch.Tensor  # [real rows of N/tp] int64, token of the micro-batch in each of them


def lay_out(
    batch: MicroBatch,
    plan: ParallelPlan,
    *,
    cp_rank: int,
    tp_rank: int,
    image_token_id: int | None,
    total: int,
) -> Layout:
    """The layout of `batch` for one rank, padded to `total` tokens: `padded_tokens` or more, by its multiple."""
    lengths = batch.cu_seqlens.diff().tolist()
    padded = [round_up(n, plan.sequence_multiple) for n in lengths]
    tail = [total - sum(padded)] if total > sum(padded) else []
    cu_seqlens = torch.tensor([0, *padded, *tail]).cumsum(0)

    # source[p]: token of the micro-batch at padded place p; -1 is padding
    source = torch.full((total,), -1)
    shift = (cu_seqlens[: len(lengths)] - batch.cu_seqlens[:-1].long()).repeat_interleave(
        torch.tensor(lengths).long()
    )
    source[torch.arange(batch.num_tokens) + shift] = torch.arange(batch.num_tokens)
    is_real = source >= 0

    def spread(values: torch.Tensor) -> torch.Tensor:
        """Values [..., tokens of the micro-batch] at their padded places, 0 elsewhere."""
        out = values.new_zeros(*values.shape[:-1], total)
        out[..., is_real] = values
        return out

    ids, positions, is_response = (spread(x) for x in (batch.token_ids, batch.positions, batch.response_mask))
    # an image token that the model sampled is text: no image stands behind it
    is_image = is_real & ~is_response & (ids == (_NO_TOKEN if image_token_id is None else image_token_id))
    image_token_number = is_image.cumsum(0) - 1
    response_number = is_response.cumsum(0) - 1
    predicts = torch.cat([is_response[1:], is_response.new_zeros(1)])  # a response never starts a sequence

    of_rank = [zigzag([*padded, *tail], plan.cp, rank) for rank in range(plan.cp)]
    mine = of_rank[cp_rank]
    own = mine.view(plan.tp, -1)[tp_rank]
    predicted = [places[predicts[places]] + 1 for places in of_rank]
    return Layout(
        cu_seqlens=cu_seqlens.int(),
        token_ids=ids[mine],
        positions=positions[:, mine],
        visual_index=is_image[own].nonzero().squeeze(1),
        visual_feature=image_token_number[own[is_image[own]]],
        predicting_rows=predicts[mine].nonzero().squeeze(1),
        targets=ids[predicted[cp_rank]],
        response_order=torch.cat([response_number[places] for places in predicted]),
        response_counts=[len(places) for places in predicted],
        own_is_real=is_real[own],
        own_tokens=source[own][is_real[own]],
    )


def padded_tokens(batch: MicroBatch, plan: ParallelPlan, *, multiple: int = 1) -> int:
    """Np of a micro-batch by itself; `multiple`: what the tokens of a TP rank must be a multiple of (FP8)."""
    unit = math.lcm(plan.sequence_multiple, plan.cp * plan.tp * multiple)
    tokens = sum(round_up(n, plan.sequence_multiple) for n in batch.cu_seqlens.diff().tolist())
    return max(round_up(tokens, unit), unit)


def zigzag(lengths: tuple[int, ...] | list[int], size: int, rank: int) -> torch.Tensor:
    """Packed places [N] that context-parallel rank `rank` holds: of every sequence pieces `rank` and `2*size-1-rank`.

    So each rank gets an early and a late piece, and causal attention costs all of them alike. This is the layout
    that Transformer Engine's context-parallel attention expects of packed sequences.
    """
    if size == 1:
        return torch.arange(sum(lengths))
    pieces, start = [], 0
    for length in lengths:
        piece = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + number * piece, start + (number + 1) * piece))
        start += length
    return torch.cat(pieces)
