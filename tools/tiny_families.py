"""What `make_tiny_model.py` makes of each family: the sizes that all share, and what is particular of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# GLM's names of those that its folders have in place of Qwen's; SGLang knows images of this family by them.
GLMS_TOKENS = {
    "<|vision_start|>": "<|begin_of_image|>",
    "<|vision_end|>": "<|end_of_image|>",
    "<|image_pad|>": "<|image|>",
    "<|video_pad|>": "<|video|>",
}


class Family(StrEnum):
    QWEN3_VL_MOE = "qwen3_vl_moe"
    QWEN3_VL = "qwen3_vl"
    QWEN3_MOE = "qwen3_moe"
    QWEN3 = "qwen3"
    QWEN3_5_MOE = "qwen3_5_moe"
    QWEN3_5 = "qwen3_5"
    QWEN2_5_VL = "qwen2_5_vl"
    GLM4V_MOE = "glm4v_moe"
    GPT_OSS = "gpt_oss"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is particular of a family."""

    # what the names of transformers' classes begin with
    classes: str
    # of the config, beside TEXT and TOWER; the tower's are made of the sides of a patch and of an image, in pixels
    text: dict[str, Any]
    vision: Callable[[int, int], dict[str, Any]] | None = None  # None: takes text alone
    patch_size: int = 8
    # how much of a head is turned, and whether the axes' frequencies take turns
    turned: float = 1.0
    interleaved: bool = True
    rope: dict[str, Any] = field(default_factory=dict)  # what else is said of how heads are turned
    # names of transformers' classes that make up its processor, and what they call Qwen's special tokens
    processor: tuple[str, str, str] = ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", "Qwen2VLImageProcessor")
    tokens: dict[str, str] = field(default_factory=dict)
    # what config.json calls the tokens around an image
    around: str = "vision"
    # an image's pixels are counted once for each frame of a patch
    counts_frames: bool = False

    def name_of(self, token: str) -> str:
        """Its name of one of Qwen's special tokens."""
        return self.tokens.get(token, token)


TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-6,
}
TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 128,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "initializer_range": 0.05,
}
# 48 is not hidden/2: then both layouts of gate_up_proj would have equal dims
CHOSEN: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
EXPERTS = {**CHOSEN, "num_experts": 8}
IN_EVERY_LAYER: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
# three of four layers attend linearly
LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
# chosen by sigmoid scores and a bias, behind a dense layer and beside a shared expert
SIGMOID: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "attention_bias": True,
}
# of heads with sinks, every second layer sees a window; experts have biases
SINKS: dict[str, Any] = {
    "intermediate_size": 48,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
}
# as gpt-oss scales positions, from a shorter length
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 128,
}


def _positions(levels: list[int]) -> Callable[[int, int], dict[str, Any]]:
    """Of a tower with DeepStack: SGLang knows exactly three levels; where there are none it must be said."""
    return lambda patch, image: {
        "num_position_embeddings": (image // patch) ** 2,
        "deepstack_visual_indexes": levels,
    }


KINDS = {
    Family.QWEN3_VL_MOE: Kind(
        classes="Qwen3VLMoe", text=EXPERTS | IN_EVERY_LAYER, vision=_positions([0, 1, 2])
    ),
    Family.QWEN3_VL: Kind(classes="Qwen3VL", text={}, vision=_positions([0, 1, 2])),
    Family.QWEN3_MOE: Kind(classes="Qwen3Moe", text=EXPERTS | IN_EVERY_LAYER),
    Family.QWEN3: Kind(classes="Qwen3", text={}),
    Family.QWEN3_5_MOE: Kind(
        classes="Qwen3_5Moe",
        text=EXPERTS | LINEAR | {"shared_expert_intermediate_size": 48},
        vision=_positions([]),
        turned=0.25,
    ),
    Family.QWEN3_5: Kind(classes="Qwen3_5", text=LINEAR, vision=_positions([]), turned=0.25),
    Family.QWEN2_5_VL: Kind(
        classes="Qwen2_5_VL",
        text={},
        # most blocks attend within windows; of pixels SGLang takes patches of 14 x 14 alone
        vision=lambda patch, image: {"window_size": 4 * patch, "fullatt_block_indexes": [1]},
        patch_size=14,
        interleaved=False,
        processor=("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", "Qwen2VLImageProcessor"),
    ),
    Family.GLM4V_MOE: Kind(
        classes="Glm4vMoe",
        text=CHOSEN | SIGMOID,
        vision=lambda patch, image: {"image_size": image},  # that its positions are for
        turned=0.5,
        interleaved=False,
        processor=("Glm4vProcessor", "Glm4vVideoProcessor", "Glm4vImageProcessor"),
        tokens=GLMS_TOKENS,
        around="image",
        counts_frames=True,
    ),
    Family.GPT_OSS: Kind(classes="GptOss", text=SINKS, rope=YARN),
}
