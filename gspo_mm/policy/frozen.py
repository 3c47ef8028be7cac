"""Parts of the model that are not trained: `policy.freeze`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gspo_mm.config.layout import PlanError
from gspo_mm.families.base import Family
from gspo_mm.policy.model import PolicyModel


def check_frozen(family: Family, hf: Any, parts: Sequence[str]) -> None:
    """Raise PlanError for parts that the model does not have."""
    absent = [part for part in parts if part in ("vision", "projector")]
    if absent and family.image_token_id(hf) is None:
        raise PlanError(
            f"policy.freeze names {' and '.join(absent)}, and models of type {hf.model_type} take text alone; take it off "
            "the list"
        )


def freeze(module: PolicyModel, parts: Sequence[str]) -> None:
    """Switch off gradients of parts: vision (tower), projector (mergers), router, language (router included)."""
    frozen = {*parts, "router"} if "language" in parts else set(parts)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(module.family.part_of(name) not in frozen)
