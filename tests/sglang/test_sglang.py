"""The client against a real server: ids, log-probs and versions are the ones that training relies on."""

from __future__ import annotations

import dataclasses
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from gspo_mm.config import Config
from gspo_mm.rollout.requests import PromptMismatchError
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.server import ServerError
from gspo_mm.sync.sglang import SGLangPush
from gspo_mm.types import EncodedPrompt, Finish, SamplingParams


@pytest.fixture(scope="module", autouse=True)
def _weights(engine: SGLangEngine, config: Config) -> None:
    SGLangPush.serve_folder(config, engine)


def test_a_group_holds_as_many_answers_as_asked_for(
    engine: SGLangEngine, prompts: list[EncodedPrompt]
) -> None:
    groups = engine.generate(
        prompts, group_size=3, sampling=SamplingParams(temperature=1.0, max_new_tokens=6), seed=0
    )
    assert len(groups) == len(prompts)
    for group in groups:
        assert len(group) == 3
        for completion in group:
            assert 1 <= len(completion.token_ids) <= 6
            assert len(completion.logprobs) == len(completion.versions) == len(completion.token_ids)
            assert set(completion.versions) == {0}
            assert completion.finish in (Finish.STOP, Finish.LENGTH)
    answers = {c.token_ids for group in groups for c in group}
    assert len(answers) > 2 * len(prompts)  # they are drawn apart


def test_a_prompt_that_the_server_expands_otherwise_is_refused(
    engine: SGLangEngine, prompts: list[EncodedPrompt]
) -> None:
    """Training would use ids that the answer was not sampled from."""
    prompt = prompts[1]
    ids = list(prompt.token_ids)
    first_image_token = ids.index(engine._processor.image_token_id)
    wrong = dataclasses.replace(
        prompt, token_ids=tuple(ids[:first_image_token] + ids[first_image_token + 1 :])
    )
    with pytest.raises(PromptMismatchError, match="prompt 1"):
        engine.generate([wrong], group_size=2, sampling=SamplingParams(max_new_tokens=2), seed=0)


def test_what_the_server_refuses_is_not_sent_again(
    engine: SGLangEngine, prompts: list[EncodedPrompt]
) -> None:
    with pytest.raises(ServerError, match="refused a prompt with status 400"):
        engine.generate(prompts[:1], group_size=2, sampling=SamplingParams(temperature=-1.0), seed=0)


def test_requests_without_the_key_are_refused(engine: SGLangEngine) -> None:
    (server,) = engine.fleet.up()
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 1}}
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx.post(server.url + "/generate", json=body, headers=headers).status_code == 401
    user = {"Authorization": f"Bearer {server.api_key}"}
    assert httpx.post(server.url + "/generate", json=body, headers=user, timeout=60).status_code == 200
    assert httpx.post(server.url + "/flush_cache", headers=user).status_code == 401


def test_a_server_on_loopback_listens_nowhere_else(engine: SGLangEngine) -> None:
    (server,) = engine.fleet.up()
    port = urlsplit(server.url).port
    everywhere = psutil.net_connections(kind="inet")
    (owner,) = {c.pid for c in everywhere if c.status == "LISTEN" and c.laddr.port == port}
    processes = [psutil.Process(owner), *psutil.Process(owner).children(recursive=True)]
    pids = {process.pid for process in processes}
    heard = [c.laddr for c in everywhere if c.status == "LISTEN" and c.pid in pids]
    assert heard
    assert {address.ip for address in heard} == {"127.0.0.1"}
