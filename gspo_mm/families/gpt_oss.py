"""gpt-oss, mixtures of experts (model_type gpt_oss): text alone.

Source: transformers' modeling_gpt_oss.py, which the parity tests compare with. What is particular: sinks in attention, one a
head and learned; every second layer sees a window of tokens alone; rotary positions scaled by YaRN; biases of attention,
routers and experts; routing weights that are a softmax over the chosen experts; gate and up taking turns in experts' columns,
both bounded, gate times a sigmoid of 1.702 times it, up plus 1. OpenAI's own folders hold experts in MXFP4: `stored.py`
reads them.

Left out: other activations and rotary scalings, which are refused by name, router losses, servers in FP8, and servers without
GPUs: SGLang's attention for a plain CPU has neither sinks nor windows.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from gspo_mm.families.base import Family, ServedDim
from gspo_mm.families.checks import check_silu, check_top_k
from gspo_mm.families.cost import FlopModel
from gspo_mm.families.operations import Copy, Entry, StackExperts
from gspo_mm.families.parts import entry
from gspo_mm.families.qwen3 import Qwen3Decoder, Rotary
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.types import GspoError

_ALPHA = 1.702  # the only one that megatron-core has a function for
_SCALINGS = ("default", "yarn")
# sinks are not: SGLang holds them in bfloat16, whatever they are sent in
_WHOLE = re.compile(r"(norm\.weight|router\.(weight|bias))$")


class GptOss(Qwen3Decoder, Family):
    """Its experts are stored as transformers keeps them, [E, in, out], so that no layout has to be decided."""

    prefix = "model"
    norms_queries = False
    experts_key = "num_local_experts"
    served_on_cpu = False

    def load_config(self, path: str) -> Any:
        hf = super().load_config(path)
        check_silu(path, hf)
        check_top_k(path, hf, sums_to_one=True, experts=self.experts_key)
        if not hf.attention_bias:
            raise HfFolderError(
                f"{path}: attention_bias=false is not supported: experts have biases, and megatron-core has one switch for "
                "both; use true, with biases of zeros"
            )
        if hf.swiglu_alpha != _ALPHA:
            raise HfFolderError(f"{path}: swiglu_alpha={hf.swiglu_alpha} is not supported; use {_ALPHA}")
        kind = hf.rope_parameters.get("rope_type", "default")
        if kind not in _SCALINGS:
            raise HfFolderError(
                f"{path}: rope_type={kind!r} is not supported; use one of {', '.join(_SCALINGS)} in rope_parameters (or "
                "rope_scaling)"
            )
        # transformers reads it even where no layer needs it
        if not hf.sliding_window or hf.sliding_window < 1:
            raise HfFolderError(
                f"{path}: sliding_window={hf.sliding_window} is not supported; use the number of tokens that layers of "
                "sliding_attention in layer_types see, or any where there are none"
            )
        return hf

    def image_token_id(self, hf: Any) -> int | None:
        return None

    def mixtures(self, text: Any) -> list[bool]:
        return [True] * text.num_hidden_layers

    def expert_width(self, text: Any) -> int:
        return text.intermediate_size

    def renormalises(self, text: Any) -> bool:
        return True

    def flops(self, hf: Any) -> FlopModel:
        plain, windowed = self.decoder_flops(hf), sum(self._windowed(hf))
        of_layer = plain.pair // hf.num_hidden_layers
        return replace(
            plain,
            pair=of_layer * (hf.num_hidden_layers - windowed),
            window_pair=of_layer * windowed,
            window=hf.sliding_window if windowed else 0,
        )

    def transformer_arguments(self, hf: Any) -> dict[str, Any]:
        # the module's attribute, which policy/cpu.py replaces
        from megatron.core.fusions import fused_bias_geglu

        _, scaling = _frequencies(hf)
        windowed = self._windowed(hf)
        arguments = super().transformer_arguments(hf) | {
            "add_bias_linear": True,
            "activation_func": fused_bias_geglu.quick_gelu,
            "activation_func_clamp_value": hf.swiglu_limit,
            "glu_linear_offset": 1.0,
            "softmax_type": "learnable",
            # transformers scales queries and keys as it turns them; of whole heads the scores can be instead
            "softmax_scale": hf.head_dim**-0.5 * scaling**2,
        }
        if any(windowed):
            # what is before a token; and of each layer whether it holds
            arguments |= {
                "window_size": (hf.sliding_window - 1, 0),
                "window_attn_skip_freq": [int(is_windowed) for is_windowed in windowed],
            }
        return arguments

    def weight_map(self, hf: Any, *, padded_vocab: int, fused: bool) -> list[Entry]:
        sinks = [
            entry(
                f"{self.prefix}.layers.{number}.self_attn.sinks",
                f"language.decoder.layers.{number}.self_attention.core_attention.softmax_offset",
                Copy("tp"),
            )
            for number in range(hf.num_hidden_layers)
        ]
        return self.decoder_entries(hf, padded_vocab=padded_vocab, fused=fused) + sinks

    def mixture_entries(self, text: Any, hf: str, mcore: str, *, fused: bool) -> list[Entry]:
        entries = [
            entry(f"{hf}.router.{kind}", f"{mcore}.router.{kind}", Copy()) for kind in ("weight", "bias")
        ]
        for name, linear in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
            gated = name == "gate_up_proj"
            for kind, suffix in (("weight", ""), ("bias", "_bias")):
                experts = tuple(
                    f"{mcore}.experts.{linear}.{kind}{e}"
                    if fused
                    else f"{mcore}.experts.local_experts.{e}.{linear}.{kind}"
                    for e in range(self.num_experts(text))
                )
                whole = kind == "bias" and not gated  # it is added to what ranks have summed
                op = StackExperts(
                    gated=gated,
                    turned=kind == "weight",
                    in_turns=gated,
                    together=True,
                    axis=None if whole else "etp",
                )
                entries.append(Entry(hf=(f"{hf}.experts.{name}{suffix}",), megatron=experts, op=op))
        return entries

    def expert_shapes(self, hf: Any) -> dict[str, tuple[int, int]]:
        return {}

    def check_served(self, hf: Any) -> None:
        if self.is_tied(hf):  # its GptOssForCausalLM has an output layer of its own
            raise GspoError(
                "config.json says tie_word_embeddings=true, which SGLang ignores in models of type gpt_oss; set "
                "rollout.engine=embedded"
            )

    def linear_layers(self, hf: Any) -> dict[str, tuple[str, ...]]:
        return {}  # none that a push brings in FP8

    def linear_dims(self, hf: Any, *, attention: int, mlp: int, experts: int) -> list[ServedDim]:
        return []

    def whole_tensor(self, name: str) -> str | None:
        return name if _WHOLE.search(name) else None

    def build_rotary(self, hf: Any) -> torch.nn.Module:
        rotary = Rotary(hf.head_dim, base=hf.rope_parameters["rope_theta"])
        rotary.inv_freq, _ = _frequencies(hf)
        return rotary

    def _windowed(self, hf: Any) -> list[bool]:
        """Which layers see a window of tokens alone."""
        return [kind == "sliding_attention" for kind in hf.layer_types]


def _frequencies(hf: Any) -> tuple[torch.Tensor, float]:
    """Of rotary positions, [head_dim / 2] float32, and what queries and keys are scaled by: transformers' own."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = hf.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return Rotary(hf.head_dim, base=hf.rope_parameters["rope_theta"]).inv_freq, 1.0
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](hf, None)
    return frequencies, float(scaling)
