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
    """Of these widths, with weights of the size that real models have, 0.02: larger ones amplify what BF16 rounds."""
    model = tiny_vl(moe=moe, vision=vision, **{**WIDE, **text})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2)
    return model


def tiny_vl(*, moe: bool = True, tied: bool = False, seed: int = 0, vision: Any = None, **text: Any) -> Any:
    """transformers' model in float32 with weights that hide no fault: no norm is 1, no bias 0."""
    text_config = {**TEXT, **(EXPERTS if moe else {}), "tie_word_embeddings": tied, **text}
    vision_config = {**VISION, "out_hidden_size": text_config["hidden_size"], **(vision or {})}
    last = text_config["vocab_size"]
    kind = "Qwen3VLMoe" if moe else "Qwen3VL"
    config = getattr(transformers, f"{kind}Config")(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=last - 4,
        video_token_id=last - 3,
        vision_start_token_id=last - 2,
        vision_end_token_id=last - 1,
        tie_word_embeddings=tied,
        dtype="float32",
    )
    return _with_weights(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed)


def tiny_text(*, moe: bool = True, tied: bool = False, seed: int = 0, **text: Any) -> Any:
    """As `tiny_vl`, without images."""
    kind = "Qwen3Moe" if moe else "Qwen3"
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    values = {**TEXT, **(EXPERTS if moe else {}), "rope_parameters": rope, **text}
    config = getattr(transformers, f"{kind}Config")(**values, tie_word_embeddings=tied, dtype="float32")
    return _with_weights(getattr(transformers, f"{kind}ForCausalLM")(config), seed)


def _with_weights(model: Any, seed: int) -> Any:
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if name.endswith("mlp.gate.weight") else 0.1))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


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
        if layout == "published" and ".experts." in name and name in memory:
            tensor = memory[name].transpose(1, 2)
        tensors[name] = tensor.to(dtype).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return path
