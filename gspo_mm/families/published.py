"""Sizes of published models, for a plan where the checkpoint is not at hand: what their config.json says of size.

From the config.json of each on huggingface.co (Qwen, openai), by lower-case name; suffixes such as -Instruct have the same sizes.
"""

from __future__ import annotations

from typing import Any

_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 2304,
}
_SMALL_VISION = {**_VISION, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096}


def _text(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, **more: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    return sizes | more


def _experts(count: int, inner: int) -> dict[str, int]:
    return {"num_experts": count, "num_experts_per_tok": 8, "moe_intermediate_size": inner}


def _hybrid(key_heads: int, value_heads: int) -> dict[str, Any]:
    return {
        "head_dim": 256,
        "vocab_size": 248320,
        "full_attention_interval": 4,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }


def _vl(
    kind: str, text: dict[str, Any], vision: dict[str, Any], levels: list[int], *, tied: bool = False
) -> Any:
    out = {"out_hidden_size": text["hidden_size"], "deepstack_visual_indexes": levels}
    return {
        "model_type": kind,
        "tie_word_embeddings": tied,
        "text_config": text,
        "vision_config": vision | out,
    }


def _windowed(layers: int, experts: int) -> dict[str, Any]:
    """gpt-oss: every second layer sees a window of tokens."""
    return {
        "model_type": "gpt_oss",
        **_text(2880, layers, 64, 8, 2880),
        "head_dim": 64,
        "vocab_size": 201088,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
    }


_30B = _text(2048, 48, 32, 4, 6144, **_experts(128, 768))
_235B = _text(4096, 94, 64, 4, 12288, **_experts(128, 1536))
_8B = _text(4096, 36, 32, 8, 12288)
_35B = _text(
    2048, 40, 16, 2, 0, **(_hybrid(16, 32) | _experts(256, 512)), shared_expert_intermediate_size=512
)

NAMES: dict[str, Any] = {
    "qwen3-8b": {"model_type": "qwen3", **_8B},
    "qwen3-32b": {"model_type": "qwen3", **_text(5120, 64, 64, 8, 25600)},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", **_30B},
    "qwen3-235b-a22b": {"model_type": "qwen3_moe", **_235B},
    "qwen3-vl-4b": _vl("qwen3_vl", _text(2560, 36, 32, 8, 9728), _SMALL_VISION, [5, 11, 17], tied=True),
    "qwen3-vl-8b": _vl("qwen3_vl", _8B, _VISION, [8, 16, 24]),
    "qwen3-vl-32b": _vl("qwen3_vl", _text(5120, 64, 64, 8, 25600), _VISION, [8, 16, 24]),
    "qwen3-vl-30b-a3b": _vl("qwen3_vl_moe", _30B, _VISION, [8, 16, 24]),
    "qwen3-vl-235b-a22b": _vl("qwen3_vl_moe", _235B, _VISION, [8, 16, 24]),
    "qwen3.5-9b": _vl("qwen3_5", _text(4096, 32, 16, 4, 12288, **_hybrid(16, 32)), _VISION, []),
    "qwen3.5-27b": _vl("qwen3_5", _text(5120, 64, 24, 4, 17408, **_hybrid(16, 48)), _VISION, []),
    "qwen3.5-35b-a3b": _vl("qwen3_5_moe", _35B, _VISION, []),
    "qwen3.6-35b-a3b": _vl("qwen3_5_moe", _35B, _VISION, []),
    "gpt-oss-20b": _windowed(24, 32),
    "gpt-oss-120b": _windowed(36, 128),
}
# with the suffixes of their variants
PUBLISHED: dict[str, Any] = NAMES | {
    f"{name}-{kind}": sizes
    for name, sizes in NAMES.items()
    for kind in (("instruct", "thinking") if "-vl-" in name or "a3b" in name or "a22b" in name else ("base",))
}
