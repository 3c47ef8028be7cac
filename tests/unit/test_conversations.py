"""How answers are led from turn to turn, what ends them, and environments that fail in every way."""

import asyncio
import base64
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from gspo_mm.config import DataConfig, RolloutConfig
from gspo_mm.config.environment import EnvironmentConfig
from gspo_mm.data.faults import BadSample
from gspo_mm.data.pictures import decode_image
from gspo_mm.data.processor import Processor, TemplateError
from gspo_mm.data.samples import to_prompt
from gspo_mm.environment.conversation import Conversation, Conversations, check_faults, conversations_of
from gspo_mm.sft import supervised
from gspo_mm.types import (
    Completion,
    DataError,
    EncodedPrompt,
    Finish,
    GspoError,
    Look,
    Observation,
    RolloutGroup,
    Turn,
)
from tests.tars import image_bytes
from tests.unit.test_environment import asked, call, encoded, turn

# --- answers that are led on


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Processor:
    return Processor(str(tiny_model), DataConfig(train=["x"]))


def conversations(
    processor: Processor, python: str | None = "tests.environments:Fails", **settings: Any
) -> Conversations:
    environment = {"python": python, "workers": 1, "timeout": 2.0, "memory_gib": 1.0} | settings
    config = RolloutConfig.model_validate({"environment": environment, "sampling": {"max_new_tokens": 8}})
    found = conversations_of(config, processor)
    assert found
    return found


@pytest.fixture(scope="module")
def failing(processor: Processor) -> Iterator[Conversations]:
    found = conversations(processor)
    yield found
    found.close()


def follow(
    led: Conversations, processor: Processor, *turns: Turn, finish: Finish = Finish.STOP, **meta: Any
) -> Completion | Conversation:
    answer = Completion(turns=turns, finish=finish)
    return asyncio.run(led.follow(Conversation.of(processor.encode(asked(**meta)), answer)))


def said(processor: Processor) -> Turn:
    return turn("let me see", 5, 6, processor.stop_token_ids[0])


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("raises", "RuntimeError: the tool is broken"),
        ("hangs", "took more than rollout.environment.timeout=2 s"),
        ("dies", "its process died with exit status 3"),
        ("is large", "image too large: 10001x10000"),
        ("is no picture", "corrupt image"),
        ("spells a special token", r"special token in text: <\|im_end\|>"),
        ("is long", "rollout.environment.max_observation_tokens=1024"),
        ("looks nowhere", r"ValueError: Look\(.*\) has an edge that is no number"),
        ("is something else", "'a string', which is no Feedback"),
    ],
)
def test_an_environment_that_fails_costs_its_answer_and_no_more(
    failing: Conversations, processor: Processor, way: str, why: str
) -> None:
    found = follow(failing, processor, said(processor), way=way)
    assert isinstance(found, Completion)
    assert found.fault
    assert re.search(why, found.fault), found.fault
    assert follow(failing, processor, said(processor), way="none") == Completion(
        turns=(said(processor),), finish=Finish.STOP
    ), "the next answer is served"


