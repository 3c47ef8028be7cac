"""Answers of a real SGLang server that holds the policy's weights in FP8: `pytest -m gpu tests/gpu/test_fp8_push.py`.

Needs a Hopper card or newer and sglang. That every block is in its place is shown without a GPU (tests/sglang); here
SGLang's own FP8 products compute with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gspo_mm.config import Config, parse_config
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.fleet import Fleet
from gspo_mm.serving.served import served
from gspo_mm.sync.parity import check_parity
from gspo_mm.sync.sglang import SGLangPush
from gspo_mm.types import EncodedPrompt
from tests.conftest import run_tool

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
# mean |log-prob of server - of policy|, nats: weights and activations are rounded to 1/16, BF16 to 1/256
LIMIT = 0.1


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("fp8")
    dims = ("hidden_size=256", "head_dim=64", "moe_intermediate_size=384", "initializer_range=0.02")
    run_tool("make_shards.py", "digits", folder / "shards", "--train", 64, "--validation", 8)
    run_tool(
        "make_tiny_model.py", folder / "model", *(part for dim in dims for part in ("--set", f"text.{dim}"))
    )
    return parse_config(
        {
            "run": {"name": "fp8", "dir": str(folder / "runs"), "resume": "never"},
            "model": {"path": str(folder / "model")},
            "data": {"train": [str(folder / "shards/train-*.tar")], "shuffle_buffer": 0},
            "rollout": {
                "engine": "sglang",
                "prompts_per_step": 8,
                "group_size": 2,
                "sglang": {"fp8": True, "mem_fraction": 0.3, "max_tokens": 16384, "context_length": 512},
            },
            "sync": {"mode": "distributed", "bucket_mb": 16},
            "reward": {"file": str(ROOT / "configs/rewards/digits.yaml")},
            "policy": {"dtype": "bfloat16", "optimizer": {"lr": 1e-3}},
        }
    )


@pytest.fixture(scope="module")
def processor(config: Config) -> Processor:
    return Processor(config.model.path, config.data)


@pytest.fixture(scope="module")
def engine(config: Config, processor: Processor) -> Iterator[SGLangEngine]:
    engine = SGLangEngine(config, processor, Fleet(served(config)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts(config: Config, processor: Processor) -> list[EncodedPrompt]:
    return PromptSource(config.data, processor, seed=1, split="train").take(8)


def test_an_fp8_server_answers_nearly_as_the_policy_after_each_of_three_pushes(
    config: Config, processor: Processor, engine: SGLangEngine, prompts: list[EncodedPrompt]
) -> None:
    policy = Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=10)
    push = SGLangPush(config, policy, engine)
    generator = torch.Generator().manual_seed(0)
    for version in (1, 2, 3):
        push.push(version=version)
        gaps = check_parity(policy, engine, processor, prompts, threshold=LIMIT)
        assert max(gap.mean for gap in gaps.values()) > 1e-5, "nothing was rounded"
        with torch.no_grad():
            for name in policy.weights.names():
                parameter = policy.weights[name]
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter) * 0.02)
        policy.forget_features()
    push.close()
