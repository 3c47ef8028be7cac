"""Answers packed behind one copy of their prompt have the log-probs and gradients that transformers gives each by itself."""

from pathlib import Path
from typing import Any

import pytest

from gspo_mm.batch import pack
from gspo_mm.config import PolicyConfig
from gspo_mm.config.layout import PlanError
from gspo_mm.config.policy import MoeConfig
from gspo_mm.policy.engine import Policy
from tests.groups import Pictures, groups
from tests.tiny_vl import save, tiny_glm, tiny_hybrid, tiny_sinks, tiny_text, tiny_vl, tiny_windows
from tools.check_parity import compare

MODELS: dict[str, Any] = {
    "images, a mixture": tiny_vl,
    "images, dense": lambda: tiny_vl(moe=False),
    "images, windows in the tower": tiny_windows,
    "images, sigmoid": tiny_glm,
    "text": tiny_text,
    "sinks and windows": tiny_sinks,
}


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_those_of_each_answer_by_itself(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    policy = Policy.from_hf(
        str(save(model, tmp_path / "hf")), PolicyConfig(dtype="float32"), seed=0, total_steps=1
    )
    assert policy.shares_prompts
    pictures = Pictures(model)
    sequences = groups(model)
    alone, shared = (pack(sequences, pictures, shares_prompts=shares) for shares in (False, True))
    assert [len(tree) for tree in shared.trees] == [5, 4, 3]
    assert shared.num_tokens < 0.6 * alone.num_tokens
    result = compare(policy, model, [alone], given=[shared])
    assert result.max_abs_logprob < 2e-5
    assert result.max_rel_grad < 1e-4, result.worst_grad


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (PolicyConfig(dtype="float32", share_prompts=True, moe=MoeConfig(aux_loss=0.01)), "aux_loss=0.01"),
        (PolicyConfig(dtype="float32", share_prompts=True), "linear attention"),
    ],
)
def test_where_prompts_cannot_be_shared_asking_for_it_is_refused(
    config: PolicyConfig, fault: str, tmp_path: Path
) -> None:
    folder = str(save(tiny_hybrid() if "linear" in fault else tiny_vl(), tmp_path / "hf"))
    with pytest.raises(PlanError, match=f"policy.share_prompts=true does not go with .*{fault}"):
        Policy.from_hf(folder, config, seed=0, total_steps=1)
    left_to_us = config.model_copy(update={"share_prompts": None})
    assert not Policy.from_hf(folder, left_to_us, seed=0, total_steps=1).shares_prompts
