"""One processor call is the source of ids and pixels; positions are transformers' own."""

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, Qwen3VLMoeModel

from gspo_mm.config import DataConfig
from gspo_mm.data.faults import BadSample
from gspo_mm.data.processor import Processor, decode_image
from gspo_mm.types import EncodedImage, Prompt


def encoded(width: int, height: int, seed: int = 0, kind: str = "PNG", mode: str = "RGB") -> EncodedImage:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 80 + seed).convert(mode).save(buffer, kind)
    data = buffer.getvalue()
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=width, height=height)


def prompt(*content: str | EncodedImage) -> Prompt:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image"} for c in content]
    images = tuple(c for c in content if isinstance(c, EncodedImage))
    return Prompt(key="k", messages=({"role": "user", "content": parts},), images=images, answer=1, task="t")


def make(model: Path, **settings: Any) -> Processor:
    return Processor(str(model), DataConfig(train=["x"], **settings))


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Processor:
    return make(tiny_model)


PROMPTS = [
    ("Which digit is this?",),
    (encoded(64, 64), "Which digit is this?"),
    ("Compare", encoded(64, 32), "with", encoded(96, 64, 1), "please"),
    (encoded(32, 96), encoded(64, 64, 2)),
]


@pytest.mark.parametrize("content", PROMPTS)
def test_positions_equal_those_of_transformers(processor: Processor, tiny_model: Path, content: Any) -> None:
    it = processor.encode(prompt(*content))
    ids = torch.tensor(it.token_ids)
    stub = SimpleNamespace(config=AutoConfig.from_pretrained(tiny_model))
    stub.get_vision_position_ids = lambda *a, **k: Qwen3VLMoeModel.get_vision_position_ids(stub, *a, **k)  # type: ignore[arg-type]
    types = (ids == processor.image_token_id).int()[None]
    expected, _ = Qwen3VLMoeModel.get_rope_index(stub, ids[None], types, image_grid_thw=it.image_grid_thw)  # type: ignore[arg-type]
    assert torch.equal(processor.positions(ids, it.image_grid_thw), expected[:, 0])


@pytest.mark.parametrize("content", PROMPTS)
def test_ids_are_those_of_the_hugging_face_processor(
    processor: Processor, tiny_model: Path, content: Any
) -> None:
    it = processor.encode(prompt(*content))
    theirs = AutoProcessor.from_pretrained(tiny_model)
    images = [Image.open(io.BytesIO(c.data)).convert("RGB") for c in content if isinstance(c, EncodedImage)]
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": [
            {"type": "text", "text": c} if isinstance(c, str) else {"type": "image"} for c in content]}],
        add_generation_prompt=True,
    )  # fmt: skip
    inputs = theirs(text=[expected], images=images or None, return_tensors="pt")
    assert it.token_ids == tuple(inputs["input_ids"][0].tolist())
    assert it.pixel_values is None if not images else torch.equal(it.pixel_values, inputs["pixel_values"])


ODD_SIZES = [(1, 1), (7, 3), (37, 91), (120, 1), (1, 190), (15, 200), (1000, 9), (700, 500)]


