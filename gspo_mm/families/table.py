"""The table of model families: one file each, one line each."""

from __future__ import annotations

from pathlib import Path

from gspo_mm.families.base import Family
from gspo_mm.families.glm4v import Glm4vMoe
from gspo_mm.families.gpt_oss import GptOss
from gspo_mm.families.qwen2_5_vl import Qwen25VL
from gspo_mm.families.qwen3 import Qwen3
from gspo_mm.families.qwen3_5 import Qwen35
from gspo_mm.families.qwen3_vl import Qwen3VL
from gspo_mm.hf.headers import read_json
from gspo_mm.types import GspoError

FAMILIES: dict[str, Family] = {
    "qwen3_vl": Qwen3VL(),
    "qwen3_vl_moe": Qwen3VL(),
    "qwen3_5": Qwen35(),
    "qwen3_5_moe": Qwen35(),
    "qwen2_5_vl": Qwen25VL(),
    "glm4v_moe": Glm4vMoe(),
    "gpt_oss": GptOss(),
    "qwen3": Qwen3(),
    "qwen3_moe": Qwen3(),
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
        raise UnknownFamilyError(
            f"{file}: model_type={model_type!r} is not supported; use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
