"""Qwen3, dense and mixture of experts (model_type qwen3 and qwen3_moe): text alone. And the decoder that Qwen3-VL shares.

Source: transformers' modeling_qwen3.py and modeling_qwen3_moe.py, which the parity tests compare with. What is particular:
RMSNorm on queries and keys, and routing weights that sum to 1 over the chosen experts or not (norm_topk_prob).

Left out: sliding windows and rotary scaling, which are refused by name, and router losses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from gspo_mm.families.base import Family, ServedDim
from gspo_mm.families.checks import check_rope, check_silu, check_top_k
from gspo_mm.families.cost import FlopModel, matmul
from gspo_mm.families.operations import Copy, Entry, MergeQkv, VocabPad
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
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.types import GspoError

_WHOLE = re.compile(r"(norm|mlp\.gate)\.weight$")


class Qwen3Decoder:
    """What a Family of this decoder has in common; its config is the whole one's, or its text_config."""

    prefix: str  # of the decoder's tensors in Hugging Face's names
    norms_queries = True  # and keys, head by head
    experts_key = "num_experts"  # of the config: how many experts are routed to

    def mixtures(self, text: Any) -> list[bool]:
        """Which decoder layers are mixtures of experts."""
        if not getattr(text, "num_experts", 0):
            return [False] * text.num_hidden_layers
        dense, step = getattr(text, "mlp_only_layers", ()), getattr(text, "decoder_sparse_step", 1)
        return [number not in dense and (number + 1) % step == 0 for number in range(text.num_hidden_layers)]

    def num_experts(self, text: Any) -> int:
        return getattr(text, self.experts_key)

    def expert_width(self, text: Any) -> int:
        """Inner size of one expert."""
        return text.moe_intermediate_size

    def shared_width(self, text: Any) -> int:
        """Inner size of the expert that every token of a mixture passes; 0: there is none."""
        return 0

    def qkv_bias(self, text: Any) -> bool:
        return bool(text.attention_bias)

    def attention_output_bias(self, hf: Any) -> bool:
        return bool(hf.get_text_config().attention_bias)

    def renormalises(self, text: Any) -> bool:
        """Whether routing weights are made to sum to 1 over the chosen experts."""
        return text.norm_topk_prob

    def check_decoder(self, path: str, hf: Any) -> None:
        """Raise HfFolderError for a variant that is not supported."""
        text = hf.get_text_config()
        check_silu(path, hf)
        check_rope(path, hf)
        if getattr(text, "use_sliding_window", False) or {*(getattr(text, "layer_types", None) or ())} - {
            "full_attention"
        }:
            raise HfFolderError(
                f"{path}: use_sliding_window={text.use_sliding_window} with layers that see a window of tokens alone is not "
                "supported; use a model whose layers see all tokens (use_sliding_window=false)"
            )
        if any(self.mixtures(text)):
            check_top_k(path, hf, sums_to_one=self.renormalises(text), experts=self.experts_key)

    def decoder_flops(self, hf: Any) -> FlopModel:
        """Of the decoder and the output layer."""
        text, mixtures = hf.get_text_config(), sum(self.mixtures(hf.get_text_config()))
        hidden = text.hidden_size
        queries, keys = (n * head_dim(text) for n in (text.num_attention_heads, text.num_key_value_heads))
        attention = matmul(hidden, queries) + 2 * matmul(hidden, keys) + matmul(queries, hidden)
        chosen = text.num_experts_per_tok * self.expert_width(text) if mixtures else 0
        experts = 3 * matmul(hidden, chosen + self.shared_width(text))
        dense = 3 * matmul(hidden, text.intermediate_size)  # gate, up, down
        return FlopModel(
            token=text.num_hidden_layers * attention
            + mixtures * experts
            + (text.num_hidden_layers - mixtures) * dense,
            router=mixtures * matmul(hidden, self.num_experts(text)) if mixtures else 0,
            pair=text.num_hidden_layers * 2 * matmul(1, queries),
            row=matmul(hidden, text.vocab_size),
        )

    def transformer_arguments(self, hf: Any) -> dict[str, Any]:
        text = hf.get_text_config()
        arguments: dict[str, Any] = {
            "num_layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "ffn_hidden_size": text.intermediate_size,
            "num_attention_heads": text.num_attention_heads,
            "num_query_groups": text.num_key_value_heads,
            "kv_channels": head_dim(text),
            "layernorm_epsilon": text.rms_norm_eps,
            "add_qkv_bias": self.qkv_bias(text),
            "attention_dropout": text.attention_dropout,
            "hidden_dropout": 0.0,
            "normalization": "RMSNorm",
            "qk_layernorm": self.norms_queries,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
        }
        pattern = self.mixtures(text)
        if any(pattern):
            arguments |= {
                "num_moe_experts": self.num_experts(text),
                "moe_router_topk": text.num_experts_per_tok,
                "moe_ffn_hidden_size": self.expert_width(text),
                "moe_layer_freq": [int(is_moe) for is_moe in pattern],
                # softmax after top-k is softmax over all, then renormalised over the chosen ones
                "moe_router_pre_softmax": not self.renormalises(text),
            }
        return arguments

    def decoder_entries(self, hf: Any, *, padded_vocab: int, fused: bool) -> list[Entry]:
        """The weight map of embedding, decoder and output layer."""
        text = hf.get_text_config()
        vocab = VocabPad(text.vocab_size, padded_vocab)
        entries = ends(self.prefix, vocab=vocab, tied=hf.tie_word_embeddings)
        for number, is_moe in enumerate(self.mixtures(text)):
            entries += self._attention(hf, number, fused=fused)
            entries += self._mlp(text, number, is_moe=is_moe, fused=fused)
        return entries

    def _attention(self, hf: Any, number: int, *, fused: bool) -> list[Entry]:
        text = hf.get_text_config()
        layer, mcore = f"{self.prefix}.layers.{number}", f"language.decoder.layers.{number}"
        # Transformer Engine fuses a norm into the linear layer that follows it
        norm = "self_attention.linear_qkv.layer_norm_weight" if fused else "input_layernorm.weight"
        theirs, ours = f"{layer}.self_attn", f"{mcore}.self_attention"
        entries = [
            entry(f"{layer}.input_layernorm.weight", f"{mcore}.{norm}", Copy()),
            entry(f"{theirs}.o_proj.weight", f"{ours}.linear_proj.weight", Copy("tp", 1)),
        ]
        if self.norms_queries:
            entries += [
                entry(f"{theirs}.{x}_norm.weight", f"{ours}.{x}_layernorm.weight", Copy()) for x in "qk"
            ]
        if self.attention_output_bias(hf):
            entries.append(entry(f"{theirs}.o_proj.bias", f"{ours}.linear_proj.bias", Copy()))
        qkv = MergeQkv(text.num_key_value_heads, head_dim(text))
        for kind in ("weight", "bias") if self.qkv_bias(text) else ("weight",):
            names = tuple(f"{theirs}.{x}_proj.{kind}" for x in "qkv")
            entries.append(Entry(hf=names, megatron=(f"{ours}.linear_qkv.{kind}",), op=qkv))
        return entries

    def _mlp(self, text: Any, number: int, *, is_moe: bool, fused: bool) -> list[Entry]:
        hf, mcore = f"{self.prefix}.layers.{number}", f"language.decoder.layers.{number}"
        norm = "mlp.linear_fc1.layer_norm_weight" if fused and not is_moe else "pre_mlp_layernorm.weight"
        entries = [entry(f"{hf}.post_attention_layernorm.weight", f"{mcore}.{norm}", Copy())]
        if not is_moe:
            return entries + gated_mlp(f"{hf}.mlp", f"{mcore}.mlp")
        return entries + self.mixture_entries(text, f"{hf}.mlp", f"{mcore}.mlp", fused=fused)

    def mixture_entries(self, text: Any, hf: str, mcore: str, *, fused: bool) -> list[Entry]:
        """Router and experts of a layer."""
        experts = stacked_experts(
            f"{hf}.experts", f"{mcore}.experts", count=self.num_experts(text), fused=fused
        )
        return [entry(f"{hf}.gate.weight", f"{mcore}.router.weight", Copy()), *experts]

    def expert_shapes(self, hf: Any) -> Mapping[str, tuple[int, int]]:
        text = hf.get_text_config()
        if not any(self.mixtures(text)):
            return {}
        hidden, inner = text.hidden_size, text.moe_intermediate_size
        return {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}

    def check_served(self, hf: Any) -> None:
        pattern = self.mixtures(hf.get_text_config())
        if any(pattern) and not all(pattern):  # its Qwen3MoeModel makes every layer a mixture
            raise GspoError(
                f"decoder layer {pattern.index(False)} is dense (mlp_only_layers or decoder_sparse_step of "
                "config.json), which SGLang ignores in a mixture of experts; set rollout.engine=embedded"
            )

    def linear_layers(self, hf: Any) -> Mapping[str, tuple[str, ...]]:
        layers: dict[str, tuple[str, ...]] = {}
        for number, is_moe in enumerate(self.mixtures(hf.get_text_config())):
            ours, servers = f"{self.prefix}.layers.{number}", f"model.layers.{number}"
            attention = f"{ours}.self_attn"
            layers[f"{servers}.self_attn.qkv_proj.weight"] = tuple(
                f"{attention}.{x}_proj.weight" for x in "qkv"
            )
            layers[f"{servers}.self_attn.o_proj.weight"] = (f"{attention}.o_proj.weight",)
            if is_moe:
                experts = f"{ours}.mlp.experts", f"{servers}.mlp.experts"
                layers |= served_experts(*experts, count=self.num_experts(hf.get_text_config()))
            else:
                layers |= served_mlp(f"{ours}.mlp", f"{servers}.mlp")
        return layers

    def linear_dims(self, hf: Any, *, attention: int, mlp: int, experts: int) -> list[ServedDim]:
        text, pattern = hf.get_text_config(), self.mixtures(hf.get_text_config())
        dims = served_attention(text, attention, head_dim=head_dim(text))
        if not all(pattern):
            dims.append(cut_by_tp("intermediate_size", text.intermediate_size, mlp))
        if any(pattern):
            dims.append(cut_by_ep("moe_intermediate_size", text.moe_intermediate_size, experts))
        return dims


