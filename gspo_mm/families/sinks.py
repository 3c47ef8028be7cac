"""Attention with sinks by torch's scaled_dot_product_attention: for the policy without CUDA, and for the embedded engine.

A sink is a number per head that stands among a query's scores, takes its part of their softmax, and has no value (Xiao et al.,
2023, arXiv 2309.17453; learned as in gpt-oss). Here it is one more key in front of all: with a dim added to queries and keys, in
which the query is the sink and only that key is not 0. So torch's kernel gives the sink's gradient, and holds no scores.

S sequences, A query heads, G key heads, Q queries, T keys, H head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attend_with_sinks(
    query_SAQH: torch.Tensor,
    key_SGTH: torch.Tensor,
    value_SGTH: torch.Tensor,
    sinks: torch.Tensor,
    *,
    mask: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """[S, A, Q, H]. `sinks` broadcasts to [S, A, Q, 1]; `mask` to [S, A, Q, T], bool (True: seen) or added to the scores."""
    column = (sinks / scale).to(query_SAQH.dtype).expand(*query_SAQH.shape[:3], 1)
    key, value = (F.pad(t, (0, 1, 1, 0)) for t in (key_SGTH, value_SGTH))
    key[..., 0, -1] = 1
    output = F.scaled_dot_product_attention(
        torch.cat([query_SAQH, column], -1),
        key,
        value,
        attn_mask=F.pad(mask, (1, 0), value=1 if mask.dtype is torch.bool else 0),
        dropout_p=dropout,
        scale=scale,
        enable_gqa=bool(query_SAQH.shape[1] != key_SGTH.shape[1]),  # a tensor where steps are recorded
    )
    return output[..., :-1]
