"""A model family made only here, unlike Qwen's: LayerNorms, biases everywhere, no gates, positions on one axis, images of
one size through another tower, nothing of DeepStack. All that the package would need for it is a row in `table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import AutoModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from gspo_mm.families.base import Family
from gspo_mm.families.cost import FlopModel
from gspo_mm.families.operations import Copy, Entry, MergeQkv, VocabPad

HF, OURS = "model.language_model", "language.decoder"


class ToyFamily(Family):
    """LLaVA with a StarCoder2 decoder and a SigLIP tower."""

    def flops(self, hf: Any) -> FlopModel:
        text, tower, blocks = hf.text_config, hf.vision_config.hidden_size, hf.vision_config.num_hidden_layers
        hidden, layers = text.hidden_size, text.num_hidden_layers
        kept = hidden + hidden * text.num_key_value_heads // text.num_attention_heads
        token, merged = 4 * layers * hidden * (kept + text.intermediate_size), 2 * (tower + hidden) * hidden
        patches = {"patch_embedding": 2 * self.patch_dim(hf) * tower, "patch": blocks * 24 * tower**2}
        patches |= {"patch_pair": 4 * blocks * tower, "merged": merged, "patches_per_token": 1}
        row = 2 * hidden * text.vocab_size
        return FlopModel(token=token, router=0, pair=4 * layers * hidden, row=row, **patches)

    def transformer_arguments(self, hf: Any) -> dict[str, Any]:
        text = hf.text_config
        return {
            "num_layers": text.num_hidden_layers,
            "hidden_size": text.hidden_size,
            "ffn_hidden_size": text.intermediate_size,
            "num_attention_heads": text.num_attention_heads,
            "num_query_groups": text.num_key_value_heads,
            "kv_channels": text.hidden_size // text.num_attention_heads,
            "layernorm_epsilon": text.norm_epsilon,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "add_qkv_bias": True,
            "gated_linear_unit": False,
            "activation_func": partial(torch.nn.functional.gelu, approximate="tanh"),
        }

    def weight_map(self, hf: Any, *, padded_vocab: int, fused: bool) -> list[Entry]:
        text, whole, rows, columns = hf.text_config, Copy(), Copy("tp"), Copy("tp", 1)
        vocab = VocabPad(text.vocab_size, padded_vocab)
        entries = [
            one(f"{HF}.embed_tokens.weight", "language.embedding.word_embeddings.weight", vocab),
            one("lm_head.weight", "language.output_layer.weight", vocab),
            *both(f"{HF}.norm", f"{OURS}.final_layernorm", whole, whole),
        ]
        qkv = MergeQkv(text.num_key_value_heads, text.hidden_size // text.num_attention_heads)
        for number in range(text.num_hidden_layers):
            theirs, ours = f"{HF}.layers.{number}", f"{OURS}.layers.{number}"
            entries += [
                *both(f"{theirs}.input_layernorm", f"{ours}.input_layernorm", whole, whole),
                *both(f"{theirs}.post_attention_layernorm", f"{ours}.pre_mlp_layernorm", whole, whole),
                *both(f"{theirs}.self_attn.o_proj", f"{ours}.self_attention.linear_proj", columns, whole),
                *both(f"{theirs}.mlp.c_fc", f"{ours}.mlp.linear_fc1", rows, rows),
                *both(f"{theirs}.mlp.c_proj", f"{ours}.mlp.linear_fc2", columns, whole),
            ]
            for kind in ("weight", "bias"):
                names = tuple(f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv")
                entries.append(
                    Entry(hf=names, megatron=(f"{ours}.self_attention.linear_qkv.{kind}",), op=qkv)
                )
        with torch.device("meta"):
            tower = self.build_vision(hf)
        return [*entries, *(one(f"model.{name}", f"visual.{name}", whole) for name in tower.state_dict())]

    def build_rotary(self, hf: Any) -> torch.nn.Module:
        text = hf.text_config
        return Rotary(text.hidden_size // text.num_attention_heads, text.rope_parameters["rope_theta"])

    def build_vision(self, hf: Any) -> torch.nn.Module:
        return Tower(hf)

    def encode_images(
        self, tower: torch.nn.Module, pixels: torch.Tensor, grid_thw: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return tower(self.hf_inputs(tower.hf, pixels, grid_thw)["pixel_values"]).flatten(0, 1), []

    def tokens_per_image(self, hf: Any, grid_thw: torch.Tensor) -> list[int]:
        return grid_thw.prod(-1).tolist()

    def patch_dim(self, hf: Any) -> int:
        return 3 * hf.vision_config.patch_size**2

    def grid_of(self, hf: Any, rows: int, columns: int) -> tuple[int, int, int]:
        side = hf.vision_config.image_size // hf.vision_config.patch_size
        return 1, side, side

    def image_grid(self, hf: Any, image_processor: Any, height: int, width: int) -> tuple[int, int, int]:
        return self.grid_of(hf, 0, 0)

    def images_of(
        self, hf: Any, inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if (pixels := inputs.get("pixel_values")) is None:
            return None, None
        size = hf.vision_config.patch_size
        patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
        return patches.reshape(-1, self.patch_dim(hf)), torch.tensor([self.grid_of(hf, 0, 0)] * len(pixels))

    def hf_inputs(self, hf: Any, patches: torch.Tensor, grids: torch.Tensor) -> dict[str, torch.Tensor]:
        (_, h, w), size = self.grid_of(hf, 0, 0), hf.vision_config.patch_size
        images = patches.view(len(grids), h, w, 3, size, size).permute(0, 3, 1, 4, 2, 5)
        return {"pixel_values": images.reshape(len(grids), 3, h * size, w * size)}


class Tower(torch.nn.Module):
    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        self.vision_tower = AutoModel.from_config(hf.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(hf)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        states = self.vision_tower(images, output_hidden_states=True).hidden_states
        return self.multi_modal_projector(states[self.hf.vision_feature_layer])


class Rotary(torch.nn.Module):
    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim, base

    def forward(self, positions_1N: torch.Tensor) -> torch.Tensor:
        exponents = torch.arange(0, self.head_dim, 2, device=positions_1N.device) / self.head_dim
        return (positions_1N[0, :, None] / self.base**exponents).repeat(1, 2)


def one(hf: str, megatron: str, op: Any) -> Entry:
    return Entry(hf=(hf,), megatron=(megatron,), op=op)


def both(hf: str, megatron: str, weight: Any, bias: Any) -> list[Entry]:
    return [one(f"{hf}.{k}", f"{megatron}.{k}", op) for k, op in (("weight", weight), ("bias", bias))]
