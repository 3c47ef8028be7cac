"""Image work is dealt out, and features that cannot change are made once."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gspo_mm.config import PolicyConfig
from gspo_mm.families.folder import read_hf
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.vision import deepstack_leaves, split_by_weight
from tests.tiny_vl import save, tiny_vl
from tools.check_parity import random_batch


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 6))
def test_images_are_split_into_consecutive_runs_of_like_weight(weights: list[int], parts: int) -> None:
    shares = split_by_weight(weights, parts)
    assert len(shares) == parts
    assert [i for share in shares for i in share] == list(range(len(weights)))
    even = sum(weights) / parts
    for share in shares:
        assert sum(weights[i] for i in share) <= even + max(weights, default=0)


def test_gradients_of_deepstack_leaves_come_back_through_the_features() -> None:
    source = torch.ones(3, 2, requires_grad=True)
    features, leaves = deepstack_leaves(source * 2, [source * 3, source * 5])
    for leaf, factor in zip(leaves, (7.0, 11.0), strict=True):
        (leaf.detach().requires_grad_() * factor).sum()  # what a recomputed layer would do
        leaf.grad = torch.full_like(leaf, factor)
    features.sum().backward()
    assert torch.equal(source.grad, torch.full((3, 2), 2.0 + 3 * 7 + 5 * 11))
    with torch.no_grad():
        assert deepstack_leaves(source, [source])[1][0] is source


def calls_of(policy: Policy) -> list[int]:
    """Images that each call of the tower was given; the list grows."""
    seen: list[int] = []
    policy.chunks[0].visual.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    return seen


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_vl(num_hidden_layers=3)


def policy(model: Any, folder: Path, **settings: Any) -> Policy:
    config = PolicyConfig.model_validate({"dtype": "float32", **settings})
    return Policy.from_hf(str(save(model, folder)), config, seed=0, total_steps=3)


def test_a_frozen_towers_features_are_made_once_for_all_passes(model: Any, tmp_path: Path) -> None:
    batch = random_batch(model, images=3)
    frozen = policy(model, tmp_path / "hf", freeze=["vision", "projector"])
    calls = calls_of(frozen)
    (first,) = frozen.logprobs([batch])
    (again,) = frozen.logprobs([batch])
    frozen.update([batch], lambda _, lp, __: (-lp.sum() / 100, {}))
    assert calls == [3]
    assert torch.equal(first, again)
    other = dataclasses.replace(batch, image_keys=("new", *batch.image_keys[1:]))
    frozen.logprobs([other])
    assert calls == [3, 1]
    frozen.load_hf(read_hf(tmp_path / "hf"))
    frozen.logprobs([batch])
    assert calls == [3, 1, 3]  # other weights, other features


def test_without_room_or_with_a_trained_part_features_are_made_anew(model: Any, tmp_path: Path) -> None:
    batch = random_batch(model, images=3)
    for number, settings in enumerate(
        ({"freeze": ["vision", "projector"], "vision_cache_mb": 0}, {"freeze": ["vision"]}, {})
    ):
        trained = policy(model, tmp_path / str(number), **settings)
        calls = calls_of(trained)
        trained.logprobs([batch])
        trained.logprobs([batch])
        assert calls == [3, 3], settings


def test_a_micro_batch_without_images_still_gives_the_tower_a_gradient_of_zero(
    model: Any, tmp_path: Path
) -> None:
    trained = policy(model, tmp_path / "hf")
    trained.backward([random_batch(model, images=0)], lambda _, lp, __: (lp.sum(), {}))
    gradients = {n: g for n, g in trained.export_gradients() if n.startswith("model.visual")}
    assert gradients
    assert all(not g.any() for g in gradients.values())
