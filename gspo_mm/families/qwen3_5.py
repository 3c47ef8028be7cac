"""Qwen3.5 and Qwen3.6, dense and mixture of experts (model_type qwen3_5 and qwen3_5_moe).

Source: transformers' modeling_qwen3_5_moe.py and modeling_qwen3_5.py, which the parity tests compare with. What is particular:
three of four layers attend linearly, by the gated delta rule behind a short convolution (policy/delta.py); the others
gate their output, and turn a quarter of a head's dims; norms are centred at zero, but for that of the linear layers'
output; a shared expert with a gate of its own beside the routed ones. Images and positions are Qwen3-VL's, without DeepStack.

Left out: videos, router losses, and training of the layers that predict several tokens (`mtp.*`), which are carried along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gspo_mm.families.base import ServedDim
from gspo_mm.families.checks import check_rope, check_silu, check_top_k
from gspo_mm.families.cost import FlopModel, matmul
from gspo_mm.families.operations import Copy, Entry, MergeGatedQkv, Sections, VocabPad
from gspo_mm.families.parts import (
    cut_by_ep,
    cut_by_tp,
    ends,
    entry,
    gated_mlp,
    served_attention,
    served_experts,
    served_mlp,
    stacked_experts,
)
from gspo_mm.families.qwen3_vl import HF_TEXT, QwenImages
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.types import GspoError

# keys of text_config that SGLang reads and transformers does not -> values that are transformers' way
_SGLANGS_OWN = {
    "norm_topk_prob": (True,),
    "attn_output_gate": (True,),
    "is_causal": (True,),
    "output_gate_type": (None, "silu", "swish"),
}


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
        entries = ends(HF_TEXT, vocab=VocabPad(text.vocab_size, padded_vocab), tied=self.is_tied(hf))
        for number, is_linear in enumerate(linear_layers(text)):
            ours, megatrons = f"{HF_TEXT}.layers.{number}", f"language.decoder.layers.{number}"
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

    def check_served(self, hf: Any) -> None:
        # SGLang reads the file its own way, and transformers' config does not hold all of it
        whole = json.loads((Path(hf.name_or_path) / "config.json").read_text())
        stored = whole["text_config"]
        if whole["vision_config"].get("deepstack_visual_indexes") != []:
            raise GspoError(
                "vision_config.deepstack_visual_indexes of config.json is not [], for which SGLang takes Qwen3-VL's levels "
                "where it is not set; set it to [], or rollout.engine=embedded"
            )
        for key, right in _SGLANGS_OWN.items():
            if (value := stored.get(key, right[0])) not in right:
                raise GspoError(
                    f"text_config.{key}={json.dumps(value)} of config.json changes the model that SGLang computes, and "
                    f"transformers ignores it; set it to {json.dumps(right[0])}, or rollout.engine=embedded"
                )
        _check_interval(linear_layers(hf.text_config), stored.get("full_attention_interval"))
        rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
        for key in ("rope_type", "mrope_interleaved"):
            if not rope.get(key):
                raise GspoError(
                    f"text_config.rope_parameters.{key} of config.json is not set, without which SGLang turns heads in another "
                    'way; set rope_type to "default" and mrope_interleaved to true, or rollout.engine=embedded'
                )
        ours = hf.text_config.rope_parameters.get("partial_rotary_factor", 1.0)
        if (servers := stored.get("partial_rotary_factor", 0.25)) != ours:
            raise GspoError(
                f"text_config.partial_rotary_factor of config.json is {servers} for SGLang (0.25 where it is not set), and "
                f"rope_parameters.partial_rotary_factor is {ours}; set both to the same, or rollout.engine=embedded"
            )

    def linear_layers(self, hf: Any) -> Mapping[str, tuple[str, ...]]:
        text, layers = hf.text_config, {}
        for number, is_linear in enumerate(linear_layers(text)):
            ours, servers = f"{HF_TEXT}.layers.{number}", f"model.layers.{number}"
            if is_linear:
                of, at = f"{ours}.linear_attn", f"{servers}.linear_attn"
                layers[f"{at}.in_proj_qkvz.weight"] = (f"{of}.in_proj_qkv.weight", f"{of}.in_proj_z.weight")
                layers[f"{at}.out_proj.weight"] = (f"{of}.out_proj.weight",)
            else:
                of = f"{ours}.self_attn"
                layers[f"{servers}.qkv_proj.weight"] = tuple(f"{of}.{x}_proj.weight" for x in "qkv")
                layers[f"{servers}.o_proj.weight"] = (f"{of}.o_proj.weight",)
            ours, servers = f"{ours}.mlp", f"{servers}.mlp"
            if count := _num_experts(text):
                layers |= served_experts(f"{ours}.experts", f"{servers}.experts", count=count)
                layers |= served_mlp(f"{ours}.shared_expert", f"{servers}.shared_expert")
            else:
                layers |= served_mlp(ours, servers)
        return layers

    def linear_dims(self, hf: Any, *, attention: int, mlp: int, experts: int) -> list[ServedDim]:
        text = hf.text_config
        dims = served_attention(text, attention, head_dim=text.head_dim)
        for kind in ("key", "value"):
            heads, size = f"linear_num_{kind}_heads", f"linear_{kind}_head_dim"
            dims.append(cut_by_tp(f"{heads}*{size}", getattr(text, heads) * getattr(text, size), attention))
        if not _num_experts(text):
            return [*dims, cut_by_tp("intermediate_size", text.intermediate_size, mlp)]
        shared = "shared_expert_intermediate_size"
        return [
            *dims,
            cut_by_ep("moe_intermediate_size", text.moe_intermediate_size, experts),
            cut_by_tp(shared, getattr(text, shared), mlp),
        ]

    def whole_tensor(self, name: str) -> str | None:
        server = super().whole_tensor(name)
        return server and server.replace(".self_attn.", ".")


def _check_interval(linear: list[bool], interval: int | None) -> None:
    """Raise GspoError unless every `interval`-th layer, and no other, attends to all tokens: SGLang knows no other way."""
    places = range(1, len(linear) + 1)
    if interval and linear == [bool(place % interval) for place in places]:
        return
    periods = [each for each in places if linear == [bool(place % each) for place in places]]
    fix = f"set it to {periods[0]}" if periods else "set rollout.engine=embedded"
    raise GspoError(
        f"text_config.full_attention_interval={json.dumps(interval)} of config.json, which SGLang goes by, does not make the "
        f"layers that layer_types say; {fix}"
    )


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
