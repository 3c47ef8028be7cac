"""GLM-4.5V and GLM-4.6V, mixtures of experts (model_type glm4v_moe).

Source: transformers' modeling_glm4v_moe.py, which the parity tests compare with. What is particular: experts are chosen by
sigmoid scores plus a bias that weighs nothing and is not trained here, within the best groups of experts where there are
several; one more expert that every token passes; dense layers first; biases on queries, keys and values alone; of a head
half the dims are turned, rotary frequencies in blocks of time, height, width; a tower whose patches are merged by a
convolution.

Left out: videos, router losses, the dense variant (glm4v), whose decoder has norms behind attention and MLP as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from gspo_mm.families.base import ServedDim
from gspo_mm.families.checks import check_served_rope, key_of
from gspo_mm.families.cost import FlopModel, matmul
from gspo_mm.families.operations import Copy, Entry
from gspo_mm.families.parts import cut_by_tp, entry, gated_mlp, served_mlp
from gspo_mm.families.qwen3 import Qwen3Decoder, head_dim
from gspo_mm.families.qwen3_vl import MultiAxisRotary, QwenImages
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.types import GspoError

_BIAS = "e_score_correction_bias"
# SGLang holds routers in float32, whatever they are sent in
_WHOLE = re.compile(rf"((norm\d?|patch_embed\.proj|downsample)\.(weight|bias)|{_BIAS})$")
_PROJECTOR = ("visual.post_layernorm.", "visual.downsample.", "visual.merger.")
_BEST_OF_GROUP = 2  # experts whose scores make that of their group


class Glm4vMoe(Qwen3Decoder, QwenImages):
    prefix = "model.language_model"
    published_experts = "apart"
    constants = (_BIAS,)
    norms_queries = False
    kept_by_servers = ("model.visual",)  # it looks for shards of attn.qkv_proj, and the folder has attn.qkv
    # else SGLang makes the shared expert one of the routed ones on some GPUs, under their name, and refuses several
    server_options = MappingProxyType({"disable-shared-experts-fusion": True})
    experts_key = "num_local_experts"  # transformers' other name of it, which config.json may have too

    def load_config(self, path: str) -> Any:
        hf = super().load_config(path)
        text = hf.text_config
        self.check_decoder(path, hf)
        if getattr(text, "use_qk_norm", False):  # transformers ignores it, servers do not
            raise HfFolderError(f"{path}: {key_of(hf, 'use_qk_norm')}=true is not supported; use false")
        if any(self.mixtures(text)):
            _check_routing(path, hf)
        section, turned = text.rope_parameters.get("mrope_section"), _turned(text)
        if not section or 2 * sum(section) != turned:
            raise HfFolderError(
                f"{path}: mrope_section={section} of rope_parameters (or rope_scaling) is not supported; use numbers that sum "
                f"to {turned // 2}, half the dims of a head that partial_rotary_factor has turned"
            )
        return hf

    def mixtures(self, text: Any) -> list[bool]:
        return [number >= text.first_k_dense_replace for number in range(text.num_hidden_layers)]

    def shared_width(self, text: Any) -> int:
        return text.n_shared_experts * text.moe_intermediate_size

    def attention_output_bias(self, hf: Any) -> bool:
        return False

    def flops(self, hf: Any) -> FlopModel:
        return self.with_vision_flops(hf, self.decoder_flops(hf))

    def with_vision_flops(self, hf: Any, decoder: FlopModel) -> FlopModel:
        vision = hf.vision_config
        width, out, merge = vision.hidden_size, vision.out_hidden_size, vision.spatial_merge_size**2
        return replace(
            decoder,
            patch_embedding=matmul(self.patch_dim(hf), width),
            # inside the tower's blocks an MLP is as wide as what leaves the tower
            patch=vision.depth * (4 * matmul(width, width) + 3 * matmul(width, out)),
            patch_pair=vision.depth * 2 * matmul(1, width),
            merged=matmul(width * merge, out) + matmul(out, out) + 3 * matmul(out, vision.intermediate_size),
            patches_per_token=merge,
        )

    def transformer_arguments(self, hf: Any) -> dict[str, Any]:
        text, arguments = hf.text_config, super().transformer_arguments(hf)
        if not any(self.mixtures(text)):
            return arguments
        some = text.topk_group < text.n_group
        return arguments | {
            "moe_router_score_function": "sigmoid",
            "moe_router_pre_softmax": False,  # is about the other score function
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": text.n_group if some else None,
            "moe_router_group_topk": text.topk_group if some else None,
            "moe_router_topk_scaling_factor": text.routed_scaling_factor,
            "moe_shared_expert_intermediate_size": self.shared_width(text),
        }

    def pixels_counted(self, hf: Any) -> int:
        return (
            hf.vision_config.temporal_patch_size
        )  # once for each frame of a patch, all of which are the image

    def image_grid(self, hf: Any, image_processor: Any, height: int, width: int) -> tuple[int, int, int]:
        from transformers.models.glm4v.image_processing_glm4v import smart_resize

        patch, size = image_processor.patch_size, image_processor.size
        rows, columns = smart_resize(
            num_frames=image_processor.temporal_patch_size,
            height=height,
            width=width,
            temporal_factor=image_processor.temporal_patch_size,
            factor=patch * image_processor.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return 1, rows // patch, columns // patch

    def weight_map(self, hf: Any, *, padded_vocab: int, fused: bool) -> list[Entry]:
        decoder = self.decoder_entries(hf, padded_vocab=padded_vocab, fused=fused)
        return decoder + self.vision_entries(hf)

    def mixture_entries(self, text: Any, hf: str, mcore: str, *, fused: bool) -> list[Entry]:
        return [
            *super().mixture_entries(text, hf, mcore, fused=fused),
            entry(f"{hf}.gate.{_BIAS}", f"{mcore}.router.expert_bias", Copy()),
            *gated_mlp(f"{hf}.shared_experts", f"{mcore}.shared_experts"),
        ]

    def build_rotary(self, hf: Any) -> torch.nn.Module:
        text = hf.text_config
        section = text.rope_parameters["mrope_section"]
        axis = torch.tensor([number % 3 for number, count in enumerate(section) for _ in range(count)])
        return MultiAxisRotary(_turned(text), base=text.rope_parameters["rope_theta"], axis=axis)

    def part_of(self, name: str) -> str:
        return "projector" if name.startswith(_PROJECTOR) else super().part_of(name)

    def check_served(self, hf: Any) -> None:
        check_served_rope(hf, interleaved=False)
        vision = hf.vision_config
        for key, value, right in (
            ("hidden_act", vision.hidden_act, "silu"),
            ("rope_parameters.rope_theta", vision.rope_parameters["rope_theta"], 10000.0),
        ):
            if value != right:
                raise GspoError(
                    f"vision_config.{key}={json.dumps(value)} of config.json is ignored by SGLang, which computes with "
                    f"{json.dumps(right)}; set rollout.engine=embedded"
                )

    def linear_layers(self, hf: Any) -> Mapping[str, tuple[str, ...]]:
        layers = dict(super().linear_layers(hf))
        for number, is_moe in enumerate(self.mixtures(hf.text_config)):
            if is_moe:
                shared = f"layers.{number}.mlp.shared_experts"
                layers |= served_mlp(f"{self.prefix}.{shared}", f"model.{shared}")
        return layers

    def linear_dims(self, hf: Any, *, attention: int, mlp: int, experts: int) -> list[ServedDim]:
        text, dims = hf.text_config, super().linear_dims(hf, attention=attention, mlp=mlp, experts=experts)
        if not any(self.mixtures(text)):
            return dims
        return [*dims, cut_by_tp("n_shared_experts*moe_intermediate_size", self.shared_width(text), mlp)]

    def whole_tensor(self, name: str) -> str | None:
        if not _WHOLE.search(name):
            return None
        return name.replace(f"{self.prefix}.", "model.").replace("model.visual.", "visual.")


def _check_routing(path: str, hf: Any) -> None:
    """Raise HfFolderError where megatron's router would choose or weigh other experts than transformers'."""
    text, key = hf.text_config, lambda name: key_of(hf, name)
    chosen, groups, best = text.num_experts_per_tok, text.n_group, text.topk_group
    if chosen > 1 and not text.norm_topk_prob:
        raise HfFolderError(
            f"{path}: {key('norm_topk_prob')}=false is not supported with more than one expert per token; use true"
        )
    if not text.n_shared_experts:
        raise HfFolderError(
            f"{path}: {key('n_shared_experts')}={text.n_shared_experts} is not supported; use a model with 1 or more"
        )
    if text.num_local_experts % groups or not 1 <= best <= groups:
        raise HfFolderError(
            f"{path}: {key('n_group')}={groups} with topk_group={best} and {text.num_local_experts} experts is not "
            "supported; use groups of equal size, and topk_group from 1 to n_group"
        )
    if best < groups and chosen // best != _BEST_OF_GROUP:
        raise HfFolderError(
            f"{path}: {key('topk_group')}={best} with num_experts_per_tok={chosen} is not supported: the policy's router takes "
            f"as many experts for a group's score as it has to give, and transformers {_BEST_OF_GROUP}; use a model with "
            f"{chosen // _BEST_OF_GROUP} groups per token, or {groups}"
        )


def _turned(text: Any) -> int:
    """Dims of a head that are turned."""
    return int(head_dim(text) * text.rope_parameters["partial_rotary_factor"])
