"""Pieces of weight maps that families have in common."""

from __future__ import annotations

from typing import Any

import torch

from gspo_mm.families.base import ServedDim
from gspo_mm.families.operations import Copy, Entry, MergeGateUp, StackExperts, VocabPad


def entry(hf: str, megatron: str, op: Any) -> Entry:
    return Entry(hf=(hf,), megatron=(megatron,), op=op)


def ends(prefix: str, *, vocab: VocabPad, tied: bool) -> list[Entry]:
    """Embedding, last norm and output layer; `prefix`: of the decoder's tensors in Hugging Face's names."""
    entries = [
        entry(f"{prefix}.embed_tokens.weight", "language.embedding.word_embeddings.weight", vocab),
        entry(f"{prefix}.norm.weight", "language.decoder.final_layernorm.weight", Copy()),
    ]
    return entries if tied else [*entries, entry("lm_head.weight", "language.output_layer.weight", vocab)]


def gated_mlp(hf: str, mcore: str) -> list[Entry]:
    """gate, up and down of a dense MLP."""
    gate_up = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    return [
        Entry(hf=gate_up, megatron=(f"{mcore}.linear_fc1.weight",), op=MergeGateUp()),
        entry(f"{hf}.down_proj.weight", f"{mcore}.linear_fc2.weight", Copy("tp", 1)),
    ]


def stacked_experts(hf: str, mcore: str, *, count: int, fused: bool) -> list[Entry]:
    """`gate_up_proj` and `down_proj` of all experts of a layer; `hf` and `mcore` end in `experts`."""
    entries: list[Entry] = []
    for name, linear in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
        experts = tuple(
            f"{mcore}.{linear}.weight{e}" if fused else f"{mcore}.local_experts.{e}.{linear}.weight"
            for e in range(count)
        )
        op = StackExperts(gated=linear == "linear_fc1")
        entries.append(Entry(hf=(f"{hf}.{name}",), megatron=experts, op=op))
    return entries


def tower(hf: str, module: torch.nn.Module) -> list[Entry]:
    """transformers' own vision module, tensor by tensor."""
    return [entry(f"{hf}.{name}", f"visual.{name}", Copy()) for name in module.state_dict()]


# as SGLang merges them, for `Family.linear_layers` and `linear_dims`


def served_mlp(hf: str, server: str) -> dict[str, tuple[str, ...]]:
    """Of a dense MLP."""
    return {
        f"{server}.gate_up_proj.weight": (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
        f"{server}.down_proj.weight": (f"{hf}.down_proj.weight",),
    }


def served_experts(hf: str, server: str, *, count: int) -> dict[str, tuple[str, ...]]:
    """Of all experts of a layer; `hf` and `server` end in `experts`."""
    experts = [f"{hf}.{e}" for e in range(count)]
    return {
        f"{server}.w13_weight": tuple(f"{e}.{x}_proj.weight" for e in experts for x in ("gate", "up")),
        f"{server}.w2_weight": tuple(f"{e}.down_proj.weight" for e in experts),
    }


def served_attention(text: Any, ways: int, *, head_dim: int) -> list[ServedDim]:
    """Dims of the decoder's width and of grouped attention, cut that many ways."""
    groups = text.num_key_value_heads
    return [
        ServedDim(name="hidden_size", size=text.hidden_size, ways=1),
        cut_by_tp("num_attention_heads*head_dim", text.num_attention_heads * head_dim, ways),
        # more GPUs than groups: each group is held by several, whole
        cut_by_tp("num_key_value_heads*head_dim", groups * head_dim, min(ways, groups)),
    ]


def cut_by_tp(name: str, size: int, ways: int) -> ServedDim:
    return ServedDim(name=name, size=size, ways=ways, relief="lower rollout.sglang.tp")


def cut_by_ep(name: str, size: int, ways: int) -> ServedDim:
    """Of experts, which are cut over what tp has left over when it is divided by ep."""
    return ServedDim(name=name, size=size, ways=ways, relief="raise rollout.sglang.ep")
