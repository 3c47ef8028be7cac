"""Keys that SGLang goes by and transformers does not: refused by name where the two would differ. Costs 3 s."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.families.table import family_of
from gspo_mm.types import GspoError
from tests.tiny_vl import save, tiny_glm, tiny_vl, tiny_windows

ROPE = "text_config.rope_parameters"
QWEN3, QWEN25, GLM = tiny_vl, lambda: tiny_windows(vision={"patch_size": 14}), tiny_glm


@pytest.mark.parametrize(
    ("make", "section", "key", "value", "message"),
    [
        (QWEN3, ROPE, "mrope_interleaved", None, r"mrope_interleaved .* is false \(or not set\), .*; set it to true, or"),
        (QWEN3, ROPE, "mrope_interleaved", False, r"mrope_interleaved .* is false \(or not set\), .*; set it to true, or"),
        (QWEN3, ROPE, "mrope_interleaved_glm", True, r"mrope_interleaved_glm .* is true, .*; set it to false, or"),
        (QWEN3, "text_config", "norm_topk_prob", False, r"text_config\.norm_topk_prob .* is not true, .*; set it to true, or"),
        (QWEN25, ROPE, "mrope_interleaved", True, r"mrope_interleaved .* is true, .*; set it to false, or"),
        (GLM, ROPE, "mrope_interleaved", True, r"mrope_interleaved .* is true, .*; set it to false, or"),
        (GLM, ROPE, "mrope_interleaved_glm", True, r"mrope_interleaved_glm .* is true, .*; set it to false, or"),
        (GLM, ROPE, "video_rope", True, r"video_rope .* is true, .*; set it to false, or"),
        (GLM, "vision_config.rope_parameters", "rope_theta", 5e6, r"vision_config\.rope_parameters\.rope_theta=5000000\.0"),
        (GLM, "vision_config", "hidden_act", "gelu", r'vision_config\.hidden_act="gelu" .*"silu"; set rollout\.engine=embedded'),
    ],
)  # fmt: skip
def test_what_sglang_would_compute_in_another_way_is_refused(
    make: Callable[[], Any], section: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    folder = save(make(), tmp_path)
    family = family_of(folder)
    family.check_served(family.load_config(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    inner = config
    for name in section.split("."):
        inner = inner[name]
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GspoError, match=message):
        family.check_served(family.load_config(str(folder)))


def test_a_dense_model_may_say_what_it_likes_about_routing(tmp_path: Path) -> None:
    folder = save(tiny_vl(moe=False, norm_topk_prob=False), tmp_path)
    family = family_of(folder)
    family.check_served(family.load_config(str(folder)))
