"""Qwen3-VL, dense and mixture of experts (model_type qwen3_vl and qwen3_vl_moe).

Source: transformers' modeling_qwen3_vl_moe.py and modeling_qwen3_vl.py, which the parity tests compare with. What
is particular: DeepStack (features of some vision blocks are added after the first decoder layers), interleaved
multi-axis rotary positions, RMSNorm on queries and keys, routing weights that sum to 1 over the chosen experts.

Left out: videos (their tokens are refused by the model as text without features would be wrong), router losses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from gspo_mm.families.base import (
    Copy,
    Entry,
    Family,
    MergeGateUp,
    MergeQkv,
    ServedDim,
    StackExperts,
    VocabPad,
)
from gspo_mm.families.cost import FlopModel
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.types import GspoError

_HF_TEXT = "model.language_model"
_HF_VISION = "model.visual"
_WHOLE = re.compile(r"(norm\d?|mlp\.gate|patch_embed\.proj)\.(weight|bias)$")


class Qwen3VL(Family):
    """The Family of both variants; which one is in the config."""

    def load_config(self, path: str) -> Any:
        hf = super().load_config(path)
        text = hf.text_config
        if text.hidden_act != "silu":
            raise HfFolderError(
                f"{path}: text_config.hidden_act={text.hidden_act!r} is not supported; use 'silu'"
            )
        kind = text.rope_parameters.get("rope_type", "default")
        if kind != "default":
            raise HfFolderError(f"{path}: rope_type={kind!r} is not supported; use 'default'")
        if any(moe_layers(text)) and not 2 <= text.num_experts_per_tok <= text.num_experts:
            raise HfFolderError(
                f"{path}: text_config.num_experts_per_tok={text.num_experts_per_tok} with num_experts={text.num_experts} "
                "is not supported: routing weights sum to 1 over the chosen experts, so that a single one leaves the "
                f"router untrained; use a model with 2 to {text.num_experts} experts per token"
            )
        return hf

    def flops(self, hf: Any) -> FlopModel:
        text, mixtures = hf.text_config, sum(moe_layers(hf.text_config))
        hidden = text.hidden_size
        queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
        attention = _matmul(hidden, queries) + 2 * _matmul(hidden, keys) + _matmul(queries, hidden)
        experts = (
            text.num_experts_per_tok * 3 * _matmul(hidden, text.moe_intermediate_size) if mixtures else 0
        )
        dense = 3 * _matmul(hidden, text.intermediate_size)  # gate, up, down
        return replace(
            self.vision_flops(hf),
            token=text.num_hidden_layers * attention
            + mixtures * experts
            + (text.num_hidden_layers - mixtures) * dense,
            router=mixtures * _matmul(hidden, text.num_experts) if mixtures else 0,
            pair=text.num_hidden_layers * 2 * _matmul(1, queries),
            row=_matmul(hidden, text.vocab_size),
        )

    def vision_flops(self, hf: Any) -> FlopModel:
        """The tower's part; the decoder's is 0."""
        vision = hf.vision_config
        tower = vision.hidden_size
        block = 4 * _matmul(tower, tower) + 2 * _matmul(tower, vision.intermediate_size)
        merged = tower * vision.spatial_merge_size**2
        merger = _matmul(merged, merged) + _matmul(merged, vision.out_hidden_size)
        return FlopModel(
            token=0,
            router=0,
            pair=0,
            row=0,
            patch_embedding=_matmul(self.patch_dim(hf), tower),
            patch=vision.depth * block,
            patch_pair=vision.depth * 2 * _matmul(1, tower),
            merged=merger * (1 + self.deepstack_levels(hf)),
            patches_per_token=vision.spatial_merge_size**2,
        )

    def transformer_arguments(self, hf: Any) -> dict[str, Any]:
        text = hf.text_config
        arguments: dict[str, Any] = {
            "num_layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "ffn_hidden_size": text.intermediate_size,
            "num_attention_heads": text.num_attention_heads,
            "num_query_groups": text.num_key_value_heads,
            "kv_channels": text.head_dim,
            "layernorm_epsilon": text.rms_norm_eps,
            "add_qkv_bias": bool(text.attention_bias),
            "attention_dropout": text.attention_dropout,
            "hidden_dropout": 0.0,
            "normalization": "RMSNorm",
            "qk_layernorm": True,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
        }
        pattern = moe_layers(text)
        if any(pattern):
            arguments |= {
                "num_moe_experts": text.num_experts,
                "moe_router_topk": text.num_experts_per_tok,
                "moe_ffn_hidden_size": text.moe_intermediate_size,
                "moe_layer_freq": [int(is_moe) for is_moe in pattern],
                # softmax after top-k: equal to softmax over all, then renormalised over the chosen ones, which
                # transformers does for this family whatever norm_topk_prob says
                "moe_router_pre_softmax": False,
            }
        return arguments

    def weight_map(self, hf: Any, *, padded_vocab: int, fused: bool) -> list[Entry]:
        text = hf.text_config
        vocab = VocabPad(text.vocab_size, padded_vocab)
        entries = [
            _entry(f"{_HF_TEXT}.embed_tokens.weight", "language.embedding.word_embeddings.weight", vocab),
            _entry(f"{_HF_TEXT}.norm.weight", "language.decoder.final_layernorm.weight", Copy()),
        ]
        if not self.is_tied(hf):
            entries.append(_entry("lm_head.weight", "language.output_layer.weight", vocab))
        for number, is_moe in enumerate(moe_layers(text)):
            entries += _layer(text, number, is_moe=is_moe, fused=fused)
        with torch.device("meta"):
            tower = self.build_vision(hf)
        entries += [_entry(f"{_HF_VISION}.{name}", f"visual.{name}", Copy()) for name in tower.state_dict()]
        return entries

    def expert_shapes(self, hf: Any) -> Mapping[str, tuple[int, int]]:
        text = hf.text_config
        if not any(moe_layers(text)):
            return {}
        hidden, inner = text.hidden_size, text.moe_intermediate_size
        return {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}

    def check_served(self, hf: Any) -> None:
        pattern = moe_layers(hf.text_config)
        if any(pattern) and not all(pattern):  # its Qwen3MoeModel makes every layer a mixture
            raise GspoError(
                f"decoder layer {pattern.index(False)} is dense (mlp_only_layers or decoder_sparse_step of "
                "config.json), which SGLang ignores in a mixture of experts; set rollout.engine=embedded"
            )

    def linear_layers(self, hf: Any) -> Mapping[str, tuple[str, ...]]:
        layers: dict[str, tuple[str, ...]] = {}
        for number, is_moe in enumerate(moe_layers(hf.text_config)):
            ours, servers = f"{_HF_TEXT}.layers.{number}", f"model.layers.{number}"
            attention = f"{ours}.self_attn"
            layers[f"{servers}.self_attn.qkv_proj.weight"] = tuple(
                f"{attention}.{x}_proj.weight" for x in "qkv"
            )
            layers[f"{servers}.self_attn.o_proj.weight"] = (f"{attention}.o_proj.weight",)
            if is_moe:
                experts = [f"{ours}.mlp.experts.{e}" for e in range(hf.text_config.num_experts)]
                gate_up = tuple(f"{e}.{x}_proj.weight" for e in experts for x in ("gate", "up"))
                layers[f"{servers}.mlp.experts.w13_weight"] = gate_up
                layers[f"{servers}.mlp.experts.w2_weight"] = tuple(f"{e}.down_proj.weight" for e in experts)
            else:
                gate_up = tuple(f"{ours}.mlp.{x}_proj.weight" for x in ("gate", "up"))
                layers[f"{servers}.mlp.gate_up_proj.weight"] = gate_up
                layers[f"{servers}.mlp.down_proj.weight"] = (f"{ours}.mlp.down_proj.weight",)
        return layers

    def linear_dims(self, hf: Any, *, attention: int, mlp: int, experts: int) -> list[ServedDim]:
        text, pattern = hf.text_config, moe_layers(hf.text_config)
        heads, groups, head_dim = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        dims = [
            ServedDim(name="hidden_size", size=text.hidden_size, ways=1),
            ServedDim(
                name="num_attention_heads*head_dim",
                size=heads * head_dim,
                ways=attention,
                relief="lower rollout.sglang.tp",
            ),
            # more GPUs than groups: each group is held by several, whole
            ServedDim(
                name="num_key_value_heads*head_dim",
                size=groups * head_dim,
                ways=min(attention, groups),
                relief="lower rollout.sglang.tp",
            ),
        ]
        if not all(pattern):
            dense = text.intermediate_size
            dims.append(
                ServedDim(name="intermediate_size", size=dense, ways=mlp, relief="lower rollout.sglang.tp")
            )
        if any(pattern):
            inner = text.moe_intermediate_size
            dims.append(
                ServedDim(
                    name="moe_intermediate_size", size=inner, ways=experts, relief="raise rollout.sglang.ep"
                )
            )
        return dims

    def deepstack_levels(self, hf: Any) -> int:
        return len(hf.vision_config.deepstack_visual_indexes)

    def build_vision(self, hf: Any) -> torch.nn.Module:
        from transformers import AutoModel

        return AutoModel.from_config(hf.vision_config)

    def encode_images(
        self, tower: torch.nn.Module, pixels: torch.Tensor, grid_thw: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        output = tower(pixels, grid_thw=grid_thw)
        return output.pooler_output, output.deepstack_features

    def tokens_per_image(self, hf: Any, grid_thw: torch.Tensor) -> list[int]:
        return (grid_thw.prod(-1) // hf.vision_config.spatial_merge_size**2).tolist()

    def patch_dim(self, hf: Any) -> int:
        vision = hf.vision_config
        return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    def grid_of(self, hf: Any, rows: int, columns: int) -> tuple[int, int, int]:
        merge = hf.vision_config.spatial_merge_size
        return 1, merge * rows, merge * columns

    def build_rotary(self, hf: Any) -> torch.nn.Module:
        text = hf.text_config
        return InterleavedRotary(
            text.head_dim,
            base=text.rope_parameters["rope_theta"],
            section=text.rope_parameters["mrope_section"],
        )

    def part_of(self, name: str) -> str:
        is_merger = name.startswith("visual.") and "merger" in name.split(".")[1]
        return "projector" if is_merger else super().part_of(name)

    def positions(self, hf: Any, token_ids: torch.Tensor, grids: torch.Tensor | None) -> torch.Tensor:
        """Three axes: time, height, width.

        Text counts on, equal on all axes. An image starts where the text before it ended; its tokens share that
        time and count rows and columns from there; the text behind it starts after the larger of the two.
        Source: Qwen3VLMoeModel.get_rope_index in transformers.
        """
        is_image, merge = token_ids == hf.image_token_id, hf.vision_config.spatial_merge_size
        pieces: list[torch.Tensor] = []
        position, begin = 0, 0
        for t, h, w in [] if grids is None else grids.tolist():
            rows, columns = h // merge, w // merge
            start = begin + int(is_image[begin:].int().argmax())
            pieces.append(torch.arange(position, position + start - begin).expand(3, -1))
            position += start - begin
            axes = torch.meshgrid(torch.arange(t), torch.arange(rows), torch.arange(columns), indexing="ij")
            pieces.append(torch.stack(axes).reshape(3, -1) + position)
            position += max(rows, columns)
            begin = start + t * rows * columns
        pieces.append(torch.arange(position, position + len(token_ids) - begin).expand(3, -1))
        return torch.cat(pieces, dim=1)

    def whole_tensor(self, name: str) -> str | None:
        if not _WHOLE.search(name):
            return None
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


class InterleavedRotary(torch.nn.Module):
    """Angles of multi-axis rotary positions, frequencies dealt to time, height, width in turn: t h w t h w ... t t.

    megatron-core's own multi-axis embedding splits them into three blocks, which is Qwen2-VL's way.
    """

    inv_freq: torch.Tensor  # [head_dim / 2] float32
    axis: torch.Tensor  # [head_dim / 2] int64, of every frequency: 0 time, 1 height, 2 width

    def __init__(self, head_dim: int, *, base: float, section: list[int]) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        self.register_buffer("inv_freq", 1.0 / base**exponents, persistent=False)
        axis = torch.zeros(head_dim // 2, dtype=torch.int64)
        for number in (1, 2):
            axis[number : section[number] * 3 : 3] = number
        self.register_buffer("axis", axis, persistent=False)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Positions [3, N] -> angles [N, head_dim] float32; the second half repeats the first."""
        positions_NF = position_ids.float()[self.axis].T
        angles_NF = positions_NF * self.inv_freq
        return torch.cat([angles_NF, angles_NF], dim=-1)


