"""What answers a turn: calls as families write them, image tools, and environments that fail in every way."""

import asyncio
import json
import re
import shutil
import threading
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import gspo_mm.environment
from gspo_mm.config import Config
from gspo_mm.config.environment import EnvironmentConfig
from gspo_mm.data.pictures import decode_image
from gspo_mm.environment import Call, CallError, Feedback, Look, read_calls
from gspo_mm.environment.base import SESSION, SIZES
from gspo_mm.environment.http import HttpEnvironment
from gspo_mm.environment.image_tools import ImageTools
from gspo_mm.environment.pool import BadEnvironmentError, make
from gspo_mm.stages import processor_of
from gspo_mm.types import EncodedImage, Observation, Prompt, Turn
from tests.tars import image_bytes

BOX = {"box": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "zoom_in", "arguments": {"box": [1, 2, 3, 4]}}\n</tool_call>',
        "<tool_call>\n<function=zoom_in>\n<parameter=box>\n[1, 2, 3, 4]\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>zoom_in\n<arg_key>box</arg_key>\n<arg_value>[1, 2, 3, 4]</arg_value>\n</tool_call>",
        '<tool_call>{"name": "zoom_in", "arguments": {"box": [1, 2, 3, 4]}}',
    ],
    ids=["Qwen3", "Qwen3.5", "GLM", "not closed"],
)
def test_a_call_is_read_as_each_family_writes_it(text: str) -> None:
    assert read_calls(f"Let me look. {text}") == [Call(name="zoom_in", arguments=BOX)]


def test_a_text_without_calls_has_none_and_one_with_two_has_two() -> None:
    assert read_calls("seven") == []
    call = '<tool_call>{"name": "a"}</tool_call>'
    assert [c.name for c in read_calls(call + call)] == ["a", "a"]
    (call,) = read_calls("<tool_call>say<arg_key>text</arg_key><arg_value>a word</arg_value></tool_call>")
    assert call.arguments == {"text": "a word"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "no name"),
        ('{"name": 3}', "no name"),
        ('{"name": "a", "arguments": [1]}', "arguments of a are no object"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_call_that_is_none_says_why(body: str, said: str) -> None:
    with pytest.raises(CallError, match=said):
        read_calls(f"<tool_call>{body}</tool_call>")


def encoded(image: Image.Image) -> EncodedImage:
    data = image_bytes(image)
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=image.width, height=image.height)


def asked(images: tuple[EncodedImage, ...] = (), answer: str = "7", **meta: Any) -> Prompt:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "which digit is it"}]
    message = {"role": "user", "content": content}
    return Prompt(key="a.tar/1", messages=(message,), images=images, answer=answer, task="t", meta=meta)


def turn(text: str, *ids: int) -> Turn:
    return Turn(token_ids=ids, logprobs=(-1.0,) * len(ids), versions=(0,) * len(ids), text=text)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def quarters() -> EncodedImage:
    """Red, green, blue and white, 40 x 20 pixels."""
    image = Image.new("RGB", (40, 20), "white")
    for place, colour in (((0, 0), "red"), ((20, 0), "green"), ((0, 10), "blue")):
        image.paste(colour, (*place, place[0] + 20, place[1] + 10))
    return encoded(image)


def used(quarters: EncodedImage, text: str, unit: Any = "thousand", **args: Any) -> Feedback | None:
    """What comes back where the model sees the picture in 84 x 56 pixels."""
    SIZES.set({quarters.key: (84, 56)})
    return asyncio.run(ImageTools(unit, **args).step(asked((quarters,)), [turn(text)]))


@pytest.mark.parametrize(
    ("unit", "box"),
    [("thousand", [500, 0, 1000, 500]), ("one", [0.5, 0, 1, 0.5]), ("pixels", [42, 0, 84, 28])],
)
def test_zooming_shows_the_part_of_the_box_enlarged(
    quarters: EncodedImage, unit: str, box: list[float]
) -> None:
    found = used(quarters, call("zoom_in", box=box), unit=unit, least_side=50)
    assert found
    (image,) = found.images
    assert isinstance(image, Image.Image)
    assert image.size == (100, 50)
    assert image.getpixel((50, 25)) == (0, 128, 0)
    assert found.look == Look(image=1, box=(0.5, 0, 1, 0.5))


