"""The preflight agrees where both sides are the same model, and tells where they are not."""

from __future__ import annotations

import pytest
import torch

from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.sync.parity import PLACES, ParityError, check_parity, table
from gspo_mm.sync.sglang import SGLangPush
from gspo_mm.types import EncodedPrompt


@pytest.fixture
def policy(config: Config, engine: SGLangEngine) -> Policy:
    SGLangPush.serve_folder(config, engine)
    return Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=1)


def damage(policy: Policy, part: str) -> None:
    """Change one part of the policy, which the server does not follow."""
    found = [p for chunk in policy.chunks for name, p in chunk.named_parameters() if part in name]
    assert found
    with torch.no_grad():
        for parameter in found:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.forget_features()


def test_servers_and_policy_agree_at_every_place(
    policy: Policy, engine: SGLangEngine, processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    gaps = check_parity(policy, engine, processor, prompts[:8], threshold=1e-4)
    assert set(gaps) == set(PLACES)
    assert all(gap.largest < 1e-4 and gap.tokens > 50 for gap in gaps.values())
    assert all(place in table(gaps) for place in PLACES)


def test_a_stale_tower_shows_after_images_and_not_in_text(
    policy: Policy, engine: SGLangEngine, processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    damage(policy, "visual.")
    gaps = check_parity(policy, engine, processor, prompts[:8], threshold=100.0)
    assert gaps["text"].largest < 1e-4
    assert gaps["after an image"].mean > 1e-2
    with pytest.raises(ParityError, match="text agrees, what follows an image does not, in most samples"):
        check_parity(policy, engine, processor, prompts[:8], threshold=1e-3)


def test_a_wrong_decoder_shows_in_text(
    policy: Policy, engine: SGLangEngine, processor: Processor, prompts: list[EncodedPrompt]
) -> None:
    damage(policy, "linear_qkv.weight")
    gaps = check_parity(policy, engine, processor, prompts[:8], threshold=100.0)
    assert gaps["text"].mean > 1e-2
    with pytest.raises(ParityError, match=r"plain text differs already.*extra_args"):
        check_parity(policy, engine, processor, prompts[:8], threshold=1e-3)
