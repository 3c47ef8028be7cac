"""Qwen3.5 and Qwen3.6, dense and mixture of experts (model_type qwen3_5 and qwen3_5_moe).

Source: transformers' modeling_qwen3_5_moe.py and modeling_qwen3_5.py, which the parity tests compare with. What is particular:
three of four layers attend linearly, by the gated delta rule behind a short convolution (policy/delta.py); the others
gate their output, and turn a quarter of a head's dims; norms are centred at zero, but for that of the linear layers'
output; a shared expert with a gate of its own beside the routed ones. Images and positions are Qwen3-VL's, without DeepStack.

Left out: videos, router losses, and training of the layers that predict several tokens (`mtp.*`), which are carried along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gspo_mm.families.checks import check_rope, check_silu, check_top_k
from gspo_mm.families.cost import FlopModel, matmul
from gspo_mm.families.operations import Copy, Entry, MergeGatedQkv, Sections, VocabPad
from gspo_mm.families.parts import ends, entry, gated_mlp, stacked_experts
from gspo_mm.families.qwen3_vl import QwenImages
from gspo_mm.hf.headers import HfFolderError

_HF_TEXT = "model.language_model"


class Qwen35(QwenImages):
    """The Family of both variants; which one is in the config."""

    carried = ("mtp.",)

    def load_config(self, path: str) -> Any:
        hf = super().load_config(path)
        text = hf.text_config
        check_silu(path, hf)
        check_rope(path, hf)
        if _num_experts(text):
            check_top_k(path, hf, sums_to_one=True)
        if text.attention_bias:
            raise HfFolderError(f"{path}: text_config.attention_bias=true is not supported; use false")
        if odd := sorted(set(text.layer_types) - {"linear_attention", "full_attention"}):
            raise HfFolderError(
                f"{path}: text_config.layer_types holds {odd[0]!r}; use linear_attention and full_attention"
            )
        return hf

    def flops(self, hf: Any) -> FlopModel:
        text, linear = hf.text_config, sum(linear_layers(hf.text_config))
        whole = text.num_hidden_layers - linear
        hidden, (queries, keys) = text.hidden_size, _attention_dims(text)
        attention = matmul(hidden, 2 * queries + 2 * keys) + matmul(queries, hidden)
        sections = _sections(text)
        memory = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
        delta = (
            matmul(hidden, sum(sections))
            + matmul(1, sum(sections[:3]) * text.linear_conv_kernel_dim)
            # a memory is asked for what it holds, corrected and read: three products of its size a token
            + 3 * matmul(1, memory)
            + matmul(sections[2], hidden)
        )
        if _num_experts(text):
            inner = text.num_experts_per_tok * text.moe_intermediate_size
            mlp = 3 * matmul(hidden, inner + text.shared_expert_intermediate_size) + matmul(hidden, 1)
        else:
            mlp = 3 * matmul(hidden, text.intermediate_size)
        decoder = FlopModel(
            token=whole * attention + linear * delta + text.num_hidden_layers * mlp,
            router=text.num_hidden_layers * matmul(hidden, _num_experts(text)),
            pair=whole * 2 * matmul(1, queries),
            row=matmul(hidden, text.vocab_size),
        )
        return self.with_vision_flops(hf, decoder)

    def transformer_arguments(self, hf: Any) -> dict[str, Any]:
        text, experts = hf.text_config, _num_experts(hf.text_config)
        arguments: dict[str, Any] = {
            "num_layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "ffn_hidden_size": text.moe_intermediate_size if experts else text.intermediate_size,
            "num_attention_heads": text.num_attention_heads,
            "num_query_groups": text.num_key_value_heads,
            "kv_channels": text.head_dim,
            "layernorm_epsilon": text.rms_norm_eps,
            "layernorm_zero_centered_gamma": True,
            "attention_output_gate": True,
            "attention_dropout": text.attention_dropout,
            "hidden_dropout": 0.0,
            "normalization": "RMSNorm",
            "qk_layernorm": True,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            # experimental_attention_variant stays unset: its block spec is for Transformer Engine's layers alone
            "linear_attention_freq": [int(linear) for linear in linear_layers(text)],
            "linear_conv_kernel_dim": text.linear_conv_kernel_dim,
            "linear_key_head_dim": text.linear_key_head_dim,
            "linear_value_head_dim": text.linear_value_head_dim,
            "linear_num_key_heads": text.linear_num_key_heads,
            "linear_num_value_heads": text.linear_num_value_heads,
        }
        if experts:
            arguments |= {
                "num_moe_experts": experts,
                "moe_layer_freq": [1] * text.num_hidden_layers,
                "moe_router_topk": text.num_experts_per_tok,
                "moe_ffn_hidden_size": text.moe_intermediate_size,
                "moe_shared_expert_intermediate_size": text.shared_expert_intermediate_size,
                "moe_shared_expert_gate": True,
                # softmax after top-k: equal to softmax over all, then renormalised over the chosen ones
                "moe_router_pre_softmax": False,
            }
        return arguments

    def weight_map(self, hf: Any, *, padded_vocab: int, fused: bool) -> list[Entry]:
        text = hf.text_config
        entries = ends(_HF_TEXT, vocab=VocabPad(text.vocab_size, padded_vocab), tied=self.is_tied(hf))
        for number, is_linear in enumerate(linear_layers(text)):
            ours, megatrons = f"{_HF_TEXT}.layers.{number}", f"language.decoder.layers.{number}"
            attend = _linear if is_linear else _attention
            entries += attend(text, ours, megatrons, fused=fused)
            entries += (_mixture if _num_experts(text) else _dense)(text, ours, megatrons, fused=fused)
        return entries + self.vision_entries(hf)

    def expert_shapes(self, hf: Any) -> Mapping[str, tuple[int, int]]:
        text = hf.text_config
        if not _num_experts(text):
            return {}
        hidden, inner = text.hidden_size, text.moe_intermediate_size
        return {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}


def linear_layers(text: Any) -> list[bool]:
    """Which decoder layers attend linearly."""
    return [kind == "linear_attention" for kind in text.layer_types]


def _num_experts(text: Any) -> int:
    return getattr(text, "num_experts", 0)


def _attention_dims(text: Any) -> tuple[int, int]:
    return text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim


def _sections(text: Any) -> tuple[int, ...]:
    """Rows of the linear layers' input projection: queries, keys, values, gates, and two numbers a value head."""
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values = text.linear_num_value_heads * text.linear_value_head_dim
    return keys, keys, values, values, text.linear_num_value_heads, text.linear_num_value_heads


