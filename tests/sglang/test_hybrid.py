"""A model with linear attention on a server of its own: it answers as the policy, and uses states that it has kept.

SGLang's server, scheduler, cache and model code; the delta rule is gspo_mm/serving/cpu_delta.py's, other kernels are
SGLang's, run by Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.admin import call_all
from gspo_mm.serving.fleet import Fleet
from gspo_mm.serving.server import bearer
from gspo_mm.sync.sglang import SGLangPush
from gspo_mm.types import EncodedPrompt
from tests.sglang.conftest import MakeConfig
from tests.sglang.test_push import assert_follows, perturb
from tools.make_tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def hybrid_config(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("hybrid") / "qwen3_5_moe"
    make_tiny_model(path, family="qwen3_5_moe")
    return make_config("hybrid", model={"path": str(path)})


@pytest.fixture(scope="module")
def reader(hybrid_config: Config) -> Processor:
    return Processor(hybrid_config.model.path, hybrid_config.data)


@pytest.fixture(scope="module")
def some(reader: Processor, prompts: list[EncodedPrompt]) -> list[EncodedPrompt]:
    """One each with 0, 1, 2 and 3 images: the interpreter takes a second for each."""
    return [reader.encode(each.prompt) for each in prompts[:4]]


@pytest.fixture(scope="module")
def hybrid(hybrid_config: Config, reader: Processor) -> Iterator[SGLangEngine]:
    engine = SGLangEngine(hybrid_config, reader, Fleet(hybrid_config))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def policy(hybrid_config: Config) -> Policy:
    return Policy.from_hf(hybrid_config.model.path, hybrid_config.policy, seed=0, total_steps=1)


def test_the_server_answers_as_the_policy_before_and_after_an_update(
    hybrid_config: Config,
    hybrid: SGLangEngine,
    policy: Policy,
    reader: Processor,
    some: list[EncodedPrompt],
) -> None:
    push = SGLangPush(hybrid_config, policy, hybrid)
    assert_follows(push, policy, hybrid, reader, some)
    push.close()


def ask(engine: SGLangEngine, ids: list[int]) -> dict[str, Any]:
    """Four greedy tokens after `ids`."""
    (server,) = engine.fleet.up()
    sampling = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}
    reply = httpx.post(
        server.url + "/generate",
        json={"input_ids": ids, "sampling_params": sampling, "return_logprob": True},
        headers=bearer(server.api_key),
        timeout=600,
    )
    reply.raise_for_status()
    return reply.json()


def logprobs(reply: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([logprob for logprob, *_ in reply["meta_info"]["output_token_logprobs"]])


def test_states_that_were_kept_are_gone_on_with_until_a_push(
    hybrid_config: Config, hybrid: SGLangEngine, policy: Policy
) -> None:
    push = SGLangPush(hybrid_config, policy, hybrid)
    push.push(version=11)
    ids = list(range(40, 70))
    first = ask(hybrid, ids)
    longer = [*ids, *first["output_ids"], 71, 72, 73]
    kept = ask(hybrid, longer)
    assert kept["meta_info"]["cached_tokens"] >= len(ids)
    call_all(hybrid.fleet.up(), "/flush_cache", timeout=600)
    anew = ask(hybrid, longer)
    assert anew["meta_info"]["cached_tokens"] == 0
    assert kept["output_ids"] == anew["output_ids"]
    assert torch.allclose(logprobs(kept), logprobs(anew), rtol=0, atol=1e-5)
    perturb(policy, seed=5)
    push.push(version=12)
    after = ask(hybrid, longer)
    assert after["meta_info"]["cached_tokens"] == 0
    assert (logprobs(after) - logprobs(anew)).abs().max() > 1e-3
    push.close()