def moe_layers(text: Any) -> list[bool]:
    """Which decoder layers are mixtures of experts."""
    if not getattr(text, "num_experts", 0):
        return [False] * text.num_hidden_layers
    dense, step = getattr(text, "mlp_only_layers", ()), getattr(text, "decoder_sparse_step", 1)
    return [number not in dense and (number + 1) % step == 0 for number in range(text.num_hidden_layers)]


def _matmul(inner: int, outer: int) -> int:
    """FLOPs of one row [inner] times a matrix [inner, outer]."""
    return 2 * inner * outer


def _entry(hf: str, megatron: str, op: Any) -> Entry:
    return Entry(hf=(hf,), megatron=(megatron,), op=op)


def _layer(text: Any, number: int, *, is_moe: bool, fused: bool) -> list[Entry]:
    hf, mcore = f"{_HF_TEXT}.layers.{number}", f"language.decoder.layers.{number}"
    # Transformer Engine fuses a norm into the linear layer that follows it
    input_norm = "self_attention.linear_qkv.layer_norm_weight" if fused else "input_layernorm.weight"
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if fused and not is_moe else "pre_mlp_layernorm.weight"
    qkv = MergeQkv(text.num_key_value_heads, text.head_dim)
    entries = [
        _entry(f"{hf}.input_layernorm.weight", f"{mcore}.{input_norm}", Copy()),
        _entry(f"{hf}.post_attention_layernorm.weight", f"{mcore}.{mlp_norm}", Copy()),
        _entry(f"{hf}.self_attn.q_norm.weight", f"{mcore}.self_attention.q_layernorm.weight", Copy()),
        _entry(f"{hf}.self_attn.k_norm.weight", f"{mcore}.self_attention.k_layernorm.weight", Copy()),
        _entry(f"{hf}.self_attn.o_proj.weight", f"{mcore}.self_attention.linear_proj.weight", Copy("tp", 1)),
    ]
    if text.attention_bias:
        entries.append(
            _entry(f"{hf}.self_attn.o_proj.bias", f"{mcore}.self_attention.linear_proj.bias", Copy())
        )
    for kind in ("weight", "bias") if text.attention_bias else ("weight",):
        names = tuple(f"{hf}.self_attn.{x}_proj.{kind}" for x in "qkv")
        entries.append(Entry(hf=names, megatron=(f"{mcore}.self_attention.linear_qkv.{kind}",), op=qkv))
    if is_moe:
        entries.append(_entry(f"{hf}.mlp.gate.weight", f"{mcore}.mlp.router.weight", Copy()))
        for hf_name, linear in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
            experts = tuple(
                f"{mcore}.mlp.experts.{linear}.weight{e}"
                if fused
                else f"{mcore}.mlp.experts.local_experts.{e}.{linear}.weight"
                for e in range(text.num_experts)
            )
            op = StackExperts(gated=linear == "linear_fc1")
            entries.append(Entry(hf=(f"{hf}.mlp.experts.{hf_name}",), megatron=experts, op=op))
    else:
        gate_up = (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight")
        entries.append(Entry(hf=gate_up, megatron=(f"{mcore}.mlp.linear_fc1.weight",), op=MergeGateUp()))
        entries.append(_entry(f"{hf}.mlp.down_proj.weight", f"{mcore}.mlp.linear_fc2.weight", Copy("tp", 1)))
    return entries