class Qwen3(Qwen3Decoder, Family):
    """The Family of both variants; which one is in the config."""

    prefix = "model"
    published_experts = "apart"

    def load_config(self, path: str) -> Any:
        hf = super().load_config(path)
        self.check_decoder(path, hf)
        return hf

    def image_token_id(self, hf: Any) -> int | None:
        return None

    def flops(self, hf: Any) -> FlopModel:
        return self.decoder_flops(hf)

    def weight_map(self, hf: Any, *, padded_vocab: int, fused: bool) -> list[Entry]:
        return self.decoder_entries(hf, padded_vocab=padded_vocab, fused=fused)

    def check_served(self, hf: Any) -> None:
        super().check_served(hf)
        if any(self.mixtures(hf)) and self.is_tied(
            hf
        ):  # its Qwen3MoeForCausalLM has an output layer of its own
            raise GspoError(
                "config.json says tie_word_embeddings=true, which SGLang ignores in a mixture of experts of type "
                f"{hf.model_type}; set rollout.engine=embedded"
            )

    def build_rotary(self, hf: Any) -> torch.nn.Module:
        return Rotary(hf.head_dim, base=hf.rope_parameters["rope_theta"])

    def whole_tensor(self, name: str) -> str | None:
        return name if _WHOLE.search(name) else None


class Rotary(torch.nn.Module):
    """Angles of rotary positions on one axis."""

    inv_freq: torch.Tensor  # [head_dim / 2] float32

    def __init__(self, head_dim: int, *, base: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        self.register_buffer("inv_freq", 1.0 / base**exponents, persistent=False)

    def forward(self, positions_1N: torch.Tensor) -> torch.Tensor:
        """Positions [1, N] -> angles [N, head_dim] float32; the second half repeats the first."""
        return (positions_1N[0, :, None].float() * self.inv_freq).repeat(1, 2)


def head_dim(text: Any) -> int:
    """Size of a head, which some configs leave to the hidden states' width."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
