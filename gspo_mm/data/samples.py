"""A raw sample -> a Prompt, or the reason why not.

Nothing in a sample is unpickled or executed: `.json` is parsed, image members are kept as bytes. Members and keys that
nothing reads are reported, and one that is a picture, video or sound refuses its sample: a question without its picture
is another question. Images are decoded later, once, by the processor.

The order of several images is that of their numbers (KEY.0.png, KEY.1.jpg, ... or KEY.frame0.png, KEY.frame1.png, ...),
or what KEY.json says: in `images`, a list of the members' names, or in image parts that name them, {"type": "image",
"image": "before.png"}. Other names have no order that can be trusted, since archives are often sorted by name, and refuse
the sample. Members that KEY.json lists in `pages` are in no message: an environment shows them one by one, in that order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from gspo_mm.data.faults import BadSample
from gspo_mm.data.media import find_media, kind_of_suffix
from gspo_mm.data.pictures import measure
from gspo_mm.data.places import shard_name
from gspo_mm.data.shards import FAULT, SOURCE, RawSample
from gspo_mm.types import EncodedImage, Prompt

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
ROLES = ("system", "user", "assistant", "tool")
_KEYS = ("messages", "answer", "task", "response", "meta", "images", "pages")  # of a sample's JSON


def sample_key(raw: RawSample) -> str:
    """ "<shard file name>/<sample key>", in a mixture with "<source>/" before it."""
    source = raw.get(SOURCE)
    key = f"{source}/" * bool(source) + f"{shard_name(raw['__url__'])}/{raw['__key__']}"
    return key.encode(errors="backslashreplace").decode()  # names in a tar need not be UTF-8


def to_prompt(raw: RawSample, on_unused: Callable[[str], None] = lambda name: None) -> Prompt:
    """Check and type a raw sample. Raises BadSample.

    `on_unused` is called with each member (".txt") and key of the JSON ("key difficulty") that nothing reads.
    """
    if isinstance(raw.get(FAULT), str):  # a member of that suffix would be bytes
        raise BadSample("damaged shard", raw[FAULT])
    key = PurePosixPath(raw["__key__"])
    if key.is_absolute() or ".." in key.parts:
        raise BadSample("path leaves its folder", raw["__key__"])
    record = _record(raw)
    _report_unused(raw, record, on_unused)
    messages = _messages(record)
    found = [suffix for suffix in raw if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    later = _page_members(raw["__key__"], found, record)
    shown = _image_members(raw["__key__"], [suffix for suffix in found if suffix not in later], record)
    images, pages = (tuple(_image(suffix, raw[suffix]) for suffix in some) for some in (shown, later))
    parts = sum(part.get("type") == "image" for m in messages for part in _parts(m))
    if parts != len(images):
        raise BadSample(
            "image count", f"{parts} image parts in the messages but {len(images)} images in the sample"
        )
    response = record.get("response")
    turns: list[Any] = response if isinstance(response, list) else [response]
    if turns != [None] and not (turns and all(isinstance(turn, str) for turn in turns)):
        raise BadSample("wrong json", "response must be text, or a list of texts, one for each turn")
    return Prompt(
        key=sample_key(raw),
        messages=messages,
        images=images,
        answer=record["answer"],
        task=record["task"],
        response=turns[-1],
        first_turns=tuple(turns[:-1]),
        meta=record.get("meta") or {},
        pages=pages,
        source=raw.get(SOURCE, ""),
    )


def _record(raw: RawSample) -> dict[str, Any]:
    if "json" not in raw:
        members = sorted(name for name in raw if not name.startswith("__"))
        inner = next((name for name in members if name.endswith(".json")), None)
        if inner is not None:  # webdataset's rule: a name ends at its first dot
            full, name = f"{raw['__key__']}.{inner}", f"{raw['__key__']}.{inner.removesuffix('.json')}"
            fix = f"rename {full} and its images, as in {name.replace('.', '-')}.json"
            raise BadSample(
                "dot in a name", f"what follows the first dot of {name} is taken for a suffix; {fix}"
            )
        raise BadSample("no json", f"members: {', '.join(members)}")
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
        _check_message(message)
    last = messages[-1]["role"]
    if last == "assistant":
        raise BadSample(
            "answer in the prompt",
            "the last message is the assistant's; it belongs in response, for the warm start",
        )
    if last == "system" or not any(message["role"] == "user" for message in messages):
        raise BadSample(
            "no question", "messages must hold the user's question, and must not end with a system message"
        )
    if not any(_has_content(message) for message in messages if message["role"] != "system"):
        raise BadSample("no question", "the messages are empty")
    return tuple(messages)


def _check_message(message: Any) -> None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise BadSample("wrong json", f"a message needs a role out of {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, str | list) or any(not isinstance(p, dict) for p in _parts(message)):
        raise BadSample("wrong json", "a message's content must be text or a list of parts")
    for name, value in message.items():
        if name not in ("role", "content") and (medium := next(find_media(name, value), None)):
            place, kind = medium
            raise BadSample(
                "unused media",
                f"{place} of a message looks like {kind}; images stand in parts of its content",
            )
    for part in _parts(message):
        if part.get("type") == "text" and not isinstance(part.get("text"), str):
            raise BadSample("wrong json", "a text part needs its text")
        if part.get("type") not in ("text", "image"):
            raise BadSample("wrong json", f"part type {part.get('type')!r} is neither text nor image")
        # chat templates take a part with such a key for an image, whatever its type says
        if part["type"] == "text" and (others := part.keys() - {"type", "text"}):
            raise BadSample("wrong json", f"a text part has {', '.join(sorted(others))} beside its text")
    texts = (
        [content]
        if isinstance(content, str)
        else [part["text"] for part in content if part["type"] == "text"]
    )
    if any("<image>" in text for text in texts):
        raise BadSample(
            "image in text", 'a text says <image>, which stays text; write {"type": "image"} parts there'
        )


def _has_content(message: dict[str, Any]) -> bool:
    if isinstance(message["content"], str):
        return bool(message["content"].strip())
    return any(part["type"] == "image" or part["text"].strip() for part in message["content"])


def _parts(message: Any) -> list[Any]:
    return message["content"] if isinstance(message.get("content"), list) else []


def _report_unused(raw: RawSample, record: dict[str, Any], on_unused: Callable[[str], None]) -> None:
    """Raises BadSample for media that the model would not be shown."""
    for member in raw:
        suffix = member.rpartition(".")[2]
        if member.startswith("__") or member == "json" or suffix in IMAGE_SUFFIXES:
            continue
        if kind := kind_of_suffix(suffix):
            readable = f"; images are {', '.join(IMAGE_SUFFIXES)}" if kind == "image" else ""
            raise BadSample("unused media", f"{member} looks like {kind}, which is not read{readable}")
        on_unused(f".{member}")
    for name, value in record.items():
        if name in _KEYS or value is None:
            continue
        if medium := next(find_media(name, value), None):
            place, kind = medium
            raise BadSample(
                "unused media",
                f"key {place} looks like {kind}, which is not read: images are members of the archive; what is meant "
                "to be left out belongs in meta",
            )
        on_unused(f"key {name}")


def _page_members(key: str, found: list[str], record: dict[str, Any]) -> list[str]:
    """Suffixes of those image members that `pages` lists, in its order."""
    listed = record.get("pages") or []
    pages = _suffixes(key, listed)
    if pages is None or len({*pages} & {*found}) < len(pages):
        members = ", ".join(found) or "none"
        raise BadSample(
            "image order", f"pages in the json is {str(listed)[:200]}, but the members are {members}"
        )
    return pages


def _image_members(key: str, found: list[str], record: dict[str, Any]) -> list[str]:
    """The suffixes `found` in the order of the images: see the top of this file."""
    if (listed := record.get("images")) is not None:
        if (order := _named_members(key, found, listed)) is not None:
            return order
        members = ", ".join(found) or "none"
        raise BadSample(
            "image order", f"images in the json is {str(listed)[:200]}, but the members are {members}"
        )
    if len(found) <= 1:
        return found
    of_parts = [
        part.get("image")
        for message in record["messages"]
        for part in _parts(message)
        if part["type"] == "image"
    ]
    if (order := _named_members(key, found, of_parts)) is not None:
        return order
    numbered = [re.fullmatch(r"(.*?)(\d+)\.\w+", suffix) for suffix in found]
    places = {int(match[2]): suffix for match, suffix in zip(numbered, found, strict=True) if match}
    if len(places) < len(found) or len({match[1] for match in numbered if match}) > 1:
        raise BadSample(
            "image order",
            f"{', '.join(found)} have no order; number them (0.png, 1.png ...), or list them as images in the json",
        )
    return [places[number] for number in sorted(places)]


def _named_members(key: str, found: list[str], names: Any) -> list[str] | None:
    """The members by these names; None where they are others."""
    order = _suffixes(key, names)
    return order if order is not None and sorted(order) == sorted(found) else None


def _suffixes(key: str, names: Any) -> list[str] | None:
    """Of members named by suffix ("before.png") or whole ("KEY.before.png"); None where that is no list of names."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    base = PurePosixPath(key).name
    return [PurePosixPath(name).name.removeprefix(f"{base}.") for name in names]


def _image(suffix: str, data: bytes) -> EncodedImage:
    try:
        width, height = measure(data)
    except BadSample as fault:
        raise BadSample(fault.reason, f"{suffix}: {fault.detail}") from None
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=width, height=height)
