"""What a model family provides, and the primitives its weight map is written in.

A weight map is a list of `Entry(hf names <-> megatron names, operation)`. Loading, exporting, weight sync and the
conversion tools all read that one list. Names are global: layer and expert numbers count over the whole model,
whatever the rank; `shard` says what part of a whole megatron tensor a rank holds.

Dims: V vocabulary, D hidden, E experts, F one expert's (or the MLP's) inner size, H head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from gspo_mm.families.cost import FlopModel
from gspo_mm.families.names import Prefixes
from gspo_mm.types import GspoError

type Axis = Literal["tp", "etp"]


class Operation(Protocol):
    """Turns whole Hugging Face tensors into whole megatron tensors and back, bit for bit."""

    @property
    def axis(self) -> Axis | None:
        """The parallel axis that the megatron tensors are cut along; None: every rank holds them whole."""
        ...

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]: ...
    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]: ...

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        """Rank `rank` of `size`'s part of one whole megatron tensor."""
        ...

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """One whole megatron tensor from the parts of all ranks, in rank order: the inverse of `shard`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`hf` tensors are `megatron` tensors under `op`; a tuple on either side when they are merged or stacked."""

    hf: tuple[str, ...]
    megatron: tuple[str, ...]
    op: Operation


@dataclass(frozen=True)
class Copy:
    """The same tensor on both sides, cut along `dim` over `axis`."""

    axis: Axis | None = None
    dim: int = 0

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        return hf

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        return megatron

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return whole if self.axis is None else _part(whole, self.dim, size, rank)

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return parts[0] if self.axis is None else torch.cat(parts, self.dim)


@dataclass(frozen=True)
class VocabPad:
    """Rows of zeros appended up to `padded`; they are never looked up and their logits are cut off."""

    vocab: int
    padded: int
    axis: Axis | None = "tp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        (weight_VD,) = hf
        padding = weight_VD.new_zeros(self.padded - self.vocab, weight_VD.shape[1])
        return [torch.cat([weight_VD, padding]) if len(padding) else weight_VD]

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        return [megatron[0][: self.vocab]]

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return _part(whole, 0, size, rank)

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts)


@dataclass(frozen=True)
class MergeQkv:
    """q, k, v (weights or biases) <-> one tensor laid out group by group: [its queries, its key, its value]."""

    num_groups: int
    head_dim: int
    axis: Axis | None = "tp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        inner = hf[0].shape[1:]
        grouped = [t.reshape(self.num_groups, -1, *inner) for t in hf]
        return [torch.cat(grouped, dim=1).reshape(-1, *inner)]

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        inner = megatron[0].shape[1:]
        grouped = megatron[0].reshape(self.num_groups, -1, *inner)
        queries = grouped.shape[1] - 2 * self.head_dim
        parts = grouped.split([queries, self.head_dim, self.head_dim], dim=1)
        return [part.reshape(-1, *inner) for part in parts]

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return _part(whole, 0, size, rank)

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts)


@dataclass(frozen=True)
class MergeGatedQkv:
    """As MergeQkv, where q holds [its query, its gate] head by head: every group becomes [queries, gates, key, value]."""

    num_groups: int
    head_dim: int
    axis: Axis | None = "tp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        query, *rest = hf
        inner = query.shape[1:]
        heads = query.reshape(self.num_groups, -1, 2, self.head_dim, *inner).transpose(1, 2)
        return self._plain().to_megatron([heads.reshape(-1, *inner), *rest])

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        query, *rest = self._plain().to_hf(megatron)
        inner = query.shape[1:]
        heads = query.reshape(self.num_groups, 2, -1, self.head_dim, *inner).transpose(1, 2)
        return [heads.reshape(-1, *inner), *rest]

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return self._plain().shard(whole, size, rank)

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return self._plain().unshard(parts)

    def _plain(self) -> MergeQkv:
        return MergeQkv(self.num_groups, self.head_dim)


@dataclass(frozen=True)
class Sections:
    """Tensors <-> one, row after row, made of sections of that many rows; each rank holds its part of every section."""

    sections: tuple[int, ...]  # of the whole tensor
    tensors: tuple[int, ...]  # rows of each tensor on the Hugging Face side
    axis: Axis | None = "tp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(hf)]

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(megatron[0].split(self.tensors))

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return torch.cat([_part(section, 0, size, rank) for section in whole.split(self.sections)])

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        sizes = [rows // len(parts) for rows in self.sections]
        by_section = zip(*(part.split(sizes) for part in parts), strict=True)
        return torch.cat([part for section in by_section for part in section])


@dataclass(frozen=True)
class MergeGateUp:
    """gate [F, D] and up [F, D] <-> [2F, D], gate first; each rank holds its part of both."""

    axis: Axis | None = "tp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(hf)]

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(megatron[0].chunk(2))

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return torch.cat([_part(half, 0, size, rank) for half in whole.chunk(2)])

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])


@dataclass(frozen=True)
class StackExperts:
    """One [E, out, in] tensor <-> E tensors [out, in]; `gated`: out is gate and up, one after the other."""

    gated: bool
    axis: Axis | None = "etp"

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(hf[0].unbind(0))

    def to_hf(self, megatron: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.stack(megatron)]

    def shard(self, whole: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        if self.gated:
            return MergeGateUp().shard(whole, size, rank)
        return _part(whole, 1, size, rank)

    def unshard(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return MergeGateUp().unshard(parts) if self.gated else torch.cat(parts, 1)

    def names_apart(self, hf: str, expert: int) -> list[str]:
        """Names of one expert's tensors in checkpoints that store experts one by one; servers take these as well."""
        parent = hf.rpartition(".")[0]
        return [f"{parent}.{expert}.{x}_proj.weight" for x in (("gate", "up") if self.gated else ("down",))]

    def apart(self, megatron: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of `names_apart`, from one expert's megatron tensor."""
        return list(megatron.chunk(2)) if self.gated else [megatron]

    def all_apart(self, hf: str, stacked: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """`names_apart` and `apart` of every expert in turn, from Hugging Face's one tensor."""
        for expert, one in enumerate(stacked):
            yield from zip(self.names_apart(hf, expert), self.apart(one), strict=True)


@dataclass(frozen=True, kw_only=True)
class ServedDim:
    """One dim of the matrices of `Family.linear_layers`."""

    name: str  # key of config.json's text_config, or a product of two
    size: int
    ways: int  # over how many GPUs it is cut
    relief: str = ""  # what makes them fewer


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """What a plan must fit: counts of the language decoder, and how deep DeepStack reaches into it."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_groups: int
    num_experts: int  # 0: dense
    expert_ffn: int = 0  # inner size of one expert
    deepstack_levels: int = 0
    linear_heads: int = 0  # key heads of linear attention; 0: none


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
    # how published names begin, where that is not transformers' way
    prefixes = Prefixes()

    # --- the language decoder

    def load_config(self, path: str) -> Any:
        """The Hugging Face config of folder `path`. Raises HfFolderError for a variant that is not supported.

        How the files hold the weights is left out of it: models are built in the format that they train in.
        """
        from transformers import AutoConfig

        hf = AutoConfig.from_pretrained(path)
        if hasattr(hf, "quantization_config"):
            del hf.quantization_config
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

    def num_patches(self, hf: Any, image_processor: Any, height: int, width: int) -> int:
        """t*h*w of an image of that many pixels."""
        return image_processor.get_number_of_image_patches(height, width, {})

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


def _part(whole: torch.Tensor, dim: int, size: int, rank: int) -> torch.Tensor:
    return whole if size == 1 else whole.chunk(size, dim)[rank]
