"""Qwen3-VL, dense and mixture of experts (model_type qwen3_vl and qwen3_vl_moe).

Source: transformers' modeling_qwen3_vl_moe.py and modeling_qwen3_vl.py, which the parity tests compare with. What
is particular: DeepStack (features of some vision blocks are added after the first decoder layers), interleaved
multi-axis rotary positions, RMSNorm on queries and keys, routing weights that sum to 1 over the chosen experts.

Left out: videos (their tokens are refused by the model as text without features would be wrong), router losses.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from gspo_mm.families.base import Family
from gspo_mm.families.checks import check_served_rope
from gspo_mm.families.cost import FlopModel, matmul
from gspo_mm.families.operations import Entry
from gspo_mm.families.parts import tower
from gspo_mm.families.qwen3 import Qwen3Decoder
from gspo_mm.types import GspoError

HF_TEXT = "model.language_model"
_HF_VISION = "model.visual"
_WHOLE = re.compile(r"(norm\d?|mlp\.(shared_expert_)?gate|patch_embed\.proj)\.(weight|bias)$")


class QwenImages(Family):
    """Tower and positions that Qwen's families have in common; DeepStack where the config has its levels."""

    box_unit = "thousand"

    def with_vision_flops(self, hf: Any, decoder: FlopModel) -> FlopModel:
        """Of the whole model, from those of decoder and output layer."""
        vision = hf.vision_config
        width = vision.hidden_size
        block = 4 * matmul(width, width) + 2 * matmul(width, vision.intermediate_size)
        merged = width * vision.spatial_merge_size**2
        merger = matmul(merged, merged) + matmul(merged, vision.out_hidden_size)
        return replace(
            decoder,
            patch_embedding=matmul(self.patch_dim(hf), width),
            patch=vision.depth * block,
            patch_pair=vision.depth * 2 * matmul(1, width),
            merged=merger * (1 + self.deepstack_levels(hf)),
            patches_per_token=vision.spatial_merge_size**2,
        )

    def vision_entries(self, hf: Any) -> list[Entry]:
        with torch.device("meta"):
            return tower(_HF_VISION, self.build_vision(hf))

    def deepstack_levels(self, hf: Any) -> int:
        return len(getattr(hf.vision_config, "deepstack_visual_indexes", ()))

    def build_vision(self, hf: Any) -> torch.nn.Module:
        from transformers import AutoModel

        return AutoModel.from_config(hf.vision_config)

    def encode_images(
        self, tower: torch.nn.Module, pixels: torch.Tensor, grid_thw: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        output = tower(pixels, grid_thw=grid_thw)
        return output.pooler_output, getattr(output, "deepstack_features", [])

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
        rope = text.rope_parameters
        turned = int(text.head_dim * rope.get("partial_rotary_factor", 1.0))
        axis = interleaved(rope["mrope_section"], turned // 2)
        return MultiAxisRotary(turned, base=rope["rope_theta"], axis=axis)

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
        return name.replace(f"{HF_TEXT}.", "model.").replace(f"{_HF_VISION}.", "visual.")


class Qwen3VL(Qwen3Decoder, QwenImages):
    """The Family of both variants; which one is in the config."""

    prefix = HF_TEXT
    published_experts = "exchanged"

    def load_config(self, path: str) -> Any:
        hf = super().load_config(path)
        self.check_decoder(path, hf)
        return hf

    def renormalises(self, text: Any) -> bool:
        return True  # transformers does so for this family, whatever norm_topk_prob says

    def check_served(self, hf: Any) -> None:
        super().check_served(hf)
        check_served_rope(hf, interleaved=True)
        # no key of transformers' config, which keeps what the file has all the same
        if any(self.mixtures(hf.text_config)) and getattr(hf.text_config, "norm_topk_prob", True) is not True:
            raise GspoError(
                "text_config.norm_topk_prob of config.json is not true, for which SGLang leaves routing weights as they are, and "
                "transformers has them sum to 1 whatever it says; set it to true, or rollout.engine=embedded"
            )

    def flops(self, hf: Any) -> FlopModel:
        return self.with_vision_flops(hf, self.decoder_flops(hf))

    def weight_map(self, hf: Any, *, padded_vocab: int, fused: bool) -> list[Entry]:
        decoder = self.decoder_entries(hf, padded_vocab=padded_vocab, fused=fused)
        return decoder + self.vision_entries(hf)


class MultiAxisRotary(torch.nn.Module):
    """Angles of multi-axis rotary positions; every frequency turns by the position on one axis."""

    inv_freq: torch.Tensor  # [head_dim / 2] float32
    axis: torch.Tensor  # [head_dim / 2] int64, of every frequency: 0 time, 1 height, 2 width

    def __init__(self, head_dim: int, *, base: float, axis: torch.Tensor) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        self.register_buffer("inv_freq", 1.0 / base**exponents, persistent=False)
        self.register_buffer("axis", axis, persistent=False)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Positions [3, N] -> angles [N, head_dim] float32; the second half repeats the first."""
        positions_NF = position_ids.float()[self.axis].T
        angles_NF = positions_NF * self.inv_freq
        return torch.cat([angles_NF, angles_NF], dim=-1)


def interleaved(section: list[int], count: int) -> torch.Tensor:
    """Axis of each of `count` frequencies, dealt to time, height, width in turn: t h w t h w ... t t.

    megatron-core's own multi-axis embedding splits them into three blocks, which is Qwen2-VL's way.
    """
    axis = torch.zeros(count, dtype=torch.int64)
    for number in (1, 2):
        axis[number : section[number] * 3 : 3] = number
    return axis
