"""Families on servers of their own: they answer as the policy before and after a push. Each costs one server start."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.data.processor import Processor
from gspo_mm.families.table import family_of
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.fleet import Fleet
from gspo_mm.sync.sglang import SGLangPush
from gspo_mm.types import EncodedPrompt
from tests.sglang.conftest import MakeConfig
from tests.sglang.test_push import assert_follows
from tools.make_tiny_model import make_tiny_model

# family -> what its folder's config and the run's `data` differ in
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # pictures of 64 x 64 are scaled down by both sides
    "glm4v_moe": ({"routed_scaling_factor": 1.5}, {"max_pixels": 48 * 48}),
    "qwen2_5_vl": ({}, {}),
    "qwen3": ({}, {}),
    "qwen3_5": ({}, {}),
    "qwen3_vl": ({}, {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_server_answers_as_the_policy_before_and_after_an_update(
    name: str, make_config: MakeConfig, prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    text, data = FAMILIES[name]
    make_tiny_model(tmp_path / "hf", family=name, text=text)
    config = make_config(name, model={"path": str(tmp_path / "hf")}, data=data)
    reader = Processor(config.model.path, config.data)
    policy = Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=1)
    takes_images = family_of(config.model.path).image_token_id(policy.hf) is not None
    some = [each for each in prompts if takes_images or not each.prompt.images][:4]
    with (
        closing(SGLangEngine(config, reader, Fleet(config))) as engine,
        closing(SGLangPush(config, policy, engine)) as push,
    ):
        assert_follows(push, policy, engine, reader, [reader.encode(each.prompt) for each in some])
