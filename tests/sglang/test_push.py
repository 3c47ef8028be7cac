"""Weights on a real server: after every push it answers as the policy would, whatever way they took."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
import torch

from gspo_mm.batch import answered, pack
from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.policy.canary import blank_image
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.admin import Calls, begin_update, is_fine
from gspo_mm.serving.server import ServerError
from gspo_mm.sync.checksums import Checksums
from gspo_mm.sync.sglang import SGLangPush
from gspo_mm.types import Completion, EncodedPrompt, GspoError, SamplingParams
from tests.parallel.layouts import set_pairs
from tests.sglang.conftest import MakeConfig
from tests.sglang.ties import logprobs_and_comparable
from tests.waiting import PATIENCE, eventually

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
MODES = ["disk", "distributed", "tensor"]
VERSIONS = itertools.count(
    100
)  # that no other test uses: with in_place, servers keep what they cached under a version


@pytest.fixture(scope="module")
def policy(config: Config) -> Policy:
    return Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=10)


@pytest.fixture(scope="module")
def embedded(config: Config, processor: Processor) -> EmbeddedEngine:
    return EmbeddedEngine(config.model.path, processor, dtype=torch.float32, max_batch=64)


@pytest.fixture(scope="module")
def some(prompts: list[EncodedPrompt]) -> list[EncodedPrompt]:
    """Two each with 0, 1, 2 and 3 images."""
    return prompts[:8]


@pytest.fixture
def push(
    request: pytest.FixtureRequest, make_config: MakeConfig, policy: Policy, engine: SGLangEngine
) -> Iterator[SGLangPush]:
    """By the way that the test is parametrised with."""
    config = make_config(sync={"mode": request.param})
    push = SGLangPush(config, policy, engine)
    yield push
    push.close()


def perturb(policy: Policy, seed: int, part: str = "") -> None:
    """Other weights, in all of the policy or in the parameters whose names begin with `part`."""
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    with torch.no_grad():
        for name in policy.weights.names():
            if name.startswith(part):
                parameter = policy.weights[name]
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
                changed += 1
    assert changed
    policy.forget_features()


def greedy(engine: SGLangEngine, prompts: list[EncodedPrompt]) -> list[Completion]:
    return [c for (c,) in engine.generate(prompts, group_size=1, sampling=GREEDY, seed=0)]


def logprobs(
    policy: Policy, processor: Processor, prompts: list[EncodedPrompt], answers: list[Completion]
) -> list[torch.Tensor]:
    sequences = [answered(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    return policy.logprobs([pack([sequence], processor) for sequence in sequences])


def gap(
    policy: Policy, processor: Processor, prompts: list[EncodedPrompt], answers: list[Completion]
) -> float:
    """The largest difference between the server's log-probs and the policy's."""
    ours = logprobs(policy, processor, prompts, answers)
    return max(
        (own - torch.tensor(answer.logprobs)).abs().max().item()
        for own, answer in zip(ours, answers, strict=True)
    )


def assert_follows(
    push: SGLangPush, policy: Policy, engine: SGLangEngine, reader: Processor, prompts: list[EncodedPrompt]
) -> None:
    """The server answers as the policy before and after an update."""
    path = policy.hf.name_or_path
    embedded = EmbeddedEngine(path, reader, dtype=torch.float32, max_batch=64)
    for version in range(1, 3):
        push.push(version=version)
        answers = greedy(engine, prompts)
        embedded.load_weights(policy.export(), version=version)
        expected = embedded.generate(prompts, group_size=1, sampling=GREEDY, seed=0)
        assert [a.token_ids for a in answers] == [e.token_ids for (e,) in expected]
        assert {v for answer in answers for v in answer.versions} == {version}
        assert gap(policy, reader, prompts, answers) <= 1e-4
        perturb(policy, seed=version)
        assert gap(policy, reader, prompts, answers) > 1e-3, "the server cannot have these weights yet"


@pytest.mark.parametrize("push", MODES, indirect=True)
def test_the_server_answers_as_the_policy_before_and_after_each_of_five_updates(
    push: SGLangPush,
    policy: Policy,
    engine: SGLangEngine,
    embedded: EmbeddedEngine,
    processor: Processor,
    some: list[EncodedPrompt],
) -> None:
    seen = set()
    for version in range(1, 7):
        push.push(version=version)
        assert engine.version == version
        answers = greedy(engine, some)
        embedded.load_weights(policy.export(), version=version)
        expected = embedded.generate(some, group_size=1, sampling=GREEDY, seed=0)
        assert [a.token_ids for a in answers] == [e.token_ids for (e,) in expected]
        assert {v for answer in answers for v in answer.versions} == {version}
        assert gap(policy, processor, some, answers) <= 1e-4
        seen.add(tuple(a.logprobs for a in answers))
        perturb(policy, seed=version)
        assert gap(policy, processor, some, answers) > 1e-3, "the server cannot have these weights yet"
    assert len(seen) == 6


@pytest.mark.parametrize("mode", ["disk", "distributed"])
def test_servers_get_weights_with_adapters_merged(
    mode: str, make_config: MakeConfig, engine: SGLangEngine, processor: Processor, some: list[EncodedPrompt]
) -> None:
    targets = ["attention", "experts", "projector"]
    config = make_config(sync={"mode": mode}, policy={"lora": {"rank": 4, "targets": targets}})
    adapted = Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=10)
    push = SGLangPush(config, adapted, engine)
    for changed in (False, True):
        if changed:
            set_pairs(adapted)
            assert gap(adapted, processor, some, greedy(engine, some)) > 1e-3
        push.push(version=next(VERSIONS))
        assert gap(adapted, processor, some, greedy(engine, some)) <= 1e-4
    push.close()


@pytest.mark.parametrize("push", MODES, indirect=True)
def test_when_only_the_vision_tower_changes_the_same_prompt_gets_another_answer(
    push: SGLangPush, policy: Policy, engine: SGLangEngine, processor: Processor, some: list[EncodedPrompt]
) -> None:
    """Neither prefixes nor image features that the old tower computed may answer: SGLang keeps both."""
    push.push(version=1)
    before = greedy(engine, some)
    again = greedy(engine, some)  # by now the server has kept all that it keeps
    assert [a.token_ids for a in again] == [b.token_ids for b in before]
    perturb(policy, seed=7, part="visual.")
    push.push(version=2)
    after = greedy(engine, some)
    assert gap(policy, processor, some, after) <= 1e-4
    for prompt, old, new in zip(some, before, after, strict=True):
        moved = max(abs(a - b) for a, b in zip(old.logprobs, new.logprobs, strict=False))
        assert (moved > 1e-4) == bool(prompt.prompt.images), prompt.prompt.key


@pytest.mark.parametrize("on_update", ["retract", "in_place"])
@pytest.mark.parametrize("mode", MODES)
def test_an_answer_under_way_goes_on_with_the_new_weights(
    mode: str,
    on_update: str,
    make_config: MakeConfig,
    policy: Policy,
    engine: SGLangEngine,
    processor: Processor,
    some: list[EncodedPrompt],
) -> None:
    push = SGLangPush(make_config(sync={"mode": mode}, rollout={"on_update": on_update}), policy, engine)
    first, second = next(VERSIONS), next(VERSIONS)
    push.push(version=first)
    greedy(engine, some)  # prefixes that later prompts must not be given
    under_way = engine.start(some[3], 1, SamplingParams(temperature=0.0, max_new_tokens=200))
    eventually(lambda: running(engine) > 0)
    old = {name: policy.weights[name].detach().clone() for name in policy.weights.names()}
    perturb(policy, seed=13)
    push.push(version=second)
    assert gap(policy, processor, some, greedy(engine, some)) <= 1e-4
    (answer,) = under_way.result(timeout=PATIENCE)
    switch = answer.versions.index(second)
    assert switch > 0
    assert answer.versions == (first,) * switch + (second,) * (len(answer.versions) - switch)
    off, comparable = compare(policy, processor, some[3], answer)
    told = (
        f"switch {switch}, off at {off.nonzero().flatten().tolist()}, {int(comparable.sum())} can be compared"
    )
    if on_update == "retract":
        assert not (off & comparable)[switch:].any(), told
    else:
        assert off[switch:].any(), f"it goes on from keys and values of the old weights; {told}"
    with torch.no_grad():
        for name, tensor in old.items():
            policy.weights[name].copy_(tensor)
    policy.forget_features()
    off, comparable = compare(policy, processor, some[3], answer)
    told = f"switch {switch}, off at {off}, {int(comparable.sum())} can be compared"
    assert not (off & comparable)[:switch].any(), told
    push.close()


def compare(
    policy: Policy, processor: Processor, prompt: EncodedPrompt, answer: Completion
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] bool: which of the answer's log-probs are not the policy's; and where no rounding explains that."""
    own, comparable = logprobs_and_comparable(policy, processor, answered(prompt, answer.token_ids))
    return (own - torch.tensor(answer.logprobs)).abs() > 1e-4, comparable


