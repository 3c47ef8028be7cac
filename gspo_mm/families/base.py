"""What a model family provides: how its config, weights, images and positions map onto megatron-core."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from gspo_mm.config.layout import ModelDims
from gspo_mm.families.checks import check_nesting
from gspo_mm.families.cost import FlopModel
from gspo_mm.families.names import Prefixes
from gspo_mm.families.operations import Entry
from gspo_mm.types import GspoError


@dataclass(frozen=True, kw_only=True)
class ServedDim:
    """One dim of the matrices of `Family.linear_layers`."""

    name: str  # key of config.json's text_config, or a product of two
    size: int
    ways: int  # over how many GPUs it is cut
    relief: str = ""  # what makes them fewer


class Family(ABC):
    """One model family: how its Hugging Face config, weights, images and positions map onto megatron-core.

    What is not abstract here is how most families do it, or all that one without images needs. Images are patches
    [sum of t*h*w, patch dim], a row each, with a grid (t, h, w) per image; whatever else an image processor makes is turned
    into that by `images_of`.
    """

    # how published checkpoints store experts: stacked as transformers has them, stacked with in and out exchanged, or one by one
    published_experts: Literal["stacked", "exchanged", "apart"] = "stacked"
    # beginnings of tensors' names that are not trained, and go through conversion as they are
    carried: tuple[str, ...] = ()
    # ends of names of tensors that are not trained either, and are in float32 whatever the others are in
    constants: tuple[str, ...] = ()
    # whether SGLang's servers can compute it without GPUs, as `serving/cpu.py` starts them
    served_on_cpu = True
    # how published names begin, where that is not transformers' way
    prefixes = Prefixes()
    # modules that servers must be told to keep as they are, because SGLang has other names for what is in them
    kept_by_servers: tuple[str, ...] = ()
    # options of sglang.launch_server that servers of it need
    server_options: Mapping[str, bool] = MappingProxyType({})

    # --- the language decoder

    def load_config(self, path: str) -> Any:
        """The Hugging Face config of folder `path`. Raises HfFolderError for a variant that is not supported.

        How the files hold the weights is left out of it: models are built in the format that they train in.
        """
        from transformers import AutoConfig

        hf = AutoConfig.from_pretrained(path)
        check_nesting(path, hf)
        if hasattr(hf, "quantization_config"):
            del hf.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
        return hf

    def auto_class(self, hf: Any) -> Any:
        """transformers' class whose `from_config` and `from_pretrained` make the whole model."""
        import transformers

        sees = self.image_token_id(hf) is not None
        return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM

    def dims(self, hf: Any) -> ModelDims:
        made = self.transformer_arguments(hf)
        return ModelDims(
            hidden=made["hidden_size"],
            num_layers=made["num_layers"],
            num_heads=made["num_attention_heads"],
            num_kv_groups=made["num_query_groups"],
            num_experts=made.get("num_moe_experts", 0),
            expert_ffn=made.get("moe_ffn_hidden_size", 0),
            deepstack_levels=self.deepstack_levels(hf),
            linear_heads=made.get("linear_num_key_heads", 0),
            spread_groups=made["num_query_groups"] if "softmax_type" in made or "window_size" in made else 0,
            expert_biases=made.get("add_bias_linear", True) and "num_moe_experts" in made,
        )

    @abstractmethod
    def flops(self, hf: Any) -> FlopModel:
        """FLOPs of a forward pass of the whole model, vision tower and output layer included."""

    @abstractmethod
    def transformer_arguments(self, hf: Any) -> dict[str, Any]:
        """Keyword arguments of megatron's TransformerConfig that the architecture decides."""

    @abstractmethod
    def weight_map(self, hf: Any, *, padded_vocab: int, fused: bool) -> list[Entry]:
        """Every tensor of the model; `fused`: names of Transformer Engine's fused modules."""

    @abstractmethod
    def build_rotary(self, hf: Any) -> torch.nn.Module:
        """Maps positions [A, N] to angles [N, rotated dims of a head] float32."""

    def attention_output_bias(self, hf: Any) -> bool:
        """Whether attention's output projection alone has a bias: megatron has one switch for it and the MLP's."""
        return False

    def is_tied(self, hf: Any) -> bool:
        """Whether the output layer is the embedding."""
        return bool(hf.tie_word_embeddings)  # the top-level flag decides, text_config's is not read

    def expert_shapes(self, hf: Any) -> Mapping[str, tuple[int, int]]:
        """[out, in] of the fused expert tensors by the last part of their name; empty for dense models."""
        return {}

    def positions(self, hf: Any, token_ids: torch.Tensor, grids: torch.Tensor | None) -> torch.Tensor:
        """Rotary positions [A, P] int64 of one sequence [P], on A axes; an id below 0 is a text token."""
        return torch.arange(len(token_ids))[None]

    def part_of(self, name: str) -> str:
        """Which part of `policy.freeze` the parameter `name` of the policy belongs to."""
        return "router" if ".mlp.router." in name else "vision" if name.startswith("visual.") else "language"

    # --- images

    # how models of it give a place in a picture: in thousandths of it, or in pixels of it as it was resized for the tower
    box_unit: Literal["thousand", "pixels"] | None = None

    def image_token_id(self, hf: Any) -> int | None:
        """The token in whose place an image's features are put; None: models of this family take text alone."""
        return hf.image_token_id

    def deepstack_levels(self, hf: Any) -> int:
        """Decoder layers, from the first, that receive image features."""
        return 0

    def build_vision(self, hf: Any) -> torch.nn.Module | None:
        """What turns patches into features: tower and projector."""
        return None

    def encode_images(
        self, tower: torch.nn.Module, pixels: torch.Tensor, grid_thw: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features [image tokens, D] of all images in order, and those of each DeepStack level."""
        raise NotImplementedError

    def tokens_per_image(self, hf: Any, grid_thw: torch.Tensor) -> list[int]:
        return []

    def patch_dim(self, hf: Any) -> int:
        return 0

    def grid_of(self, hf: Any, rows: int, columns: int) -> tuple[int, int, int]:
        """Grid (t, h, w) of an image of that many rows and columns of tokens, where the family has a choice."""
        raise NotImplementedError

    def image_grid(self, hf: Any, image_processor: Any, height: int, width: int) -> tuple[int, int, int]:
        """Grid (t, h, w) of an image of that many pixels. Raises ValueError where it is too narrow to be patched."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        patch, size = image_processor.patch_size, image_processor.size
        rows, columns = smart_resize(
            height,
            width,
            patch * image_processor.merge_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return 1, rows // patch, columns // patch

    def pixels_counted(self, hf: Any) -> int:
        """How often the image processor counts each pixel of an image in the limits of its `size`."""
        return 1

    def images_of(
        self, hf: Any, inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Patches and grids [I, 3] int64 of what the Hugging Face processor made; None where there is no image."""
        return inputs.get("pixel_values"), inputs.get("image_grid_thw")

    def hf_inputs(self, hf: Any, patches: torch.Tensor, grids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inverse of `images_of`: what the forward of transformers' own model is given."""
        return {"pixel_values": patches, "image_grid_thw": grids}

    # --- SGLang servers, which a family may leave out

    def check_served(self, hf: Any) -> None:
        """Raise GspoError for a variant that SGLang would compute in another way."""
        raise GspoError(
            f"models of type {hf.model_type} are not served by SGLang here; set rollout.engine=embedded"
        )

    def linear_layers(self, hf: Any) -> Mapping[str, tuple[str, ...]]:
        """The decoder's matrices [out, in] as SGLang merges them: its name of each -> Hugging Face's of what is in it.

        Experts are named one by one. These are the weights that servers may hold in FP8.
        """
        return {}

    def linear_dims(self, hf: Any, *, attention: int, mlp: int, experts: int) -> list[ServedDim]:
        """Dims of those matrices when a server cuts them that many ways."""
        return []

    def whole_tensor(self, name: str) -> str | None:
        """SGLang's name of the tensor that is `name` in Hugging Face's, if it keeps it whole and as it was sent.

        Checksums are taken of these, which are norms, routers and the like.
        """
        return None
