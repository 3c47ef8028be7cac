"""Qwen2.5-VL (model_type qwen2_5_vl): dense, with images.

Source: transformers' modeling_qwen2_5_vl.py, which the parity tests compare with. What is particular: biases on queries, keys
and values and none on the output, no norm of queries and keys, rotary frequencies in three blocks (time, height, width), a
tower whose blocks attend within windows but for a few (fullatt_block_indexes), and published names from before
transformers moved the decoder to `model.language_model`.

Left out: videos, sliding windows and rotary scaling, which are refused by name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from gspo_mm.families.checks import check_served_rope
from gspo_mm.families.cost import FlopModel, matmul
from gspo_mm.families.names import Prefixes
from gspo_mm.families.operations import Entry
from gspo_mm.families.qwen3 import Qwen3Decoder, head_dim
from gspo_mm.families.qwen3_vl import MultiAxisRotary, QwenImages
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.types import GspoError

_WHOLE = re.compile(r"(norm\d?|ln_q|patch_embed\.proj)\.weight$")
_SERVED_PATCH = 1176  # numbers of a patch that SGLang takes for pixels: 3 colours, 2 frames, 14 x 14


class Qwen25VL(Qwen3Decoder, QwenImages):
    prefix = "model.language_model"
    prefixes = Prefixes((("model.visual.", "visual."), ("model.language_model.", "model.")))
    norms_queries = False
    box_unit = "pixels"
    # as of GLM: SGLang looks for shards of attn.qkv_proj, and the folder has attn.qkv
    kept_by_servers = ("visual",)

    def load_config(self, path: str) -> Any:
        hf = super().load_config(path)
        self.check_decoder(path, hf)
        text = hf.text_config
        if text.hidden_size % text.num_attention_heads:
            raise HfFolderError(
                f"{path}: hidden_size={text.hidden_size} is no multiple of num_attention_heads={text.num_attention_heads}; "
                "use the config.json of these weights"
            )
        section, half = _section(text), head_dim(text) // 2
        if len(section) != 3 or sum(section) != half:
            raise HfFolderError(
                f"{path}: mrope_section={section} of rope_parameters (or rope_scaling) is not supported; use three numbers "
                f"that sum to {half}, half the size of a head"
            )
        return hf

    def qkv_bias(self, text: Any) -> bool:
        return True

    def attention_output_bias(self, hf: Any) -> bool:
        return False

    def flops(self, hf: Any) -> FlopModel:
        """Windows are counted as whole ones: an image's edge may have smaller ones."""
        whole, vision = self.with_vision_flops(hf, self.decoder_flops(hf)), hf.vision_config
        width, attending = vision.hidden_size, len(_full_blocks(vision))
        merge = vision.spatial_merge_size
        side = vision.window_size // merge // vision.patch_size * merge
        pair = 2 * matmul(1, width)
        gate = matmul(width, vision.intermediate_size)
        return replace(
            whole,
            patch=whole.patch + vision.depth * gate + (vision.depth - attending) * pair * side**2,
            patch_pair=attending * pair,
        )

    def weight_map(self, hf: Any, *, padded_vocab: int, fused: bool) -> list[Entry]:
        decoder = self.decoder_entries(hf, padded_vocab=padded_vocab, fused=fused)
        return decoder + self.vision_entries(hf)

    def build_rotary(self, hf: Any) -> torch.nn.Module:
        text = hf.text_config
        axis = torch.tensor([axis for axis, count in enumerate(_section(text)) for _ in range(count)])
        return MultiAxisRotary(head_dim(text), base=text.rope_parameters["rope_theta"], axis=axis)

    def check_served(self, hf: Any) -> None:
        check_served_rope(hf, interleaved=False)
        size, width = self.patch_dim(hf), hf.vision_config.hidden_size
        if (
            size != _SERVED_PATCH or width == size
        ):  # its get_image_feature takes pixels for features otherwise
            raise GspoError(
                f"vision_config of config.json makes patches of {size} numbers (patch_size, temporal_patch_size, in_channels) "
                f"and hidden_size={width}; SGLang encodes patches of {_SERVED_PATCH} alone, in a tower of another width: "
                "set rollout.engine=embedded"
            )

    def whole_tensor(self, name: str) -> str | None:
        return self.prefixes.published(name) if _WHOLE.search(name) else None


def _section(text: Any) -> list[int]:
    """Frequencies of time, height and width."""
    return list(text.rope_parameters.get("mrope_section", (16, 24, 24)))  # transformers' default


def _full_blocks(vision: Any) -> set[int]:
    """The tower's blocks in which all patches of a frame see each other."""
    return set(vision.fullatt_block_indexes) & set(range(vision.depth))
