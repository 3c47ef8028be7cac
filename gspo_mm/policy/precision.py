"""Number formats: BF16 or float32 parameters, and Transformer Engine's FP8 recipes for the matrix products.

In FP8 the router, the vision tower, the embedding and the output weight keep their format: megatron runs FP8 inside
decoder layers only, the router's product is its own float32 one, and the log-probs take the output weight directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gspo_mm.config import PolicyConfig
from gspo_mm.types import GspoError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# compute capability from which a recipe's kernels exist, and that of the devices it is meant for
_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
# all sides of a matrix product must be multiples of this: cuBLAS, and for mxfp8 its blocks
_SIDES = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}


class PrecisionError(GspoError, ValueError):
    """The machine, or another setting, cannot do the number format that the config asks for."""


def check_fp8(config: PolicyConfig) -> None:
    """Raise PrecisionError, before any model is built, when this machine cannot do `policy.fp8`."""
    recipe = config.fp8.recipe
    if recipe is None:
        return
    from gspo_mm.policy.spec import has_fused_modules

    fused = has_fused_modules()
    if not fused and not torch.cuda.is_available():
        raise PrecisionError(
            f"policy.fp8.recipe={recipe} needs a CUDA device with FP8 (Hopper or newer) and Transformer Engine; this "
            "machine has none: set policy.fp8.recipe=null"
        )
    have, need = torch.cuda.get_device_capability(), _CAPABILITY[recipe]
    if have < need:
        raise PrecisionError(
            f"policy.fp8.recipe={recipe} needs compute capability {need[0]}.{need[1]} but "
            f"{torch.cuda.get_device_name()} has {have[0]}.{have[1]}; "
            + ("use blockwise or tensorwise" if have >= (9, 0) else "set policy.fp8.recipe=null")
        )
    if not fused:
        raise PrecisionError(
            f"policy.fp8.recipe={recipe} needs Transformer Engine, which is not installed: pip install 'gspo-mm[te]'"
        )


def check_attention(config: PolicyConfig) -> None:
    """Raise PrecisionError when Transformer Engine has no attention over ranks in the format: in float32 it has none."""
    from gspo_mm.policy.spec import has_fused_modules

    cp = config.parallel.cp
    if cp > 1 and config.dtype == "float32" and has_fused_modules():
        raise PrecisionError(
            f"policy.dtype=float32 with policy.parallel.cp={cp}: Transformer Engine's attention over several ranks is for "
            "bfloat16; set policy.dtype=bfloat16, or policy.parallel.cp=1"
        )


def check_widths(config: PolicyConfig, arguments: Mapping[str, Any], *, tp: int, etp: int) -> None:
    """Raise PrecisionError when FP8 kernels do not take a matrix of the decoder, as it is cut over `tp` or `etp` ranks.

    `arguments`: `Family.transformer_arguments`. Both sides of every weight are somewhere the last one of a product: forward,
    or in one of the two gradients.
    """
    if config.fp8.recipe is None:
        return
    heads, groups, head = (
        arguments[key] for key in ("num_attention_heads", "num_query_groups", "kv_channels")
    )
    gated = bool(arguments.get("attention_output_gate"))
    has_dense = 0 in arguments.get("moe_layer_freq", [0])  # layers without experts
    keys, values, numbers = _linear_widths(arguments)
    unit = _SIDES[config.fp8.recipe]
    for what, width, key, size in (
        ("hidden_size", arguments["hidden_size"], "tp", 1),
        ("width of queries, keys and values", (heads * (1 + gated) + 2 * groups) * head, "tp", tp),
        ("num_attention_heads * head_dim", heads * head, "tp", tp),
        ("intermediate_size", arguments["ffn_hidden_size"] if has_dense else 0, "tp", tp),
        (
            "shared_expert_intermediate_size",
            arguments.get("moe_shared_expert_intermediate_size", 0),
            "tp",
            tp,
        ),
        ("moe_intermediate_size", arguments.get("moe_ffn_hidden_size", 0), "etp", etp),
        ("width of linear attention's projection", 2 * (keys + values + numbers), "tp", tp),
        ("linear_num_value_heads * linear_value_head_dim", values, "tp", tp),
    ):
        if width % (unit * size):
            cut = f" over policy.parallel.{key}={size} is {width / size:g}, which" if size > 1 else ""
            fix = f"lower policy.parallel.{key}, or " if size > 1 and width % unit == 0 else ""
            raise PrecisionError(
                f"policy.fp8.recipe={config.fp8.recipe}: the model's {what}={width}{cut} is no multiple of {unit}, as its "
                f"kernels want it; {fix}set policy.fp8.recipe=null"
            )


def _linear_widths(arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of all keys, all values and one number a value head in linear attention; 0 where there is none."""
    if "linear_attention_freq" not in arguments:
        return 0, 0, 0
    heads = arguments["linear_num_value_heads"]
    keys = arguments["linear_num_key_heads"] * arguments["linear_key_head_dim"]
    return keys, heads * arguments["linear_value_head_dim"], heads


def fp8_arguments(config: PolicyConfig) -> dict[str, Any]:
    """Keyword arguments of megatron's TransformerConfig."""
    fp8 = config.fp8
    if fp8.recipe is None:
        return {}
    return {
        "fp8": "hybrid" if fp8.recipe == "tensorwise" else "e4m3",
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.primary_weights,
        "fp8_amax_history_len": 1,
        "fp8_amax_compute_algo": "most_recent",
        "first_last_layers_bf16": fp8.bf16_layers_at_start + fp8.bf16_layers_at_end > 0,
        "num_layers_at_start_in_bf16": fp8.bf16_layers_at_start,
        "num_layers_at_end_in_bf16": fp8.bf16_layers_at_end,
        # experts see ragged token counts; padding the routing map is cheaper than padding every expert's rows
        "moe_router_padding_for_quantization": True,
    }


def token_multiple(config: PolicyConfig) -> int:
    """Tokens of a rank's micro-batch are padded to a multiple of this."""
    return 1 if config.fp8.recipe is None else _SIDES[config.fp8.recipe]
