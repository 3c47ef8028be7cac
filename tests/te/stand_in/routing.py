"""The router's kernels of Transformer Engine (common/fused_router): softmax over the k largest logits, nothing else."""

from __future__ import annotations

from typing import Any

import torch


def fused_topk_with_score_function_fwd(
    logits: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: torch.Tensor | None,
    routing_map_format: int,
    topk_indices: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(probabilities, map, what backward needs), each [tokens, experts]."""
    assert score_function == "softmax"
    assert not use_pre_softmax
    assert not any((num_groups, group_topk, scaling_factor, routing_map_format))
    assert expert_bias is None
    assert topk_indices is None
    values, chosen = logits.float().topk(topk, dim=1)
    probs = torch.zeros_like(logits, dtype=torch.float32).scatter(1, chosen, values.softmax(1))
    routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
    return probs.to(logits.dtype), routing_map, probs


def fused_topk_with_score_function_bwd(
    routing_map: torch.Tensor,
    probs: torch.Tensor,
    grad_probs: torch.Tensor,
    grad_logits: torch.Tensor,
    *_: Any,
) -> None:
    grad = torch.where(routing_map, grad_probs.float(), 0.0)
    grad_logits.copy_(probs * (grad - (grad * probs).sum(1, keepdim=True)))