def _attention(text: Any, hf: str, mcore: str, *, fused: bool) -> list[Entry]:
    norm = "self_attention.linear_qkv.layer_norm_weight" if fused else "input_layernorm.weight"
    return [
        entry(f"{hf}.input_layernorm.weight", f"{mcore}.{norm}", Copy()),
        Entry(
            hf=tuple(f"{hf}.self_attn.{x}_proj.weight" for x in "qkv"),
            megatron=(f"{mcore}.self_attention.linear_qkv.weight",),
            op=MergeGatedQkv(text.num_key_value_heads, text.head_dim),
        ),
        entry(f"{hf}.self_attn.q_norm.weight", f"{mcore}.self_attention.q_layernorm.weight", Copy()),
        entry(f"{hf}.self_attn.k_norm.weight", f"{mcore}.self_attention.k_layernorm.weight", Copy()),
        entry(f"{hf}.self_attn.o_proj.weight", f"{mcore}.self_attention.linear_proj.weight", Copy("tp", 1)),
    ]


def _linear(text: Any, hf: str, mcore: str, *, fused: bool) -> list[Entry]:
    norm = "self_attention.in_proj.layer_norm_weight" if fused else "input_layernorm.weight"
    hf, layer, mcore = f"{hf}.linear_attn", hf, f"{mcore}.self_attention"
    sections = _sections(text)
    return [
        entry(f"{layer}.input_layernorm.weight", f"{mcore.removesuffix('.self_attention')}.{norm}", Copy()),
        Entry(
            hf=tuple(f"{hf}.in_proj_{x}.weight" for x in ("qkv", "z", "b", "a")),
            megatron=(f"{mcore}.in_proj.weight",),
            op=Sections(sections, (sum(sections[:3]), *sections[3:])),
        ),
        entry(f"{hf}.conv1d.weight", f"{mcore}.conv1d.weight", Sections(sections[:3], (sum(sections[:3]),))),
        entry(f"{hf}.A_log", f"{mcore}.A_log", Copy("tp")),
        entry(f"{hf}.dt_bias", f"{mcore}.dt_bias", Copy("tp")),
        entry(f"{hf}.norm.weight", f"{mcore}.out_norm.weight", Copy()),
        entry(f"{hf}.out_proj.weight", f"{mcore}.out_proj.weight", Copy("tp", 1)),
    ]


def _dense(text: Any, hf: str, mcore: str, *, fused: bool) -> list[Entry]:
    norm = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
    return [
        entry(f"{hf}.post_attention_layernorm.weight", f"{mcore}.{norm}", Copy()),
        *gated_mlp(f"{hf}.mlp", f"{mcore}.mlp"),
    ]


def _mixture(text: Any, hf: str, mcore: str, *, fused: bool) -> list[Entry]:
    entries = [
        entry(f"{hf}.post_attention_layernorm.weight", f"{mcore}.pre_mlp_layernorm.weight", Copy()),
        entry(f"{hf}.mlp.gate.weight", f"{mcore}.mlp.router.weight", Copy()),
        entry(f"{hf}.mlp.shared_expert_gate.weight", f"{mcore}.mlp.shared_experts.gate_weight", Copy()),
        *gated_mlp(f"{hf}.mlp.shared_expert", f"{mcore}.mlp.shared_experts"),
    ]
    return entries + stacked_experts(
        f"{hf}.mlp.experts", f"{mcore}.mlp.experts", count=text.num_experts, fused=fused
    )