class Server(BaseHTTPRequestHandler):
    """Counts the turns of each session, shows a picture in the first, and ends with the second, or in the way of the meta."""

    sessions: ClassVar[Counter[str]] = Counter()
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(asked)
        self.sessions[asked["session"]] += 1
        reply: dict[str, Any] = {"done": True}
        if self.sessions[asked["session"]] == 1:
            reply = {
                "text": "closer",
                "images": [base64.b64encode(image_bytes(Image.new("RGB", (32, 64)))).decode()],
            }
        elif asked["meta"].get("way") == "nonsense":
            reply = {"txet": "?"}
        elif asked["meta"].get("way") == "dies":
            return
        self.send_response(500 if asked["meta"].get("way") == "broken" else 200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def served(processor: Processor) -> Iterator[Conversations]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = conversations(
        processor,
        None,
        type="http",
        args={"url": f"http://127.0.0.1:{server.server_port}/step"},
        timeout=30.0,
    )
    yield found
    found.close()
    server.shutdown()


def test_a_server_is_told_the_turns_and_knows_the_answer_by_its_session(
    served: Conversations, processor: Processor
) -> None:
    first = [follow(served, processor, said(processor), way="fine") for _ in range(2)]
    for number, led in enumerate(first):
        assert isinstance(led, Conversation)
        (seen,) = led.answer.observations
        assert (seen.text, [(i.width, i.height) for i in seen.images]) == ("closer", [(32, 64)])
        done = asyncio.run(
            served.follow(led.with_turn(Completion(turns=(said(processor),), finish=Finish.STOP)))
        )
        assert isinstance(done, Completion)
        assert done.fault is None
        one, two = Server.asked[number], Server.asked[2 + number]
        assert one["session"] == two["session"]
        assert (one["key"], one["answer"], one["meta"]) == ("a.tar/1", "7", {"way": "fine"})
        assert one["turns"] == [{"text": "let me see", "observation": None}]
        assert two["turns"][0] == {"text": "let me see", "observation": {"text": "closer", "images": 1}}
    assert set(Server.sessions.values()) == {2}
    assert len(Server.sessions) == 2


@pytest.mark.parametrize(
    ("way", "why"), [("broken", "500 Internal Server Error"), ("nonsense", "txet"), ("dies", "disconnected")]
)
def test_a_server_that_fails_costs_its_answer(
    served: Conversations, processor: Processor, way: str, why: str
) -> None:
    led = follow(served, processor, said(processor), way=way)
    if isinstance(led, Conversation):
        led = asyncio.run(
            served.follow(led.with_turn(Completion(turns=(said(processor),), finish=Finish.STOP)))
        )
    assert isinstance(led, Completion)
    assert led.fault
    assert why in led.fault


def test_a_server_that_is_gone_costs_its_answer(processor: Processor) -> None:
    led = conversations(processor, None, type="http", args={"url": "http://127.0.0.1:9/step"}, timeout=30.0)
    found = follow(led, processor, said(processor))
    assert isinstance(found, Completion)
    assert found.fault
    assert "ConnectError" in found.fault
    led.close()


def test_a_run_may_stop_for_a_failure(processor: Processor) -> None:
    led = conversations(processor, on_failure="fail")
    with pytest.raises(GspoError, match=r"on_failure=fail, and over a.tar/1: .*the tool is broken"):
        follow(led, processor, said(processor), way="raises")
    led.close()


@pytest.fixture(scope="module")
def showing(processor: Processor) -> Iterator[Conversations]:
    found = conversations(processor, "tests.environments:Shows", args={"last": 3}, max_turns=2)
    yield found
    found.close()


def test_an_answer_goes_on_with_what_came_back(showing: Conversations, processor: Processor) -> None:
    found = follow(showing, processor, said(processor))
    assert isinstance(found, Conversation)
    (answered,) = found.answer.turns
    seen = answered.observation
    assert seen
    assert (seen.text, [(i.width, i.height) for i in seen.images]) == ("look 1", [(40, 48)])
    first = processor.encode(asked())
    assert found.read.token_ids == (*first.token_ids, *said(processor).token_ids, *seen.token_ids)
    assert found.read.prompt.images == seen.images
    assert found.most == 5
    grid = found.read.image_grid_thw
    assert grid is not None
    assert seen.token_ids.count(processor.image_token_id) == int(grid.prod()) // 4


def test_a_tool_takes_boxes_as_the_family_gives_them(tiny_windows_model: Path) -> None:
    """Qwen2.5-VL's are in pixels of the resized picture, here twice as wide and high."""
    processor = Processor(str(tiny_windows_model), DataConfig(train=["x"], min_pixels=112 * 56))
    picture = Image.new("RGB", (56, 28), "blue")
    picture.paste("red", (28, 0, 56, 14))
    prompt = processor.encode(asked((encoded(picture),)))
    assert prompt.image_grid_thw is not None
    assert prompt.image_grid_thw.tolist() == [[1, 4, 8]]
    tools = conversations(processor, None, type="image_tools", args={"least_side": 14})
    turns = (turn(call("zoom_in", box=[56, 0, 112, 28]), 5, processor.stop_token_ids[0]),)
    found = asyncio.run(tools.follow(Conversation.of(prompt, Completion(turns=turns, finish=Finish.STOP))))
    tools.close()
    (seen,) = found.answer.observations if isinstance(found, Conversation) else ()
    assert seen.look == Look(image=1, box=(0.5, 0, 1, 0.5))
    assert decode_image(seen.images[0].data).getcolors() == [(28 * 14, (255, 0, 0))]


def test_pages_come_one_by_one_and_no_other_is_read(tiny_model: Path) -> None:
    processor = Processor(str(tiny_model), DataConfig(train=["x"]), shows_pages=True)
    tools = conversations(processor, None, type="image_tools", args={"pages": True}, max_turns=3)
    pages = tuple(encoded(Image.new("RGB", (32 * number, 32))) for number in (1, 2))
    led = Conversation.of(
        processor.encode(replace(asked(), pages=pages)), Completion(turns=(), finish=Finish.STOP)
    )
    for number in (1, 2):
        sampled = turn(call("next_image"), 5, processor.stop_token_ids[0])
        found = asyncio.run(tools.follow(led.with_turn(Completion(turns=(sampled,), finish=Finish.STOP))))
        assert isinstance(found, Conversation)
        led = found
        assert led.read.prompt.images == pages[:number]
        assert led.read.token_ids.count(processor.image_token_id) == 2 * number * (number + 1)
    tools.close()


def test_turns_and_tokens_come_to_an_end(showing: Conversations, processor: Processor) -> None:
    one = follow(showing, processor, said(processor))
    assert isinstance(one, Conversation)
    two = one.with_turn(Completion(turns=(said(processor),), finish=Finish.STOP))
    found = asyncio.run(showing.follow(two))
    assert found == replace(two.answer, finish=Finish.LENGTH), "max_turns"
    long = turn("", *range(5, 12), processor.stop_token_ids[0])
    assert follow(showing, processor, long) == Completion(turns=(long,), finish=Finish.LENGTH), (
        "max_new_tokens"
    )
    cut = turn("", 5, 6)
    assert follow(showing, processor, cut, finish=Finish.LENGTH) == Completion(
        turns=(cut,), finish=Finish.LENGTH
    )


def test_a_turn_with_a_sampled_image_token_is_the_last(showing: Conversations, processor: Processor) -> None:
    assert processor.image_token_id in processor.placeholder_ids
    for token in processor.placeholder_ids:
        mistaken = turn("", 5, token, processor.stop_token_ids[0])
        found = follow(showing, processor, mistaken)
        assert found == Completion(turns=(mistaken,), finish=Finish.IMAGE_TOKEN)


def test_a_stop_token_that_ends_no_turn_ends_the_answer(showing: Conversations, processor: Processor) -> None:
    ended = turn("", 5, 6)
    assert follow(showing, processor, ended) == Completion(turns=(ended,), finish=Finish.STOP)


def test_a_template_that_changes_turns_when_others_follow_is_refused(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Processor._render

    def changed(self: Processor, messages: Any, *, go_on: bool = True) -> str:
        return original(self, messages, go_on=go_on).replace("<|im_end|>", "<|im_end|>" if go_on else " |")

    monkeypatch.setattr(Processor, "_render", changed)
    with pytest.raises(TemplateError, match="changes what it wrote of a turn"):
        processor.encode_turn(asked().messages, [said(processor)], "x", (), role="tool")


def test_answers_whose_environment_failed_are_counted_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    config = EnvironmentConfig.model_validate({"type": "image_tools", "max_failed_fraction": 0.5})
    good = Completion(turns=(turn("", 1),), finish=Finish.STOP)

    def group(bad: int) -> RolloutGroup:
        answers = [replace(good, fault="environment: it broke")] * bad + [good] * (4 - bad)
        return RolloutGroup(id=1, prompt=asked(), prompt_ids=(1,), completions=tuple(answers))

    check_faults([group(0)], config, what="step 1")
    assert not caplog.text
    check_faults([group(2)], config, what="step 1")
    assert "2 of 4 answers of step 1 failed, of 2 so: environment: it broke" in caplog.text
    with pytest.raises(GspoError, match=r"max_failed_fraction=0.5: the environment of 3 of 4"):
        check_faults([group(3)], config, what="step 1")


# --- reference answers in turns


def demonstration(processor: Processor, *turns: str) -> EncodedPrompt:
    return processor.encode(replace(asked(), first_turns=turns[:-1], response=turns[-1]))


def test_every_turn_of_a_reference_answer_is_trained_and_what_comes_back_is_read(
    processor: Processor,
) -> None:
    led = conversations(processor, "tests.environments:Shows", args={"last": 3}, max_turns=3)
    prompt = demonstration(processor, "a", "b")
    two, one = supervised([prompt, demonstration(processor, "b")], processor, led)
    led.close()
    first, last = processor.encode_response("a"), processor.encode_response("b")
    trained = two.token_ids[two.trained].tolist()
    assert trained == [*first, *last]
    assert two.token_ids[: len(prompt.token_ids)].tolist() == list(prompt.token_ids)
    read = two.token_ids[len(prompt.token_ids) + len(first) : -len(last)].tolist()
    assert "look 1" in processor.decode(read)
    assert read.count(processor.image_token_id) > 0
    assert [(image.width, image.height) for image in two.images] == [(40, 48)]
    assert one.token_ids.tolist() == [*prompt.token_ids, *last]


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        (None, "no rollout.environment that would answer them"),
        (
            {"python": "tests.environments:Shows", "args": {"last": 1}},
            "after turn 1 of its response: nothing came back",
        ),
        ({"python": "tests.environments:Raises"}, "after turn 1 of its response: environment: RuntimeError"),
    ],
)
def test_a_reference_answer_that_does_not_go_on_is_refused(
    processor: Processor, environment: dict[str, Any] | None, why: str
) -> None:
    led = conversations(processor, **environment) if environment else None
    with pytest.raises(DataError, match=rf"a\.tar/1.*{why}"):
        supervised([demonstration(processor, "a", "b")], processor, led)
    if led:
        led.close()


