"""Random models of a few thousand parameters, for tests that compare with transformers: Qwen3-VL(-MoE), and Qwen3(-MoE) that
takes text alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}


# widths that FP8 kernels take: multiples of 128
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 384,  # half the hidden size would make both layouts of experts equal in shape
    "head_dim": 64,
    "num_hidden_layers": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [16, 8, 8],
        "mrope_interleaved": True,
    },
}


def wide_vl(*, moe: bool = True, vision: Any = None, **text: Any) -> Any:
    """Of these widths, with weights of the size that real models have, 0.02: larger ones amplify what BF16 rounds.

    Experts are few: their weights are what a test costs.
    """
    experts = {"num_experts": 4} if moe else {}
    model = tiny_vl(moe=moe, vision=vision, **{**WIDE, **experts, **text})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2)
    return model


def tiny_vl(*, moe: bool = True, vision: Any = None, **text: Any) -> Any:
    """transformers' model in float32 with weights that hide no fault: no norm is 1, no bias 0."""
    kind = "Qwen3VLMoe" if moe else "Qwen3VL"
    return _tiny(kind, {**TEXT, **(EXPERTS if moe else {}), **text}, {**VISION, **(vision or {})})


def _tiny(kind: str, text: dict[str, Any], vision: dict[str, Any], *, around: str = "vision") -> Any:
    tied, seed = text.pop("tied", False), text.pop("seed", 0)
    last = text["vocab_size"]
    config = getattr(transformers, f"{kind}Config")(
        text_config={**text, "tie_word_embeddings": tied},
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        image_token_id=last - 4,
        video_token_id=last - 3,
        **{f"{around}_start_token_id": last - 2, f"{around}_end_token_id": last - 1},
        tie_word_embeddings=tied,
        dtype="float32",
    )
    return _with_weights(getattr(transformers, f"{kind}ForConditionalGeneration"), config, seed)


def tiny_text(*, moe: bool = True, tied: bool = False, seed: int = 0, **text: Any) -> Any:
    """As `tiny_vl`, without images."""
    kind = "Qwen3Moe" if moe else "Qwen3"
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    values = {**TEXT, **(EXPERTS if moe else {}), "rope_parameters": rope, **text}
    config = getattr(transformers, f"{kind}Config")(**values, tie_word_embeddings=tied, dtype="float32")
    return _with_weights(getattr(transformers, f"{kind}ForCausalLM"), config, seed)


_STRONG = ("mlp.gate.weight", "mlp.router.weight", "conv1d.weight")


def _with_weights(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if name.endswith(_STRONG) else 0.1))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


LINEAR: dict[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # a first token whose query and key are nearly orthogonal leaves almost nothing, of which the norm keeps the rounding alone
    "rms_norm_eps": 1e-3,
    "head_dim": 32,
    "rope_parameters": {**TEXT["rope_parameters"], "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
}


def tiny_hybrid(*, moe: bool = True, vision: Any = None, **text: Any) -> Any:
    """As `tiny_vl`, of the family that attends linearly in three of four layers."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    shared = {"shared_expert_intermediate_size": 40}
    interval = text.get("full_attention_interval", 4)
    model = _tiny(
        "Qwen3_5Moe" if moe else "Qwen3_5",
        {**TEXT, **LINEAR, **(experts | shared if moe else {}), **text},
        {**VISION, "deepstack_visual_indexes": [], **(vision or {})},
    )
    model.config.text_config.full_attention_interval = interval  # as published folders have it
    return model


WINDOWS: dict[str, Any] = {
    **{k: v for k, v in VISION.items() if k not in ("deepstack_visual_indexes", "num_position_embeddings")},
    "window_size": 16,  # pixels: 4 x 4 patches
    "fullatt_block_indexes": [1],
}


def tiny_windows(*, vision: Any = None, **text: Any) -> Any:
    """As `tiny_vl`, of the family whose tower attends within windows, and whose rotary frequencies come in blocks."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    values = {k: v for k, v in TEXT.items() if k != "head_dim"}
    return _tiny("Qwen2_5_VL", {**values, "rope_parameters": rope, **text}, {**WINDOWS, **(vision or {})})


SIGMOID: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "attention_bias": True,
}
HALF_TURNED: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [1, 2, 1],
    "partial_rotary_factor": 0.5,
}


SIGMOID_MODELS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid, tied, two groups of four, odd vocabulary": {
        "tied": True,
        "vocab_size": 277,
        "num_key_value_heads": 1,
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 5,
        "n_shared_experts": 2,
    },
    "sigmoid, one expert a token, all layers mixtures, no biases": {
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "attention_bias": False,
        "vision": {"attention_bias": True, "image_size": 20},
    },
    "sigmoid, odd widths, two dense layers, other angles": {
        "hidden_size": 60,
        "intermediate_size": 100,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 24,
        "first_k_dense_replace": 2,
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 3,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 30,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [4, 2, 3],
            "partial_rotary_factor": 0.75,
        },
        "vision": {"depth": 2, "intermediate_size": 44, "spatial_merge_size": 3},
    },
    "sigmoid, no layer is a mixture": {"first_k_dense_replace": 4},
}


