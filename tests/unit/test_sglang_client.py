"""What the client sends, what it makes of the replies, and what it does when a server fails."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from PIL import Image
from tenacity import wait_none

from gspo_mm.config import parse_config
from gspo_mm.environment.conversation import Conversation
from gspo_mm.rollout import sglang as module
from gspo_mm.rollout.replies import versions_of
from gspo_mm.rollout.requests import PromptMismatchError, collapse_images
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving import fleet
from gspo_mm.serving.admin import call_all
from gspo_mm.serving.fleet import Fleet
from gspo_mm.serving.registry import register, servers_folder
from gspo_mm.serving.router import GROUP
from gspo_mm.serving.server import Server, ServerError
from gspo_mm.types import Completion, EncodedImage, EncodedPrompt, Finish, GspoError, Prompt, SamplingParams
from tests.fake_server import Action, FakeServer, Handler, Hang, answers, drop, reply, status
from tests.tars import image_bytes
from tests.waiting import PATIENCE, eventually

STOP, IMAGE = 99, 7
SAMPLING = SamplingParams(max_new_tokens=4)


class Tokens:
    stop_token_ids: tuple[int, ...] = (STOP, 98)
    image_token_id = IMAGE

    def decode(self, token_ids: Iterable[int]) -> str:
        return " ".join(map(str, token_ids))


def image(data: bytes) -> EncodedImage:
    return EncodedImage(data=data, key=hashlib.sha256(data).hexdigest(), width=1, height=1)


def prompt(
    *token_ids: int, images: tuple[EncodedImage, ...] = (), grids: torch.Tensor | None = None
) -> EncodedPrompt:
    return EncodedPrompt(
        prompt=Prompt(key="digits/7", messages=(), images=images, answer="1", task="digit"),
        token_ids=token_ids,
        pixel_values=None,
        image_grid_thw=grids,
    )


TEXT = prompt(1, 2, 3)
# two images of four and two tokens
PICTURES = prompt(
    1, *[IMAGE] * 4, 2, *[IMAGE] * 2, 3,
    images=(image(image_bytes()), image(image_bytes(Image.new("RGB", (4, 4))))),
    grids=torch.tensor([[1, 4, 4], [1, 2, 4]]),
)  # fmt: skip


type MakeEngine = Callable[..., SGLangEngine]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def make_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEngine]:
    """`open_engine`, closed at the end."""
    monkeypatch.setattr(module, "wait_exponential", lambda **_: wait_none())
    monkeypatch.setattr(module, "wait_random", lambda *_: wait_none())
    monkeypatch.setattr(fleet, "_POLL", 0.02)
    engines: list[SGLangEngine] = []

    def make(*servers: FakeServer, **settings: Any) -> SGLangEngine:
        engines.append(open_engine(tmp_path, *servers, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def open_engine(runs: Path, *servers: FakeServer, max_in_flight: int = 256, **settings: Any) -> SGLangEngine:
    """An engine on fake servers, all of which hold the weights of version 0."""
    config = parse_config(
        {
            "run": {"name": "run", "dir": str(runs)},
            "model": {"path": "m"},
            "data": {"train": ["a.tar"]},
            "reward": {"file": "r.yaml"},
            "rollout": {
                "engine": "sglang",
                "max_in_flight": max_in_flight,
                "sglang": {"start": "elsewhere", "start_timeout": 60, "down_timeout": 60} | settings,
            },
        }
    )
    folder = servers_folder(config.run.path)
    for number, server in enumerate(servers):
        register(folder, registration(server, f"server-{number}"))
    engine = SGLangEngine(config, Tokens(), Fleet(config))
    eventually(lambda: len(engine.fleet.up()) == len(servers))
    engine.run(engine.fleet.hold(0, engine.fleet.up()))
    return engine


def registration(server: FakeServer, name: str) -> Server:
    return Server(name=name, generation=name, state="up", url=server.url, api_key="user", admin_key="admin")


def sample(engine: SGLangEngine, prompt: EncodedPrompt = TEXT, *, group_size: int = 2) -> list[Any]:
    (group,) = engine.generate([prompt], group_size=group_size, sampling=SAMPLING, seed=0)
    return group


# --- what is sent


def test_parameters_and_stop_tokens_are_sent_as_configured(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    sampling = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=5)
    make_engine(server).generate([TEXT], group_size=3, sampling=sampling, seed=0)
    (request,) = server.prompts()
    assert request.body == {
        "input_ids": [[1, 2, 3]],
        "image_data": None,
        "sampling_params": {
            "n": 3,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 20,
            "max_new_tokens": 5,
            "stop_token_ids": [STOP, 98],
        },
        "return_logprob": True,
        "return_prompt_token_ids": True,
        "priority": 1,
        "extra_key": ANY,
    }
    assert request.headers["Authorization"] == "Bearer user"


def test_prefixes_are_shared_only_by_prompts_of_one_run_and_version(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    engine = make_engine(server)
    sample(engine)
    sample(engine)
    engine.run(engine.fleet.hold(engine.version + 1, engine.fleet.up()))
    sample(engine)
    sample(make_engine(server))
    first, again, newer, other = [prompt.body["extra_key"] for prompt in server.prompts()]
    assert first == again
    assert len({first, newer, other}) == 3


def test_top_k_off_is_what_servers_call_off(server: FakeServer, make_engine: MakeEngine) -> None:
    sample(make_engine(server))
    assert server.prompts()[0].body["sampling_params"]["top_k"] == -1


def test_answers_that_somebody_waits_for_go_before_those_of_the_next_batch(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    engine = make_engine(server)
    engine.start(TEXT, 2, SAMPLING).result(timeout=PATIENCE)
    sample(engine)
    first, second = (request.body["priority"] for request in server.prompts())
    assert first < second


def test_images_are_sent_once_for_a_whole_group_and_unexpanded(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    server.answer = lambda body: [
        reply(PICTURES.token_ids, [number]) for number in range(body["sampling_params"]["n"])
    ]
    group = sample(make_engine(server), PICTURES, group_size=4)
    assert len(group) == 4
    (request,) = server.prompts()
    assert request.body["sampling_params"]["n"] == 4
    assert request.body["input_ids"] == [[1, IMAGE, 2, IMAGE, 3]]
    (sent,) = request.body["image_data"]
    assert [base64.b64decode(url.partition(";base64,")[2]) for url in sent] == [
        picture.data for picture in PICTURES.prompt.images
    ]
    for picture in PICTURES.prompt.images:
        assert request.raw.count(base64.b64encode(picture.data)) == 1


def test_images_side_by_side_cannot_be_told_apart_and_are_refused() -> None:
    with pytest.raises(AssertionError, match="set apart"):
        collapse_images([1, IMAGE, IMAGE, 2], IMAGE, torch.ones(2, 3))


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


@pytest.mark.parametrize("asked", [TEXT, PICTURES])
def test_no_request_ever_asks_for_routed_experts(
    server: FakeServer, make_engine: MakeEngine, asked: EncodedPrompt
) -> None:
    server.answer = lambda body: [reply(asked.token_ids, [5]) for _ in range(body["sampling_params"]["n"])]
    server.script.append(status(500))  # nor does one that is sent again
    engine = make_engine(server)
    sample(engine, asked)
    engine.start(asked, 2, SAMPLING).result(timeout=PATIENCE)
    assert len(server.prompts()) == 3
    for request in server.prompts():
        names = {key.lower() for key in keys(request.body)}
        assert "sampling_params" in names
        assert not {name for name in names if "rout" in name or "expert" in name}
        assert b"routed" not in request.raw.lower()
        assert not [header for header in request.headers.items() if "routed" in str(header).lower()]


class ThreeTurns:
    """Leads answers to their third turn with nothing in between."""

    async def follow(self, led: Conversation) -> Completion | Conversation:
        return led.answer if len(led.answer.turns) == 3 else replace(led, most=4)

    def close(self) -> None:
        pass


def test_all_turns_of_a_group_are_asked_for_under_one_name(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    engine: Any = make_engine(server)
    engine._conversations = ThreeTurns()
    groups = engine.generate([TEXT, prompt(4)], group_size=2, sampling=SAMPLING, seed=0)
    assert [len(answer.turns) for answers in groups for answer in answers] == [3] * 4
    asked: dict[str, list[int]] = {}
    for request in server.prompts():
        asked.setdefault(request.headers[GROUP.title()], []).append(request.body["input_ids"][0][0])
    assert sorted(asked.values()) == [[1] * 5, [4] * 5]


def test_groups_under_way_number_at_most_max_in_flight(server: FakeServer, make_engine: MakeEngine) -> None:
    go_on = threading.Event()

    def hold(handler: Handler) -> None:
        assert go_on.wait(PATIENCE)
        handler.say(200, answers({"input_ids": [[1, 2, 3]], "sampling_params": {"n": 2}}))

    server.script.extend([hold] * 12)
    engine = make_engine(server, max_in_flight=3)
    futures = [engine.start(TEXT, 2, SAMPLING) for _ in range(12)]
    eventually(lambda: len(server.prompts()) == 3)
    for _ in range(10):  # sent after the prompts: whatever else was to be sent has come before these
        call_all(engine.fleet.up(), "/look", timeout=60)
    assert len(server.prompts()) == 3
    go_on.set()
    assert [len(future.result(timeout=PATIENCE)) for future in futures] == [2] * 12


# --- servers that draw by seeds, and servers that cannot be used


def seeds(body: dict[str, Any]) -> list[int]:
    assert {each["n"] for each in body["sampling_params"]} == {1}
    return [each["sampling_seed"] for each in body["sampling_params"]]


def drawn(body: dict[str, Any], prompt: EncodedPrompt = TEXT) -> list[dict[str, Any]]:
    """As a server of deterministic inference: an answer is decided by prompt and seed, 42 where there is none."""
    parameters = body["sampling_params"]
    each = parameters if isinstance(parameters, list) else [parameters] * parameters["n"]
    return [reply(prompt.token_ids, [each.get("sampling_seed", 42) % 90]) for each in each]


def test_a_server_that_draws_by_seeds_is_given_one_for_each_sample(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    server.said["/server_info"] = (200, {"enable_deterministic_inference": True})
    server.answer = lambda body: drawn(body, PICTURES)
    engine = make_engine(server)
    assert len({c.token_ids for c in sample(engine, PICTURES, group_size=6)}) > 1
    sample(engine, PICTURES, group_size=6)  # the same prompt again
    engine.run(engine.fleet.hold(1, engine.fleet.up()))
    sample(engine, PICTURES, group_size=6)
    bodies = [request.body for request in server.prompts()]
    everything = [seed for body in bodies for seed in seeds(body)]
    assert len(everything) == len(set(everything)) == 18
    assert all(0 <= seed < 2**63 for seed in everything)
    for body in bodies:
        assert body["input_ids"] == [[1, IMAGE, 2, IMAGE, 3]] * 6
        assert len(body["image_data"]) == 6
        assert len({str(images) for images in body["image_data"]}) == 1
    server.answer = drawn
    sample(make_engine(server), TEXT, group_size=6)
    assert server.prompts()[-1].body["image_data"] is None
    assert seeds(server.prompts()[-1].body) == everything[:6], "a run that starts again draws the same"


def test_a_server_without_a_key_is_asked_without_one(server: FakeServer, make_engine: MakeEngine) -> None:
    engine = make_engine(server, start="here", urls=[server.url])
    assert len(sample(engine)) == 2
    call_all(engine.fleet.up(), "/flush_cache", timeout=60)
    assert not [request for request in server.requests if "Authorization" in request.headers]


@pytest.mark.parametrize("info", [{}, {"enable_deterministic_inference": False}])
def test_seeds_are_sent_to_no_server_that_does_not_say_that_it_needs_them(
    server: FakeServer, make_engine: MakeEngine, info: dict[str, Any]
) -> None:
    server.said["/server_info"] = (404, "no such page")
    server.said["/get_server_info"] = (200, info)  # its name in older versions
    sample(make_engine(server))
    assert "seed" not in str(server.prompts()[0].body)


def test_older_servers_tell_the_same_elsewhere(server: FakeServer, make_engine: MakeEngine) -> None:
    server.said["/server_info"] = (404, "no such page")
    server.said["/get_server_info"] = (200, {"enable_deterministic_inference": True})
    server.answer = drawn
    sample(make_engine(server))
    assert len(set(seeds(server.prompts()[0].body))) == 2


@pytest.mark.parametrize(
    ("path", "said", "words"),
    [
        ("/server_info", {"speculative_algorithm": "NGRAM"}, "speculative_algorithm=NGRAM: .*distribution"),
        ("/server_info", {"json_model_override_args": '{"rope_theta": 1}'}, "another model than the policy"),
        ("/server_info", {"context_length": 100}, "context of 100 tokens, .* --context-length"),
        ("/model_info", {"preferred_sampling_params": {"min_p": 0.1}}, "preferred_sampling_params"),
        (
            "/model_info",
            {"architectures": ["LlamaForCausalLM"], "model_path": "llama"},
            "serves llama, a Llama",
        ),
    ],
)
def test_a_server_of_another_model_or_sampling_is_refused_before_it_is_asked_anything(
    server: FakeServer, make_engine: MakeEngine, path: str, said: dict[str, Any], words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"architectures": ["Qwen3VLMoeForConditionalGeneration"]}')
    monkeypatch.chdir(tmp_path)
    server.said[path] = (200, said)
    with pytest.raises(ServerError, match=f"server external-0 at {server.url} .*{words}"):
        make_engine(server, start="here", urls=[server.url])
    assert not server.prompts()


# --- what is made of the replies


def test_a_reply_becomes_completions(server: FakeServer, make_engine: MakeEngine) -> None:
    stop = {"type": "stop", "matched": STOP}
    server.answer = lambda body: [
        reply(TEXT.token_ids, [4, 5, STOP], finish_reason=stop, version="3"),
        reply(TEXT.token_ids, [4, 5, 6], version="3"),
    ]
    stopped, cut = sample(make_engine(server), group_size=2)
    assert stopped.token_ids == (4, 5, STOP)
    assert stopped.logprobs == (-4.5, -5.5, -99.5)
    assert stopped.versions == (3, 3, 3)
    assert stopped.text == "4 5"
    assert cut.text == "4 5 6"
    assert [c.finish for c in (stopped, cut)] == [Finish.STOP, Finish.LENGTH]


def test_prompts_keep_their_order(server: FakeServer, make_engine: MakeEngine) -> None:
    server.answer = lambda body: [reply(body["input_ids"][0], body["input_ids"][0])] * 2
    prompts = [prompt(n, n + 1) for n in range(20)]
    groups = make_engine(server).generate(prompts, group_size=2, sampling=SAMPLING, seed=0)
    assert [group[0].token_ids for group in groups] == [p.token_ids for p in prompts]


@pytest.mark.parametrize(
    ("meta", "versions"),
    [
        ({"weight_version": "5", "weight_versions": [{"version": "5", "start": 0, "end": 4}]}, (5, 5, 5, 5)),
        (
            {
                "weight_version": "6",
                "weight_versions": [
                    {"version": "4", "start": 0, "end": 1},
                    {"version": "5", "start": 1, "end": 3},
                    {"version": "6", "start": 3, "end": 4},
                ],
            },
            (4, 5, 5, 6),
        ),
        (
            {
                "weight_version": "6",
                "weight_versions": [
                    {"version": "default", "start": 0, "end": 3},
                    {"version": "6", "start": 3, "end": 9},
                ],
            },
            (-1, -1, -1, 6),
        ),
    ],
)
def test_each_token_knows_the_weights_that_sampled_it(
    meta: dict[str, Any], versions: tuple[int, ...]
) -> None:
    assert versions_of(meta, 4) == versions


def test_tokens_of_no_span_have_no_version_that_could_pass_for_a_fresh_one() -> None:
    spans = [{"version": "6", "start": 0, "end": 2}]
    assert versions_of({"weight_version": "7", "weight_versions": spans}, 3) == (6, 6, -1)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": [1, 2, 4]},
        {"prompt_token_ids": [1, 2]},
        {"prompt_token_ids": [1, 2, 3, 3]},
        {"meta_info": {"prompt_tokens": 4}},
        {"prompt_token_ids": None, "meta_info": {"prompt_tokens": 2}},
    ],
)
def test_a_prompt_that_the_server_expanded_otherwise_is_refused(
    server: FakeServer, make_engine: MakeEngine, changes: dict[str, Any]
) -> None:
    server.answer = lambda body: [answers(body)[0], altered(answers(body)[1], changes)]
    with pytest.raises(PromptMismatchError, match="digits/7: the server made") as caught:
        sample(make_engine(server))
    assert "model.path" in str(caught.value)
    assert len(server.prompts()) == 1


def test_a_server_that_does_not_tell_the_ids_is_believed_by_their_number(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    server.answer = lambda body: [altered(r, {"prompt_token_ids": None}) for r in answers(body)]
    assert len(sample(make_engine(server))) == 2


def altered(said: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return said | changes | {"meta_info": said["meta_info"] | changes.get("meta_info", {})}


# --- what happens when a server fails


def test_a_server_error_is_asked_again(server: FakeServer, make_engine: MakeEngine) -> None:
    server.script.extend([status(500), status(503)])
    assert len(sample(make_engine(server))) == 2
    bodies = [request.raw for request in server.prompts()]
    assert len(bodies) == 3
    assert len(set(bodies)) == 1


def test_a_prompt_that_no_server_can_answer_is_given_up(server: FakeServer, make_engine: MakeEngine) -> None:
    server.script.extend([status(500, "out of cheese")] * 50)
    with pytest.raises(ServerError, match=r"refused 6 times.*answered 500.*out of cheese"):
        sample(make_engine(server))
    assert len(server.prompts()) == 6


@pytest.mark.parametrize("code", [400, 401, 413, 422])
def test_what_the_server_refuses_is_not_sent_again(
    server: FakeServer, make_engine: MakeEngine, code: int
) -> None:
    server.script.append(status(code, "too long"))
    with pytest.raises(ServerError, match=f"refused a prompt with status {code}.*too long"):
        sample(make_engine(server))
    assert len(server.prompts()) == 1


def test_an_answer_broken_off_is_asked_for_again(server: FakeServer, make_engine: MakeEngine) -> None:
    whole, broken = reply(TEXT.token_ids, [4, 5]), reply(TEXT.token_ids, [4], finish_reason={"type": "abort"})
    replies = iter([[whole, broken], [whole, whole]])
    server.answer = lambda body: next(replies)
    assert [c.token_ids for c in sample(make_engine(server), group_size=2)] == [(4, 5), (4, 5)]


def test_an_answer_that_is_always_broken_off_is_a_fault(server: FakeServer, make_engine: MakeEngine) -> None:
    reason = {"type": "abort", "status_code": 500, "message": "image cannot be read"}
    server.answer = lambda body: [reply(TEXT.token_ids, [], finish_reason=reason)] * 2
    with pytest.raises(ServerError, match="image cannot be read"):
        sample(make_engine(server))


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"output_token_logprobs": [[None, 4, None]]}, "the log-prob of token 0 is null"),
        ({"finish_reason": {"type": "stop", "matched": "NaN happened"}}, "logits are not finite"),
        ({"finish_reason": {"type": "stop", "matched": 4}}, "stopped by 4 at token 4"),
        ({"version": "default"}, "weight version .*'default'"),
    ],
)
def test_a_reply_that_cannot_be_used_is_asked_for_again_counted_and_given_up_in_the_end(
    server: FakeServer, make_engine: MakeEngine, meta: dict[str, Any], words: str
) -> None:
    bad, good = reply(TEXT.token_ids, [4], **meta), reply(TEXT.token_ids, [5])
    replies = iter([[good, bad], [bad, good], [good, good], *[[good, bad]] * 6])
    server.answer = lambda body: next(replies)
    engine = make_engine(server)
    assert [c.token_ids for c in sample(engine)] == [(5,), (5,)]
    assert len(server.prompts()) == 3
    assert engine.take_counts()["rollout/asked_again"] == 2
    with pytest.raises(
        ServerError, match=f"refused 6 times; server-0 at {server.url} gave .*: answer 1: .*{words}"
    ):
        sample(engine)
    assert engine.take_counts()["rollout/asked_again"] == 5
    assert len(server.prompts()) == 9


def html(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"<html>welcome to the hotel's network</html>")


def half(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'[{"output_ids": [1')


def garbled(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    handler.wfile.write(b"this is no gzip")


@pytest.mark.parametrize(
    "action", [html, half, garbled, status(200, {"error": "x"}), status(204), status(302)]
)
def test_what_is_no_reply_at_all_is_asked_for_again(
    server: FakeServer, make_engine: MakeEngine, action: Action
) -> None:
    server.script.extend([action, action])
    assert len(sample(make_engine(server))) == 2
    assert len(server.prompts()) == 3


def test_a_server_that_is_there_and_only_ever_hangs_up_is_a_fault(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    server.script.extend([drop] * 100)
    with pytest.raises(
        ServerError, match=r"the connection was lost 51 times over a prompt; server-0 at http"
    ):
        sample(make_engine(server))


def test_a_lost_connection_is_not_a_lost_server(server: FakeServer, make_engine: MakeEngine) -> None:
    server.script.extend([drop, drop])
    engine = make_engine(server)
    assert len(sample(engine)) == 2
    assert len(server.prompts()) == 3
    assert [s.url for s in engine.fleet.up()] == [server.url]


def test_the_prompts_of_a_server_that_dies_go_to_another(server: FakeServer, make_engine: MakeEngine) -> None:
    dying = FakeServer()

    def die(handler: Handler) -> None:
        dying.close()

    dying.script.append(die)
    engine = make_engine(dying, server)
    assert {s.url for s in engine.fleet.up()} == {dying.url, server.url}
    assert len(sample(engine)) == 2
    assert len(dying.prompts()) == len(server.prompts()) == 1
    assert dying.prompts()[0].body == server.prompts()[0].body
    assert [s.url for s in engine.fleet.up()] == [server.url]


def test_a_request_that_is_not_answered_in_time_is_given_up(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    hang = Hang()
    server.script.append(hang)
    with pytest.raises(
        ServerError, match=r"not answered within rollout\.sglang\.request_timeout=1 s; raise it"
    ):
        sample(make_engine(server, request_timeout=1))
    assert hang.gone.wait(PATIENCE), "the server goes on with an answer that nobody waits for"
    assert len(server.prompts()) == 1


def test_a_cancelled_group_is_given_up_on_the_server_as_well(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    hang = Hang()
    server.script.append(hang)
    engine = make_engine(server, max_in_flight=1)
    future = engine.start(TEXT, 2, SAMPLING)
    assert hang.begun.wait(PATIENCE)
    assert not hang.gone.is_set()
    assert future.cancel()
    assert hang.gone.wait(PATIENCE)
    with pytest.raises(CancelledError):
        future.result()
    assert len(sample(engine)) == 2  # and its place is free again


def test_one_fault_ends_the_wait_for_all_prompts(server: FakeServer, make_engine: MakeEngine) -> None:
    hang = Hang()

    def refuse_after_the_other_has_come(handler: Handler) -> None:
        assert hang.begun.wait(PATIENCE)
        handler.say(400, "no")

    server.script.extend([hang, refuse_after_the_other_has_come])
    with pytest.raises(GspoError, match="status 400"):
        make_engine(server).generate([TEXT, TEXT], group_size=2, sampling=SAMPLING, seed=0)
    assert hang.gone.wait(PATIENCE)


def test_closing_gives_up_what_is_under_way(server: FakeServer, tmp_path: Path) -> None:
    hang = Hang()
    server.script.append(hang)
    engine = open_engine(tmp_path, server)
    future = engine.start(TEXT, 2, SAMPLING)
    assert hang.begun.wait(PATIENCE)
    engine.close()
    assert hang.gone.wait(PATIENCE)
    assert future.cancelled()


# --- administration


def test_administrative_calls_bear_the_other_key(server: FakeServer, make_engine: MakeEngine) -> None:
    engine = make_engine(server)
    (known,) = engine.fleet.up()
    assert call_all([known], "/pause_generation", timeout=60, mode="retract") == [{"success": True}]
    (request,) = server.asked("/pause_generation")
    assert request.headers["Authorization"] == "Bearer admin"
    assert request.body == {"mode": "retract"}


@pytest.mark.parametrize(
    "said", [(500, {"message": "no room"}), (200, {"success": False, "message": "no room"})]
)
def test_a_refused_administrative_call_is_told_and_not_repeated(
    server: FakeServer, make_engine: MakeEngine, said: tuple[int, Any]
) -> None:
    server.said["/begin_weight_update"] = said
    engine = make_engine(server)
    (known,) = engine.fleet.up()
    with pytest.raises(ServerError, match=r"server-0 refused /begin_weight_update.*no room"):
        call_all([known], "/begin_weight_update", timeout=60)
    assert len(server.asked("/begin_weight_update")) == 1


def test_a_call_to_all_servers_reaches_all_though_one_is_dead(
    server: FakeServer, make_engine: MakeEngine
) -> None:
    dead = FakeServer()
    engine = make_engine(dead, server)
    servers = engine.fleet.up()
    dead.close()
    with pytest.raises(ServerError, match="server-0 failed at /flush_cache"):
        call_all(servers, "/flush_cache", timeout=60)
    assert len(server.asked("/flush_cache")) == 1
