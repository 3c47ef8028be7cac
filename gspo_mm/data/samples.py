"""A raw sample -> a Prompt, or the reason why not.

Nothing in a sample is unpickled or executed: `.json` is parsed, image members are kept as bytes, every other member
is ignored. Images are decoded later, once, by the processor.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from pathlib import PurePath
from typing import Any

from gspo_mm.data.shards import FAULT, RawSample
from gspo_mm.types import DataError, EncodedImage, Prompt

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
MAX_PIXELS = 64_000_000  # larger images are refused by their header, before any memory is taken
ROLES = ("system", "user", "assistant", "tool")
MIN_READ = 100  # samples before the bad fraction is judged: one early fault is no bad data set


class BadSample(Exception):  # noqa: N818  (a verdict on data, not a fault of the program)
    """This sample cannot be used. `reason` is one of a few words to count by, `detail` names the particulars."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class SkipLog:
    """Counts unusable samples by reason, names each in the log, and stops a run that has too many."""

    def __init__(self, max_bad_fraction: float) -> None:
        self._max_bad_fraction = max_bad_fraction
        self.read = 0
        self.reasons: Counter[str] = Counter()

    @property
    def skipped(self) -> int:
        return self.reasons.total()

    def good(self) -> None:
        self.read += 1

    def bad(self, key: str, fault: BadSample) -> None:
        """Raises DataError when more than `data.max_bad_fraction` of at least 100 samples were bad."""
        self.read += 1
        self.reasons[fault.reason] += 1
        logger.warning("skipped sample %s: %s", key, fault)
        if self.read >= MIN_READ:
            self.judge()

    def judge(self) -> None:
        """Raises DataError as `bad` does, however few were read: for the end of a data set."""
        if self.skipped > self._max_bad_fraction * self.read:
            why = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            raise DataError(
                f"{self.skipped} of {self.read} samples are unusable ({why}), more than "
                f"data.max_bad_fraction={self._max_bad_fraction:g}; mend the shards (the log names each sample), "
                "or raise it"
            )

    def state(self) -> dict[str, Any]:
        return {"read": self.read, "reasons": dict(self.reasons)}

    def load(self, state: dict[str, Any]) -> None:
        self.read, self.reasons = state["read"], Counter(state["reasons"])


def sample_key(raw: RawSample) -> str:
    """ "<shard file name>/<sample key>"."""
    return f"{PurePath(raw['__url__']).name}/{raw['__key__']}"


def to_prompt(raw: RawSample) -> Prompt:
    """Check and type a raw sample. Raises BadSample."""
    if FAULT in raw:
        raise BadSample("damaged shard", raw[FAULT])
    record = _record(raw)
    images = tuple(_image(suffix, raw[suffix]) for suffix in _image_members(raw))
    messages = _messages(record)
    shown = sum(part.get("type") == "image" for m in messages for part in _parts(m))
    if shown != len(images):
        raise BadSample(
            "image count", f"{shown} image parts in the messages but {len(images)} images in the sample"
        )
    response = record.get("response")
    if response is not None and not isinstance(response, str):
        raise BadSample("wrong json", "response must be text")
    return Prompt(
        key=sample_key(raw),
        messages=messages,
        images=images,
        answer=record["answer"],
        task=record["task"],
        response=response,
        meta=record.get("meta") or {},
    )


def _record(raw: RawSample) -> dict[str, Any]:
    if "json" not in raw:
        raise BadSample("no json", f"members: {', '.join(sorted(k for k in raw if not k.startswith('__')))}")
    try:
        record = json.loads(raw["json"])
    except (ValueError, RecursionError) as error:
        raise BadSample("wrong json", str(error)) from None
    if not isinstance(record, dict):
        raise BadSample("wrong json", "it holds no object")
    for key in ("messages", "answer", "task"):
        if key not in record:
            raise BadSample("wrong json", f"key {key} is missing")
    if not isinstance(record["task"], str) or not record["task"]:
        raise BadSample("wrong json", "task must be a name")
    if not isinstance(record.get("meta") or {}, dict):
        raise BadSample("wrong json", "meta must be an object")
    return record


def _messages(record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadSample("wrong json", "messages must be a list of chat messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadSample("wrong json", f"a message needs a role out of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str | list) or any(not isinstance(p, dict) for p in _parts(message)):
            raise BadSample("wrong json", "a message's content must be text or a list of parts")
        for part in _parts(message):
            if part.get("type") == "text" and not isinstance(part.get("text"), str):
                raise BadSample("wrong json", "a text part needs its text")
            if part.get("type") not in ("text", "image"):
                raise BadSample("wrong json", f"part type {part.get('type')!r} is neither text nor image")
    return tuple(messages)


def _parts(message: Any) -> list[Any]:
    return message["content"] if isinstance(message.get("content"), list) else []


def _image_members(raw: RawSample) -> list[str]:
    """Suffixes of images in order: png, or 0.png, 1.png, ... 10.png."""
    found = [suffix for suffix in raw if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    return sorted(
        found, key=lambda suffix: [(len(p), p) if p.isdigit() else (99, p) for p in suffix.split(".")]
    )


def _image(suffix: str, data: bytes) -> EncodedImage:
    """Read the header only: format and size."""
    from PIL import Image

    if not data:
        raise BadSample("corrupt image", f"{suffix} is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            # for a PNG without EXIF in its header, Pillow's getexif would decode the whole image to look for one
            has_exif = image.format != "PNG" or "exif" in image.info
            too_large = width * height > MAX_PIXELS
            rotated = has_exif and not too_large and image.getexif().get(0x0112) in (5, 6, 7, 8)  # axes swapped
    except Image.DecompressionBombError:
        raise BadSample("image too large", suffix) from None
    except Exception as error:  # decoders raise whatever their format's library does
        raise BadSample("corrupt image", f"{suffix}: {error}") from None
    if too_large:
        raise BadSample("image too large", f"{suffix} has {width}x{height} pixels, more than {MAX_PIXELS}")
    if rotated:
        width, height = height, width
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=width, height=height)