def tiny_glm(*, vision: Any = None, **text: Any) -> Any:
    """As `tiny_vl`, of the family that chooses experts by sigmoid scores and a bias."""
    left_out = ("deepstack_visual_indexes", "num_position_embeddings")
    seen = {k: v for k, v in VISION.items() if k not in left_out} | {"image_size": 32}
    values = {**TEXT, **SIGMOID, "rope_parameters": HALF_TURNED, **text}
    return _tiny("Glm4vMoe", values, {**seen, **(vision or {})}, around="image")


SINKS: dict[str, Any] = {
    **{k: v for k, v in TEXT.items() if k != "rope_parameters"},
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "swiglu_limit": 1.0,  # reached by some of random weights
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}
SINK_MODELS: dict[str, dict[str, Any]] = {
    "sinks": {},
    "sinks, tied, one key group, odd vocabulary, whole correction range": {
        "tied": True,
        "num_key_value_heads": 1,
        "vocab_size": 277,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "rope_parameters": {**SINKS["rope_parameters"], "truncate": True, "factor": 32.0},
    },
    "sinks, no windows, angles not scaled, bounds that nothing reaches": {
        "layer_types": ["full_attention"] * 4,
        "num_key_value_heads": 4,
        "swiglu_limit": 1e4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    },
    "sinks, odd widths, windows of one token and in a row": {
        "hidden_size": 60,
        "intermediate_size": 42,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 24,
        "sliding_window": 1,
        "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"],
        "num_local_experts": 3,
        "rms_norm_eps": 1e-3,
    },
    "sinks, windows in every layer, every expert": {
        "layer_types": ["sliding_attention"] * 4,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
    },
}


def tiny_sinks(*, tied: bool = False, seed: int = 0, **values: Any) -> Any:
    """As `tiny_text`, of the family whose heads have sinks, and whose layers see windows in turn."""
    config = transformers.GptOssConfig(**{**SINKS, **values}, tie_word_embeddings=tied, dtype="float32")
    return _with_weights(transformers.GptOssForCausalLM, config, seed)


def made_of_blocks(kind: str) -> Any:
    """A model whose decoder's matrices are whole blocks of 128, so that they can be in FP8: see `IN_BLOCKS`."""
    wide: dict[str, Any] = {"hidden_size": 256, "head_dim": 64}
    rope = WIDE["rope_parameters"]
    match kind:
        case "hybrid":
            inner: dict[str, Any] = {
                "num_experts": 4,
                "moe_intermediate_size": 384,
                "shared_expert_intermediate_size": 128,
            }
            rope = {**rope, "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.25}
            linear: dict[str, Any] = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
            return tiny_hybrid(**wide, rope_parameters=rope, **linear, **inner)
        case "sigmoid":
            rope = {**HALF_TURNED, "mrope_section": [8, 4, 4]}
            return tiny_glm(**wide, rope_parameters=rope, intermediate_size=128, moe_intermediate_size=384)
        case "text":
            return tiny_text(**wide, norm_topk_prob=True, num_experts=4, moe_intermediate_size=384)
        case "windows":
            vision: dict[str, Any] = {"patch_size": 14, "window_size": 112}
            rope = {**rope, "mrope_interleaved": False}
            return tiny_windows(hidden_size=256, intermediate_size=384, rope_parameters=rope, vision=vision)
        case "dense":
            return tiny_vl(moe=False, **wide, intermediate_size=384, rope_parameters=rope)
        case "mixture":
            return tiny_vl(**wide, moe_intermediate_size=384, rope_parameters=rope)
    raise AssertionError(kind)


IN_BLOCKS = ("hybrid", "sigmoid", "text", "windows", "dense", "mixture")


def save(model: Any, path: Path, *, layout: str = "published", dtype: torch.dtype = torch.float32) -> Path:
    """Save as a folder whose experts are in `layout`: published (Qwen3-MoE's: one by one) or transformers (fused)."""
    model.save_pretrained(path)
    file = path / "model.safetensors"
    memory = model.state_dict()
    tensors = load_file(file)
    if layout == "transformers":
        tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        tensors |= {name: tensor for name, tensor in memory.items() if ".experts." in name}
    for name, tensor in tensors.items():
        stacked = ".experts." in name and name in memory and model.config.model_type != "gpt_oss"
        if layout == "published" and stacked:
            tensor = memory[name].transpose(1, 2)
        tensors[name] = tensor.to(dtype).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return path