@pytest.mark.parametrize("response", [["a", "b"], "b", None])
def test_a_samples_response_may_have_turns(response: Any) -> None:
    record = {
        "messages": [{"role": "user", "content": "?"}],
        "answer": "7",
        "task": "t",
        "response": response,
    }
    found = to_prompt({"__key__": "1", "__url__": "a.tar", "json": json.dumps(record).encode()})
    expected = (("a",), "b") if isinstance(response, list) else ((), response)
    assert (found.first_turns, found.response) == expected


@pytest.mark.parametrize("response", [[], ["a", 3], 3, {"a": "b"}])
def test_a_response_that_is_no_text_is_refused(response: Any) -> None:
    record = {
        "messages": [{"role": "user", "content": "?"}],
        "answer": "7",
        "task": "t",
        "response": response,
    }
    with pytest.raises(BadSample, match="response must be text, or a list of texts"):
        to_prompt({"__key__": "1", "__url__": "a.tar", "json": json.dumps(record).encode()})


# --- chat templates, by the ways in which families write tools


PARTS = (
    "{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}"
)
# a tool's message is a part of the user's, thoughts of earlier turns are left out: as Qwen3's
OF_THE_USER = (
    "{%- for m in messages -%}{%- if m.role == 'tool' -%}"
    "{{- '<|im_start|>user\n<tool_response>\n' -}}" + PARTS + "{{- '\n</tool_response><|im_end|>\n' -}}"
    "{%- else -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    + PARTS
    + "{{- '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"
)
# nothing ends a turn but what follows it, which for a tool is a token of its own: as GLM-4.5V's
BY_WHAT_FOLLOWS = (
    "{%- for m in messages -%}"
    "{{- '<|endoftext|>\n' if m.role == 'tool' else '<|im_start|>' + m.role + '\n' -}}"
    + PARTS
    + "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


@pytest.mark.parametrize(
    ("template", "end", "expected"),
    [
        (
            OF_THE_USER,
            "<|im_end|>",
            "\n<|im_start|>user\n<tool_response>\n<|vision_start|>PICTURE<|vision_end|>look\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n<think>\n",
        ),
        (
            BY_WHAT_FOLLOWS,
            "<|endoftext|>",
            "\n<|vision_start|>PICTURE<|vision_end|>look<|im_start|>assistant\n",
        ),
    ],
    ids=["of the user", "by what follows"],
)
def test_what_comes_back_is_written_as_the_family_writes_it(
    tiny_model: Path, tmp_path: Path, template: str, end: str, expected: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "hf")
    (folder / "chat_template.jinja").write_text(template)
    processor = Processor(str(folder), DataConfig(train=["x"]))
    image = encoded(Image.new("RGB", (64, 32)))
    stop = processor._tokenizer.convert_tokens_to_ids(end)
    turns = [turn("a", 5, stop), turn("b", 6, stop)]
    turns[0] = replace(turns[0], observation=Observation(token_ids=(1,), text="before"))
    found = processor.encode_turn(asked().messages, turns, "look", (image,), role="tool")
    assert found
    shown = found.token_ids.count(processor.image_token_id)
    assert processor._tokenizer.decode(found.token_ids) == expected.replace(
        "PICTURE", "<|image_pad|>" * shown
    )
    assert found.image_grid_thw is not None
    assert shown == int(found.image_grid_thw.prod()) // 4
    other = [turns[0], replace(turns[1], token_ids=(6, 7))]
    assert processor.encode_turn(asked().messages, other, "look", (), role="tool") is None
