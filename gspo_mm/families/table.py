"""The table of model families: one file each, one row for each `model_type`.

Rows say where a family's code is, and load it when it is asked for: traits are known without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from gspo_mm.families.traits import Traits
from gspo_mm.hf.headers import read_json
from gspo_mm.types import GspoError

if TYPE_CHECKING:
    from gspo_mm.families.base import Family


@dataclass(frozen=True)
class Row:
    """A family's code as `module:class`, and its traits; without them it is trained, and not planned."""

    code: str
    traits: Traits | None = None

    @cached_property
    def family(self) -> Family:
        module, name = self.code.split(":")
        return getattr(import_module(module), name)()


_HYBRID = Traits(linear=True, gated=True)
_HYBRID_MIXTURE = Traits(mixture=True, linear=True, gated=True, shared_gate=True)
_WINDOWS = Traits(norms_queries=False, qkv_bias=True, output_bias=False, tower="gated")
_SIGMOID = Traits(mixture=True, norms_queries=False, output_bias=False, tower="convolved")
_SINKS = Traits(
    mixture=True, expert_width="intermediate_size", expert_biases=True, norms_queries=False, sinks=True
)

FAMILIES: dict[str, Row] = {
    "qwen3_vl": Row("gspo_mm.families.qwen3_vl:Qwen3VL", Traits()),
    "qwen3_vl_moe": Row("gspo_mm.families.qwen3_vl:Qwen3VL", Traits(mixture=True)),
    "qwen3_5": Row("gspo_mm.families.qwen3_5:Qwen35", _HYBRID),
    "qwen3_5_moe": Row("gspo_mm.families.qwen3_5:Qwen35", _HYBRID_MIXTURE),
    "qwen2_5_vl": Row("gspo_mm.families.qwen2_5_vl:Qwen25VL", _WINDOWS),
    "glm4v_moe": Row("gspo_mm.families.glm4v:Glm4vMoe", _SIGMOID),
    "gpt_oss": Row("gspo_mm.families.gpt_oss:GptOss", _SINKS),
    "qwen3": Row("gspo_mm.families.qwen3:Qwen3", Traits()),
    "qwen3_moe": Row("gspo_mm.families.qwen3:Qwen3", Traits(mixture=True)),
}


# what is asked for and is not here yet: what of it no module computes
_BLOCKED = {
    "glm4v": "norms behind attention and MLP",
    "kimi_k25": "latent attention",
}


class UnknownFamilyError(GspoError, ValueError):
    """A model folder of a family that is not in the table."""


def family_of(path: str | Path) -> Family:
    """The family of a Hugging Face folder, by `model_type` in its config.json."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UnknownFamilyError(
            f"model.path={path} has no config.json; name a Hugging Face folder (tools/make_tiny_model.py makes one)"
        )
    model_type = read_json(file).get("model_type")
    if model_type not in FAMILIES:
        why = f", for its {_BLOCKED[model_type]}" if model_type in _BLOCKED else ""
        raise UnknownFamilyError(
            f"{file}: model_type={model_type!r} is not supported{why}; use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type].family
