"""Attention of Transformer Engine under context parallelism: what its ring of kernels computes, by gathered keys.

Its modules choose the kernels and prepare their arguments as they are; in place of `attn_forward_func_with_cp` of
dot_product_attention/context_parallel.py stands `over_ranks`, with the demands that it has of packed sequences.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch.distributed.nn.functional import all_gather


def over_ranks(
    is_training: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    cu_seqlens_q_padded: torch.Tensor | None,
    cu_seqlens_kv_padded: torch.Tensor | None,
    dropout: float,
    group: dist.ProcessGroup,
    ranks: list[int],
    stream: Any,
    communication: str,
    *,
    softmax_scale: float,
    qkv_format: str,
    attn_mask_type: str,
    **_: Any,
) -> torch.Tensor:
    """Query [N, A, H], key and value [N, G, H] of this rank -> [N, A, H]. Two chunks of every sequence are on each rank."""
    assert (qkv_format, attn_mask_type, communication) == ("thd", "padding_causal", "p2p")
    assert cu_seqlens_q_padded is not None
    assert cu_seqlens_kv_padded is not None
    assert torch.equal(cu_seqlens_q_padded, cu_seqlens_kv_padded)
    size, starts = group.size(), cu_seqlens_q_padded.tolist()
    lengths, padded = cu_seqlens_q.diff().tolist(), cu_seqlens_q_padded.diff().tolist()
    assert all(length % (2 * size) == 0 for length in padded)
    assert max_seqlen_q >= max(lengths)
    assert len(query) * size == starts[-1]
    places = [_places(starts, size, rank) for rank in range(size)]
    order = torch.cat(places).argsort()
    whole = [torch.cat(all_gather(t.contiguous(), group=group))[order] for t in (query, key, value)]
    out = torch.zeros_like(whole[0])
    for start, length in zip(starts, lengths, strict=False):
        q, k, v = (t[start : start + length].transpose(0, 1) for t in whole)
        one = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True
        )
        out = out.index_copy(0, torch.arange(start, start + length), one.transpose(0, 1))
    return out[places[group.rank()]]


def _places(starts: list[int], size: int, rank: int) -> torch.Tensor:
    """Where in the buffer of all ranks one rank's tokens are: chunks `rank` and `2 * size - 1 - rank` of every sequence."""
    found = []
    for start, end in pairwise(starts):
        chunks = torch.arange(start, end).view(2 * size, -1)
        found += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(found)
