"""A raw sample -> a Prompt, or the reason why not.

Nothing in a sample is unpickled or executed: `.json` is parsed, image members are kept as bytes, every other member
is ignored. Images are decoded later, once, by the processor.
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from gspo_mm.data.faults import BadSample
from gspo_mm.data.faults import LeftOut as LeftOut
from gspo_mm.data.pictures import measure
from gspo_mm.data.places import shard_name
from gspo_mm.data.shards import FAULT, SOURCE, RawSample
from gspo_mm.types import EncodedImage, Prompt

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
ROLES = ("system", "user", "assistant", "tool")


def sample_key(raw: RawSample) -> str:
    """ "<shard file name>/<sample key>", in a mixture with "<source>/" before it."""
    source = raw.get(SOURCE)
    key = f"{source}/" * bool(source) + f"{shard_name(raw['__url__'])}/{raw['__key__']}"
    return key.encode(errors="backslashreplace").decode()  # names in a tar need not be UTF-8


def to_prompt(raw: RawSample) -> Prompt:
    """Check and type a raw sample. Raises BadSample."""
    if isinstance(raw.get(FAULT), str):  # a member of that suffix would be bytes
        raise BadSample("damaged shard", raw[FAULT])
    key = PurePosixPath(raw["__key__"])
    if key.is_absolute() or ".." in key.parts:
        raise BadSample("path leaves its folder", raw["__key__"])
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
        source=raw.get(SOURCE, ""),
    )


def _record(raw: RawSample) -> dict[str, Any]:
    if "json" not in raw:
        raise BadSample("no json", f"members: {', '.join(sorted(k for k in raw if not k.startswith('__')))}")
    try:
        record = json.loads(raw["json"])
        if b"\\u" in raw["json"]:  # may spell half a character, which no tokenizer takes
            json.dumps(record, ensure_ascii=False).encode()
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
            # chat templates take a part with such a key for an image, whatever its type says
            if part["type"] == "text" and (others := part.keys() - {"type", "text"}):
                raise BadSample("wrong json", f"a text part has {', '.join(sorted(others))} beside its text")
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
    try:
        width, height = measure(data)
    except BadSample as fault:
        raise BadSample(fault.reason, f"{suffix}: {fault.detail}") from None
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=width, height=height)
