"""Refusals that families have in common: what config.json may say, and no family here computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspo_mm.hf.headers import HfFolderError, read_json
from gspo_mm.types import GspoError


def key_of(hf: Any, key: str) -> str:
    """The decoder's `key` as config.json has it, nested or flat."""
    return key if hf.get_text_config() is hf else f"text_config.{key}"


def check_nesting(path: str, hf: Any) -> None:
    """Raise HfFolderError where config.json has the decoder's keys in a place that transformers passes over."""
    text, stored = hf.get_text_config(), read_json(Path(path) / "config.json")
    if isinstance(text, dict):
        raise HfFolderError(
            f"{path}: config.json has a text_config, which transformers does not read in models of type {hf.model_type}; put its "
            "keys beside model_type"
        )
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size")
    if odd := next((key for key in sizes if stored.get(key, getattr(text, key)) != getattr(text, key)), None):
        raise HfFolderError(
            f"{path}: {odd}={stored[odd]} of config.json is not in text_config, where transformers reads it in models of type "
            f"{hf.model_type}; put the decoder's keys there"
        )


def check_silu(path: str, hf: Any) -> None:
    """Raise HfFolderError for another activation between the products of an MLP."""
    activation = hf.get_text_config().hidden_act
    if activation != "silu":
        raise HfFolderError(f"{path}: {key_of(hf, 'hidden_act')}={activation!r} is not supported; use 'silu'")


def check_rope(path: str, hf: Any) -> None:
    """Raise HfFolderError where rotary positions are scaled."""
    kind = hf.get_text_config().rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise HfFolderError(
            f"{path}: rope_type={kind!r} is not supported; use 'default', for which rope_parameters (or rope_scaling) "
            "hold nothing that scales positions"
        )


def check_top_k(path: str, hf: Any, *, sums_to_one: bool, experts: str = "num_experts") -> None:
    """Raise HfFolderError for a number of experts a token that cannot be chosen, or that trains no router.

    `sums_to_one`: routing weights are normalised over the chosen experts. `experts`: the key of how many there are.
    """
    text = hf.get_text_config()
    least, most = 2 if sums_to_one else 1, getattr(text, experts)
    if not least <= text.num_experts_per_tok <= most:
        why = "routing weights sum to 1 over the chosen experts, so that a single one leaves the router untrained; "
        raise HfFolderError(
            f"{path}: {key_of(hf, 'num_experts_per_tok')}={text.num_experts_per_tok} with {experts}={most} "
            f"is not supported: {why if sums_to_one else ''}use a model with {least} to {most} experts per token"
        )


def check_served_rope(hf: Any, *, interleaved: bool) -> None:
    """Raise GspoError where SGLang would turn other dims by an image's height and width than transformers does.

    transformers deals frequencies to the axes as the family's code says (`interleaved`, or in blocks), SGLang as these keys do.
    """
    rope = hf.get_text_config().rope_parameters
    for key, right in (
        ("mrope_interleaved", interleaved),
        ("mrope_interleaved_glm", False),
        ("video_rope", False),
    ):
        if bool(rope.get(key)) != right:
            said = "true" if rope.get(key) else "false (or not set)"
            raise GspoError(
                f"{key_of(hf, 'rope_parameters')}.{key} (or rope_scaling's) of config.json is {said}, for which SGLang turns "
                f"heads in another way than transformers; set it to {str(right).lower()}, or rollout.engine=embedded"
            )