def test_a_box_that_reaches_out_is_cut_and_a_tiny_one_is_a_pixel(quarters: EncodedImage) -> None:
    found = used(quarters, call("zoom_in", box=[-500, -500, 500, 500]), least_side=1)
    assert found
    assert isinstance(found.images[0], Image.Image)
    assert found.images[0].size == (20, 10)
    assert found.look == Look(image=1, box=(-0.5, -0.5, 0.5, 0.5))
    found = used(quarters, call("zoom_in", box=[0, 0, 1, 1]), least_side=500, most_zoom=16)
    assert found
    assert isinstance(found.images[0], Image.Image)
    assert found.images[0].size == (16, 16)


def test_turning_is_clockwise(quarters: EncodedImage) -> None:
    found = used(quarters, call("rotate", degrees=90))
    assert found
    (image,) = found.images
    assert isinstance(image, Image.Image)
    assert image.size == (20, 40)
    assert image.getpixel((15, 5)) == (255, 0, 0), "what was on the upper left is on the upper right"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (call("zoom_in", box=[2000, 0, 3000, 10]), "holds nothing of the picture"),
        (call("zoom_in", box=[10, 10, 5, 5]), "holds nothing of the picture"),
        (
            '<tool_call>{"name": "zoom_in", "arguments": {"box": [NaN, 0, NaN, 9]}}</tool_call>',
            "zoom_in: box.0: Input should be a finite number",
        ),
        (call("zoom_in", box=[1, 2]), "zoom_in: box"),
        (call("zoom_in", box=[0, 0, 9, 9], image=7), "no picture 7, only 1 to 1"),
        (call("rotate", degrees=45), "rotate: degrees"),
        (call("erase"), "no tool 'erase', only zoom_in and rotate"),
        (call("next_image"), "no tool 'next_image', only zoom_in and rotate"),
        (call("rotate", degrees=90) * 2, "one call at a time"),
        ("<tool_call>{</tool_call>", "no JSON"),
    ],
)
def test_what_cannot_be_done_is_told_to_the_model(quarters: EncodedImage, text: str, said: str) -> None:
    found = used(quarters, text)
    assert found
    assert found.text.startswith("Error: ")
    assert said in found.text
    assert not found.images


def test_a_box_that_holds_nothing_is_kept_to_be_drawn(quarters: EncodedImage) -> None:
    found = used(quarters, call("zoom_in", box=[2000, 0, 3000, 10]))
    assert found
    assert found.look == Look(image=1, box=(2, 0, 3, 0.01))


def test_pages_are_shown_one_by_one_and_as_they_are(quarters: EncodedImage) -> None:
    """The second one is equal to what a tool makes of the first: calls are counted, not pictures."""
    whole = call("zoom_in", box=[0, 0, 1000, 1000])
    pages = tuple(encoded(Image.new("RGB", (20, side))) for side in (20, 20, 8))
    prompt, turns = replace(asked(), pages=pages), list[Turn]()
    tools = ImageTools("thousand", least_side=1, pages=True)
    for text in (call("next_image"), whole, *[call("next_image")] * 3):
        found = asyncio.run(tools.step(prompt, [*turns, turn(text)]))
        assert found
        shown = [
            encoded(image if isinstance(image, Image.Image) else decode_image(image))
            for image in found.images
        ]
        seen = Observation(token_ids=(), images=tuple(shown), text=found.text)
        turns.append(replace(turn(text), observation=seen))
    first, again, second, third, over = (turn.observation for turn in turns if turn.observation)
    assert again.images == pages[:1]
    assert first.images + second.images + third.images == pages
    assert (over.images, over.text) == ((), "Error: there is no further picture")


def test_only_a_run_with_pages_is_told_of_them() -> None:
    names = [[t["function"]["name"] for t in ImageTools("one", pages=pages).tools] for pages in (False, True)]
    assert names == [["zoom_in", "rotate"], ["zoom_in", "rotate", "next_image"]]


