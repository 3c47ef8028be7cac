"""The one place that turns chat and images into token ids and pixels, by the model's own Hugging Face processor.

Rollout and training use the ids that one call of `encode` gave; nothing tokenizes a prompt a second time. How many tokens
an image takes follows from its size; its pixels are made where somebody looks at them, and kept in a cache of bounded
size, keyed by content, for the answers of its group. Threads may share a processor.

A text that spells one of the tokenizer's special tokens is refused: it would close the user's turn or stand for an
image that is not there.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from cachetools import LRUCache
from PIL import Image

from gspo_mm.config import DataConfig
from gspo_mm.data.faults import BadSample
from gspo_mm.data.pictures import decode_image, png_of
from gspo_mm.families.table import family_of
from gspo_mm.hf.decoding import Decoder
from gspo_mm.hf.processor import load_processor, size_within, tokenizer_of
from gspo_mm.hf.stops import find_stops
from gspo_mm.types import DataError, EncodedImage, EncodedPrompt, EncodedTurn, GspoError, Prompt, Turn

logger = logging.getLogger(__name__)

_SAMPLED = f"[{secrets.token_hex(8)}]"  # stands for a turn of the model where a chat is rendered around it
_OF_A_TURN = ("role", "name", "content", "tool_calls")  # what a template writes of an assistant's message

# legend: P prompt tokens with image tokens expanded, I images


class TemplateError(GspoError):
    """A chat template that an answer in turns cannot be continued with."""


class Processor:
    """Chat template, tokenizer and image processor of a Hugging Face folder; some models take text alone."""

    def __init__(
        self,
        model_path: str,
        config: DataConfig,
        *,
        keep_pixels: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        shows_pages: bool = False,
    ) -> None:
        """Without `keep_pixels` prompts come without theirs, which are not made: servers decode images themselves.

        `tools`: JSON schemas that the chat template tells the model of. `shows_pages`: something shows those of samples.
        """
        self._shows_pages = shows_pages
        self._keep_pixels = keep_pixels
        self._tools = list(tools)
        self._processor, hf = load_processor(model_path)
        self._hf, self._family = hf, family_of(model_path)
        self._tokenizer: Any = tokenizer_of(self._processor)
        self.decode = Decoder(self._tokenizer.backend_tokenizer)
        self.image_token_id = self._family.image_token_id(hf)
        self.box_unit = self._family.box_unit
        # tokens that stand for pictures and films where a prompt has them
        self.placeholder_ids: set[int] = {
            token
            for name in ("image_token_id", "video_token_id")
            if (token := getattr(self._processor, name, None)) is not None
        }
        self._max_prompt_tokens = config.max_prompt_tokens
        added = self._tokenizer.added_tokens_decoder.values()
        self._special = tuple(
            sorted({*self._tokenizer.all_special_tokens, *(str(token) for token in added if token.special)})
        )
        if self.image_token_id is not None:
            self._image_processor: Any = self._processor.image_processor
            self._image_processor.size = size_within(
                self._image_processor.size,
                least=config.min_pixels,
                most=config.max_pixels,
                counted=self._family.pixels_counted(hf),
            )
        stops = find_stops(model_path, self._processor, hf.get_text_config().vocab_size)
        logger.info("%s", stops.describe(self._tokenizer))
        # where engines stop and what ends an answer, everywhere; the one that ends a reference response is first
        self.stop_token_ids: tuple[int, ...] = stops.ids
        self._end_of_turn = stops.end_of_turn
        # one of them stands behind the text of a turn, and none in it
        self._ends = {*stops.ids, *self._tokenizer.convert_tokens_to_ids(list(self._special))}
        self._cache = LRUCache[str, tuple[torch.Tensor, torch.Tensor]](
            config.image_cache_mb * 2**20, getsizeof=lambda image: image[0].nbytes
        )
        self._lock = threading.Lock()  # of the cache

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Token ids of a prompt, pixels where kept. Raises BadSample: special token in text, corrupt image, too long."""
        if prompt.pictures and self.image_token_id is None:
            raise BadSample(
                "image refused",
                f"it shows {len(prompt.pictures)}, and models of type {self._hf.model_type} take text alone; use other data, "
                "or a vision-language model",
            )
        if prompt.pages and not self._shows_pages:
            raise BadSample(
                "image count",
                f"it has {len(prompt.pages)} pages, which nothing shows; set rollout.environment.type=image_tools with "
                "args.pages=true, or leave `pages` out",
            )
        self._grids(prompt.pages)
        for page in prompt.pages:
            _decoded(page)
        self._refuse_special_tokens(prompt.messages)
        token_ids, pixels, grids = self._tokens(self._render(prompt.messages), prompt.images)
        if len(token_ids) > self._max_prompt_tokens:
            raise BadSample(
                "too long", f"{len(token_ids)} tokens, data.max_prompt_tokens={self._max_prompt_tokens}"
            )
        return EncodedPrompt(prompt=prompt, token_ids=token_ids, pixel_values=pixels, image_grid_thw=grids)

    def probe(self) -> EncodedPrompt | None:
        """A prompt with a picture, and words in single letters: whoever decodes its ids and tokenises them gets fewer.

        None where models take text alone.
        """
        if self.image_token_id is None:
            return None
        data, content = png_of(Image.new("RGB", (64, 64))), [{"type": "image"}, {"type": "text", "text": "?"}]
        image = EncodedImage(data=data, key=EncodedImage.key_of(data), width=64, height=64)
        messages = ({"role": "user", "content": content},)
        asked = self.encode(Prompt(key="probe", messages=messages, images=(image,), answer="", task=""))
        letters = self._tokenizer([*"the answer"], add_special_tokens=False)["input_ids"]
        return replace(asked, token_ids=(*asked.token_ids, *chain(*letters)))

    def encode_turn(
        self,
        messages: Sequence[Mapping[str, Any]],
        turns: Sequence[Turn],
        text: str,
        images: tuple[EncodedImage, ...],
        *,
        role: str,
    ) -> EncodedTurn | None:
        """What follows the last of `turns`, up to where the model goes on; None where its stop token ends the answer.

        Nothing that was sampled is rendered: the chat is, with a mark for each turn, once with what came back and once
        without, and what stands behind the last mark is what has to follow. Raises BadSample as `encode`, or
        TemplateError.
        """
        chat = [*messages]
        for turn in turns[:-1]:
            seen = turn.observation
            assert seen
            chat += [_marked(), _message(role, seen.text, len(seen.images))]
        new = _message(role, text, len(images))
        self._refuse_special_tokens([new])
        ended = self._render([*chat, _marked()], go_on=False).rpartition(_SAMPLED)
        rest = self._render([*chat, _marked(), new]).rpartition(_SAMPLED)
        if not (ended[1] and rest[1] and rest[2].startswith(ended[2])):
            raise TemplateError(
                f"the chat template of model.path changes what it wrote of a turn when another message follows "
                f"({ended[2]!r:.80}, then {rest[2]!r:.80}); rollout.environment needs one that goes on from it"
            )
        token_ids, pixels, grids = self._tokens(rest[2], images)
        if token_ids[:1] != turns[-1].token_ids[-1:]:
            return None
        return EncodedTurn(token_ids=token_ids[1:], pixel_values=pixels, image_grid_thw=grids)

    def said(self, prompt: EncodedPrompt) -> list[slice]:
        """Where in the prompt's tokens the assistant's messages stand, each with the token that ends it.

        Raises DataError for one that cannot be trained on.
        """
        messages, places = prompt.prompt.messages, []
        whole = self._render(messages)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                try:
                    places.append(self._place(prompt, number, whole))
                except BadSample as bad:
                    raise DataError(
                        f"{prompt.prompt.key}: the assistant's message {number + 1} cannot be trained on: {bad}; correct "
                        "it, or set sft.every_turn=false"
                    ) from None
        return places

    def _place(self, prompt: EncodedPrompt, number: int, whole: str) -> slice:
        """Of one message in the chat that is rendered as `whole`. Raises BadSample."""
        messages, ids, grids = prompt.prompt.messages, prompt.token_ids, prompt.image_grid_thw
        message = messages[number]
        if others := ", ".join(sorted(key for key in message if message[key] and key not in _OF_A_TURN)):
            raise BadSample("beside its content it has", others)
        # what the template writes before the message, and by itself at its beginning
        marked = [*messages[:number], {**message, **_marked()}, *messages[number + 1 :]]
        before, mark, _ = self._render(marked).partition(_SAMPLED)
        text = "".join(_texts(message["content"])).strip()
        if not (mark and whole.startswith(before) and whole[len(before) :].lstrip().startswith(text)):
            raise BadSample("it shows an image, or the chat template changes it where others follow")
        if grids is not None:
            grids = grids[: before.count(self._processor.image_token)]
        read = self._ids(before, grids)
        if ids[: len(read)] != read:
            raise BadSample("it begins within a token")
        end = next((place for place in range(len(read), len(ids)) if ids[place] in self._ends), -1)
        if ids[end] not in self.stop_token_ids:
            raise BadSample("what ends it in the chat template stops no answer")
        return slice(len(read), end + 1)

    def pixels(self, image: EncodedImage) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches [t*h*w, patch dim] float32 and grid [1, 3] int64 of one image, from the cache or decoded again."""
        with self._lock:
            if (known := self._cache.get(image.key)) is not None:
                return known
        inputs = self._image_processor(images=[_decoded(image)], return_tensors="pt")
        pixels, grid = self._family.images_of(self._hf, inputs)
        assert pixels is not None
        assert grid is not None
        assert torch.equal(grid, self.grid(image)), f"{grid} of {image.width}x{image.height} pixels"
        if pixels.nbytes <= self._cache.maxsize:
            with self._lock:
                self._cache[image.key] = (pixels, grid)
        return pixels, grid

    def grid(self, image: EncodedImage) -> torch.Tensor:
        """The grid [1, 3] int64 that `pixels` will give, from the image's size alone. Raises ValueError as its family does."""
        return torch.tensor(
            [self._family.image_grid(self._hf, self._image_processor, image.height, image.width)]
        )

    def size_seen(self, image: EncodedImage) -> tuple[int, int]:
        """Width and height in pixels that the image is resized to for the model."""
        _, rows, columns = self._family.image_grid(self._hf, self._image_processor, image.height, image.width)
        side = self._hf.vision_config.patch_size
        return columns * side, rows * side

    def num_patches(self, image: EncodedImage) -> int:
        """Patches t*h*w that `pixels` will make of the image, from its size alone."""
        return math.prod(self._family.image_grid(self._hf, self._image_processor, image.height, image.width))

    def positions(self, token_ids: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
        """Rotary positions [A, P] int64 of one sequence [P], on the family's axes; an id below 0 is a text token."""
        return self._family.positions(self._hf, token_ids, image_grid_thw)

    def encode_response(self, text: str) -> list[int]:
        """Token ids of a reference response, ended as the chat template ends an answer."""
        return self._tokenizer(text + self._end_of_turn, add_special_tokens=False)["input_ids"]

    def _render(self, messages: Sequence[Mapping[str, Any]], *, go_on: bool = True) -> str:
        """The chat as text, by the model's own template. Raises BadSample when the template refuses it."""
        if self.image_token_id is None:  # such templates know texts only, and leave out lists of parts
            messages = [{**m, "content": "".join(_texts(m["content"]))} for m in messages]
        tools: dict[str, Any] = {"tools": self._tools} if self._tools else {}
        try:
            return self._processor.apply_chat_template(
                list(messages), add_generation_prompt=go_on, tokenize=False, **tools
            )
        except Exception as error:  # templates are programs of the model's makers: they raise what they like
            raise BadSample("chat refused", f"{type(error).__name__}: {error}") from None

    def _tokens(
        self, text: str, images: Sequence[EncodedImage]
    ) -> tuple[tuple[int, ...], torch.Tensor | None, torch.Tensor | None]:
        """Token ids of a rendered text, and of its images pixels, where kept, and grids. Raises BadSample."""
        shown = text.count(self._processor.image_token) if self.image_token_id is not None else 0
        if shown != len(images):
            raise BadSample("chat refused", f"the template shows {shown} of {len(images)} images")
        grids = self._grids(images)
        pixels: list[torch.Tensor] = []
        for image in images:
            if self._keep_pixels:
                pixels.append(self.pixels(image)[0])
            else:
                _decoded(image)
        return self._ids(text, grids), torch.cat(pixels) if pixels else None, grids

    def _grids(self, images: Sequence[EncodedImage]) -> torch.Tensor | None:
        """[I, 3] int64. Raises BadSample."""
        try:
            return torch.cat([self.grid(image) for image in images]) if images else None
        except ValueError as error:  # an aspect ratio that cannot be patched
            raise BadSample("image refused", str(error)) from None

    def _ids(self, text: str, grids: torch.Tensor | None) -> tuple[int, ...]:
        """Of a rendered text, with as many image tokens for each image as it has features."""
        if grids is not None:
            token = self._processor.image_token
            first, *rest = text.split(token)
            counts = self._family.tokens_per_image(self._hf, grids)
            text = first + "".join(token * count + part for count, part in zip(counts, rest, strict=True))
        # the processor itself, from transformers 5.24 on, wants an image for every image token
        return tuple(self._tokenizer(text)["input_ids"])

    def _refuse_special_tokens(self, messages: Sequence[Mapping[str, Any]]) -> None:
        for message in messages:
            # templates join the parts of a message: a token may begin in one part and end in the next
            spelled = "".join(_texts(message["content"]))
            others = [text for key, value in message.items() if key != "content" for text in _texts(value)]
            for token in self._special:
                if any(token in text for text in (spelled, *others)):
                    raise BadSample("special token in text", token)


def _decoded(image: EncodedImage) -> Image.Image:
    """The picture. Raises BadSample where it is none, or not of its header's size."""
    picture = decode_image(image.data)
    if picture.size != (image.width, image.height):
        raise BadSample(
            "corrupt image", f"its header says {image.width}x{image.height}, it is {picture.size}"
        )
    return picture


def _marked() -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": _SAMPLED}]}


def _message(role: str, text: str, images: int) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"type": "image"}] * images
    return {"role": role, "content": [*parts, {"type": "text", "text": text}] if text else parts}


def _texts(value: Any) -> Iterator[str]:
    """All texts in a part of a message, keys included; a zero byte for an image, which keeps its neighbours apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if value.get("type") == "image":
            yield "\0"
        elif value.get("type") == "text":
            yield value["text"]
        else:
            for key, item in value.items():
                yield key
                yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