def running(engine: SGLangEngine) -> int:
    """Answers that the server is making."""
    (server,) = engine.fleet.up()
    headers = {"Authorization": f"Bearer {server.api_key}"}
    reply = httpx.get(f"{server.url}/v1/loads", headers=headers, timeout=PATIENCE)
    return sum(load["num_running_reqs"] for load in reply.json()["loads"])


@pytest.mark.parametrize("push", MODES, indirect=True)
def test_the_server_sees_after_a_push(
    push: SGLangPush, engine: SGLangEngine, some: list[EncodedPrompt]
) -> None:
    """The canary of a blind run: the answer's log-prob moves when its images are blanked."""
    push.push(version=1)
    seen = [prompt for prompt in some if prompt.prompt.images]
    blank = [
        dataclasses.replace(
            p, prompt=dataclasses.replace(p.prompt, images=tuple(blank_image(i) for i in p.prompt.images))
        )
        for p in seen
    ]
    for answer, blind in zip(greedy(engine, seen), greedy(engine, blank), strict=True):
        assert max(abs(a - b) for a, b in zip(answer.logprobs, blind.logprobs, strict=False)) > 1e-3


@pytest.mark.parametrize("push", MODES, indirect=True)
@pytest.mark.parametrize(
    "name", ["model.visual.patch_embed.proj.weight", "model.language_model.layers.1.mlp.gate.weight"]
)
def test_a_tensor_that_arrives_changed_is_noticed(
    push: SGLangPush, name: str, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(
        self: Checksums, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for sent, tensor in tensors:
            self.note(sent, tensor)
            yield sent, tensor * 1.001 if sent == name else tensor

    monkeypatch.setattr(Checksums, "noted", noted)
    with pytest.raises(
        ServerError, match=f"other values of 1 of .* first {policy.family.whole_tensor(name)}"
    ):
        push.push(version=3)


@pytest.mark.parametrize("push", ["distributed", "tensor"], indirect=True)
def test_a_tensor_that_is_left_out_is_noticed(
    push: SGLangPush, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.language_model.layers.2.self_attn.q_proj.weight"
    for way in ("export", "export_own"):
        whole = getattr(policy.weights, way)

        def partial(*args: Any, whole: Any = whole, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
            return ((n, tensor) for n, tensor in whole(*args, **options) if n != name)

        monkeypatch.setattr(policy.weights, way, partial)
    with pytest.raises(GspoError, match=f"sent {name} 0 times"):
        push.push(version=3)


@pytest.mark.parametrize("push", ["distributed"], indirect=True)
def test_an_update_that_was_interrupted_does_not_stop_the_next(
    push: SGLangPush, policy: Policy, engine: SGLangEngine, processor: Processor, some: list[EncodedPrompt]
) -> None:
    (server,) = engine.fleet.up()
    with Calls([server], timeout=30) as calls:
        begin_update(calls)
    push.push(version=4)
    assert gap(policy, processor, some[:2], greedy(engine, some[:2])) <= 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_gave_its_memory_back_has_it_again_after_a_push(
    mode: str,
    make_config: MakeConfig,
    policy: Policy,
    engine: SGLangEngine,
    processor: Processor,
    some: list[EncodedPrompt],
) -> None:
    config = make_config(sync={"mode": mode}, rollout={"sglang": {"colocate": True}})
    push = SGLangPush(config, policy, engine)
    push.push(version=1)
    engine.start(some[0], 2, SamplingParams(max_new_tokens=400)).cancel()  # given up, and may still run
    push.make_room()
    (server,) = engine.fleet.up()
    assert not is_fine(server, "/ready", timeout=10)
    perturb(policy, seed=11)
    push.push(version=2)
    assert gap(policy, processor, some, greedy(engine, some)) <= 1e-4
    push.close()