def test_a_turn_without_a_call_ends_the_answer(quarters: EncodedImage) -> None:
    assert used(quarters, "seven") is None


@pytest.mark.parametrize(
    ("model", "says"), [("tiny_model", (False, True)), ("tiny_windows_model", (True, False))]
)
def test_models_are_told_of_the_tools_in_their_familys_unit(
    model: str, says: tuple[bool, bool], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "hf")
    template = folder / "chat_template.jinja"
    template.write_text("{%- if tools %}{{ tools | tojson }}{%- endif -%}" + template.read_text())
    config = {"model": {"path": str(folder)}, "data": {"train": ["x"], "max_prompt_tokens": 4096}}
    config |= {"run": {"name": "r"}, "reward": {"file": "r.yaml"}}
    environment = {"type": "image_tools", "args": {"pages": True}}
    told = processor_of(Config.model_validate(config | {"rollout": {"environment": environment}}))
    text = told.decode(told.encode(replace(asked(), pages=(encoded(Image.new("RGB", (8, 8))),))).token_ids)
    assert "next_image" in text
    assert ("pixels of the picture" in text, "thousandths of the picture" in text) == says


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"python": "tests.environments"}, "write it as package.module:function"),
        ({"python": "tests.environments:Nothing"}, "has no Nothing; correct the name"),
        ({"python": "tests.environments:Shows", "args": {"first": 1}}, "unexpected keyword argument 'first'"),
        ({"type": "image_tools", "args": {"unit": "miles"}}, "miles"),
        ({"type": "image_tools"}, "no unit for places in pictures; set args.unit"),
    ],
)
def test_an_environment_that_cannot_be_made_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadEnvironmentError, match=said):
        make(EnvironmentConfig.model_validate(settings), None)


def of_the_readme(name: str) -> Any:
    """The class of that name, as the README has it."""
    text = (Path(gspo_mm.environment.__file__).parent / "README.md").read_text()
    (code,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if re.search(rf"class {name}\b", code)
    ]
    values: dict[str, Any] = {}
    exec(code, values)
    return values[name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (call("calculate", formula="(2 + 3) * 4 - 1 / 2"), "19.5"),
        (call("calculate", formula="1 / 0"), "Error: "),
        (call("calculate", formula="open('x')"), "Error: only + - * / of numbers"),
        (call("calculate", formula="1 +"), "Error: "),
        (call("calculate"), "Error: "),
    ],
)
def test_the_calculator_of_the_readme(text: str, said: str) -> None:
    found = asyncio.run(of_the_readme("Calculator")().step(asked(), [turn(text)]))
    assert found.text.startswith(said)
    assert asyncio.run(of_the_readme("Calculator")().step(asked(), [turn("it is 7")])) is None


def test_the_pages_of_the_readme() -> None:
    pages = of_the_readme("Pages")()
    page = encoded(Image.new("RGB", (8, 8)))
    prompt = replace(asked(), pages=(page,))
    assert asyncio.run(pages.step(prompt, [turn("next page")])) == Feedback(images=[page.data])
    assert asyncio.run(pages.step(prompt, [turn("next page")] * 2)) == Feedback(
        text="That was the last page."
    )
    assert asyncio.run(pages.step(prompt, [turn("seven")])) is None


def test_the_server_of_the_readme_remembers_each_answers_number() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), of_the_readme("Guessing"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = HttpEnvironment(url=f"http://127.0.0.1:{server.server_port}")

    def answered(session: str, text: str) -> Feedback | None:
        SESSION.set(session)
        return asyncio.run(environment.step(asked(), [turn(text)]))

    try:
        found = answered("a", "no number")
        assert found is not None
        assert found.text == "Guess a number from 1 to 99."
        for session in ("a", "b"):
            low, high = 1, 99
            while (found := answered(session, str((low + high) // 2))) is not None:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if found.text == "It is larger." else (low, middle - 1)
                assert low <= high
    finally:
        server.shutdown()
        server.server_close()