@pytest.mark.parametrize(
    "model", ["tiny_model", "tiny_sigmoid_model", "tiny_hybrid_model", "tiny_windows_model"]
)
def test_sizes_alone_give_the_ids_and_grids_of_the_hugging_face_processor(
    model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    ours = Processor(str(folder), DataConfig(train=["x"]), keep_pixels=False)
    ours._image_processor = SimpleNamespace(  # is not called
        **{name: getattr(ours._image_processor, name) for name in
           ("size", "patch_size", "merge_size", "temporal_patch_size")})  # fmt: skip
    theirs = AutoProcessor.from_pretrained(folder)
    it = prompt("a", *(encoded(*size) for size in ODD_SIZES), "b")
    text = theirs.apply_chat_template(list(it.messages), add_generation_prompt=True)
    pictures = [decode_image(image.data) for image in it.images]
    inputs = theirs(text=[text], images=pictures, return_tensors="pt")
    found = ours.encode(it)
    assert found.token_ids == tuple(inputs["input_ids"][0].tolist())
    assert torch.equal(found.image_grid_thw, inputs["image_grid_thw"])
    assert found.pixel_values is None
    side = theirs.image_processor.patch_size
    seen = [(columns * side, rows * side) for _, rows, columns in inputs["image_grid_thw"].tolist()]
    assert [ours.size_seen(image) for image in it.images] == seen


def test_pages_are_checked_and_not_encoded(processor: Processor, tiny_model: Path) -> None:
    question = prompt("Which page?", encoded(64, 64))
    with_pages = dataclasses.replace(question, pages=(encoded(64, 32), encoded(32, 32)))
    shows = Processor(str(tiny_model), DataConfig(train=["x"]), shows_pages=True)
    assert shows.encode(with_pages).token_ids == processor.encode(question).token_ids
    with pytest.raises(BadSample, match="it has 2 pages, which nothing shows") as caught:
        processor.encode(with_pages)
    assert caught.value.reason == "image count"
    damaged = dataclasses.replace(encoded(64, 32), data=b"GIF89a is all there is")
    for page, reason in ((damaged, "corrupt image"), (encoded(4100, 20), "image refused")):
        with pytest.raises(BadSample) as caught:
            shows.encode(dataclasses.replace(question, pages=(page,)))
        assert caught.value.reason == reason


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sigmoid_model"])
@pytest.mark.parametrize("size", [(4100, 20), (50, 10100)])
def test_an_image_that_the_hugging_face_processor_refuses_is_a_bad_sample(
    model: str, size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    image = encoded(*size)
    with pytest.raises(ValueError, match="aspect ratio"):
        AutoProcessor.from_pretrained(folder).image_processor(images=[decode_image(image.data)])
    for keep in (True, False):
        with pytest.raises(BadSample, match="aspect ratio"):
            Processor(str(folder), DataConfig(train=["x"]), keep_pixels=keep).encode(prompt("x", image))


def test_pixels_of_an_image_are_its_part_of_the_prompts(processor: Processor) -> None:
    a, b = encoded(64, 32), encoded(96, 64, 1)
    it = processor.encode(prompt("x", a, b))
    assert it.pixel_values is not None
    both = [processor.pixels(image) for image in (a, b)]
    assert torch.equal(torch.cat([pixels for pixels, _ in both]), it.pixel_values)
    assert torch.equal(torch.cat([grid for _, grid in both]), it.image_grid_thw)


def test_prompts_for_servers_come_without_pixels(tiny_model: Path, processor: Processor) -> None:
    """They would fill the memory while a prompt waits, or for the whole run where it is held out."""
    for_servers = Processor(str(tiny_model), DataConfig(train=["x"]), keep_pixels=False)
    image = encoded(64, 32)
    whole, bare = (each.encode(prompt("x", image)) for each in (processor, for_servers))
    assert whole.pixel_values is not None
    assert bare.pixel_values is None
    assert bare.token_ids == whole.token_ids
    assert torch.equal(bare.image_grid_thw, whole.image_grid_thw)
    assert torch.equal(for_servers.pixels(image)[0], whole.pixel_values)


def test_an_image_is_decoded_once_for_its_group(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(
        "gspo_mm.data.processor.decode_image", lambda data: decoded.append(data) or decode_image(data)
    )
    processor, image = make(tiny_model), encoded(64, 64)
    processor.encode(prompt(image, "?"))
    for _ in range(8):
        processor.pixels(image)
    assert len(decoded) == 1


def test_the_cache_forgets_the_oldest_and_decodes_it_anew(tiny_model: Path) -> None:
    processor = make(tiny_model, image_cache_mb=1)  # a 64x64 image is 96 KiB of patches
    images = [encoded(64, 64, seed) for seed in range(15)]
    first, _ = processor.pixels(images[0])
    for image in images:
        processor.pixels(image)
    assert len(processor._cache) <= 10
    assert processor._cache.currsize == sum(p.nbytes for p, _ in processor._cache.values()) <= 2**20
    assert torch.equal(processor.pixels(images[0])[0], first)


@pytest.mark.parametrize("text", ["<|image_pad|>", "a<|im_end|>b", "<|vision_start|>"])
def test_text_that_spells_a_special_token_is_refused(processor: Processor, text: str) -> None:
    with pytest.raises(BadSample, match="special token"):
        processor.encode(prompt(encoded(64, 64), text))


def test_a_prompt_over_the_limit_is_refused_not_cut(tiny_model: Path) -> None:
    with pytest.raises(BadSample, match="too long"):
        make(tiny_model, max_prompt_tokens=20).encode(prompt(encoded(64, 64), "Which digit is this?"))


@pytest.mark.parametrize("model", ["tiny_model", "tiny_sigmoid_model"])
@pytest.mark.parametrize(("limits", "side"), [({"max_pixels": 48 * 48}, 6), ({"min_pixels": 96 * 96}, 12)])
def test_pixel_limits_are_those_of_an_image(
    model: str, limits: dict[str, int], side: int, request: pytest.FixtureRequest
) -> None:
    it = make(request.getfixturevalue(model), **limits).encode(prompt(encoded(64, 64), "?"))
    assert it.image_grid_thw is not None
    assert it.image_grid_thw.tolist() == [[1, side, side]]


@pytest.mark.parametrize("limits", [{}, {"max_pixels": 40 * 40}, {"min_pixels": 100 * 100}])
@pytest.mark.parametrize("size", [(64, 64), (8, 120), (37, 91), (200, 15), (130, 130), (1, 1), (24, 40)])
def test_the_number_of_patches_is_known_without_decoding(
    tiny_model: Path, size: tuple[int, int], limits: dict[str, int]
) -> None:
    processor, image = make(tiny_model, **limits), encoded(*size)
    unreadable = dataclasses.replace(image, data=b"")
    patches, grid = processor.pixels(image)
    assert processor.num_patches(unreadable) == len(patches) == int(grid.prod())


def test_a_response_ends_with_the_stop_token_and_decodes_to_itself(processor: Processor) -> None:
    for text in ("<answer>7</answer>", "<answer>[3,40,30,64]</answer>"):
        ids = processor.encode_response(text)
        assert ids[-1] == processor.stop_token_ids[0]
        assert processor.decode(ids) == text


def test_sampled_ids_decode_as_transformers_decodes_them(processor: Processor, tiny_model: Path) -> None:
    theirs = AutoProcessor.from_pretrained(tiny_model).tokenizer
    for seed in range(20):
        ids = torch.randint(len(theirs), (200,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert processor.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("damage", [b"", b"\x89PNG", None])
def test_a_corrupt_image_is_a_bad_sample(damage: bytes | None) -> None:
    data = encoded(64, 64).data
    with pytest.raises(BadSample, match="corrupt image"):
        decode_image(data[: len(data) // 2] if damage is None else damage)


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "PNG"), ("CMYK", "JPEG"), ("P", "PNG"), ("1", "PNG"), ("LA", "PNG")]
)
def test_every_mode_becomes_rgb(mode: str, kind: str) -> None:
    assert decode_image(encoded(8, 8, kind=kind, mode=mode).data).mode == "RGB"


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    buffer = io.BytesIO()
    Image.new("I;16", (2, 2), 128 * 257).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (128, 128, 128)


def test_transparency_becomes_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_a_rotated_photo_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (6, 8)
