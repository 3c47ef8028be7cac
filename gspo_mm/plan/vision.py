"""What a config.json says of the tower: its parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

type Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Vision:
    """The tower that makes features of patches, and the projector that makes features of an image token of them."""

    depth: int
    width: int
    # inner size of a block's MLP
    inner: int
    out: int
    # numbers of a patch, and patches of an image token
    patch: int
    merge: int
    # DeepStack mergers beside the main one
    levels: int
    # parameters
    number: int
    projector: int
    # (inputs, outputs) of the projector's matrices, for adapters
    matrices: tuple[tuple[int, int], ...]
    # multiply-adds of a forward pass: for each patch, each pair of patches of an image, each image token
    of_patch: int
    of_pair: int
    of_token: int

    def flops(self, tokens: float) -> float:
        """Of an image of so many image tokens, in which every patch sees every other."""
        patches = tokens * self.merge
        return 2 * (patches * self.of_patch + patches * patches * self.of_pair + tokens * self.of_token)


def vision_of(it: Json, kind: str, hidden: int) -> Vision:
    """From `vision_config` of a tower of this kind (families/traits.py) with `hidden` wide states behind it."""
    width, inner, out = it["hidden_size"], it["intermediate_size"], it.get("out_hidden_size", hidden)
    colours = it.get("in_channels") or it.get("in_chans", 3)
    patch = colours * it.get("temporal_patch_size", 2) * it["patch_size"] ** 2
    merge, levels = it.get("spatial_merge_size", 2) ** 2, len(it.get("deepstack_visual_indexes") or ())
    if kind == "convolved":
        return _convolved(it, width, inner, out, patch, merge)
    gated = kind == "gated"  # RMSNorm, a gated MLP, no bias at the patches, no learned positions
    wide = width * merge
    block = 4 * width**2 + (3 if gated else 2) * width * inner
    biases = 5 * width + (2 if gated else 1) * inner + (2 if gated else 4) * width
    ends = patch * width + (0 if gated else (1 + it["num_position_embeddings"]) * width)
    merger = wide * wide + wide + wide * out + out
    norms = (width if gated else 2 * width) + levels * 2 * wide
    return Vision(
        depth=it["depth"], width=width, inner=inner * (2 if gated else 1), out=out, patch=patch, merge=merge, levels=levels,
        number=ends + it["depth"] * (block + biases),
        projector=(1 + levels) * merger + norms,
        matrices=((wide, wide), (wide, out)) * (1 + levels),
        of_patch=patch * width + it["depth"] * block,
        of_pair=it["depth"] * 2 * width,
        of_token=(1 + levels) * (wide * wide + wide * out),
    )  # fmt: skip


def _convolved(it: Json, width: int, inner: int, out: int, patch: int, merge: int) -> Vision:
    """Blocks with an MLP as wide as what leaves the tower, a convolution that merges patches, a gated projector."""
    block = 4 * width**2 + 3 * width * out
    places = (it["image_size"] // it["patch_size"]) ** 2
    matrices = ((out, out), (out, inner), (out, inner), (inner, out))
    return Vision(
        depth=it["depth"], width=width, inner=2 * out, out=out, patch=patch, merge=merge, levels=0,
        number=(patch + 1 + places + 1) * width + it["depth"] * (block + 2 * width),
        projector=width + width * merge * out + out + sum(i * o for i, o in matrices) + 2 * out,
        matrices=matrices,
        of_patch=patch * width + it["depth"] * block,
        of_pair=it["depth"] * 2 * width,
        of_token=width * merge * out + sum(i * o for i, o in matrices),
    )  # fmt: skip
