"""What of a model's size config.json leaves to its family: the questions that `gspo_mm/plan/` asks, which knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Of one `model_type`. What is not said here is as config.json's keys say, in all families alike."""

    # whether layers are mixtures of experts (those that its keys do not make dense), and the key of an expert's inner size
    mixture: bool = False
    expert_width: str = "moe_intermediate_size"
    # the router and every expert have biases
    expert_biases: bool = False
    # the part of the expert that every token passes is weighed by a gate
    shared_gate: bool = False
    # linear attention in the layers that layer_types or full_attention_interval say, by the gated delta rule
    linear: bool = False
    # an output gate of attention doubles its queries
    gated: bool = False
    # a norm of each head's queries and keys
    norms_queries: bool = True
    # a number per head beside its scores
    sinks: bool = False
    # biases of queries, keys and values, and of the output projection; None: as attention_bias says
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    # the tower's blocks: LayerNorms, biases and learned positions; RMSNorms and gated MLPs; or those with a convolution behind
    # them that merges patches
    tower: Literal["plain", "gated", "convolved"] = "plain"
