"""A row of somebody's data set -> the files of a sample, or the reason why not.

Rows come as the formats of the field have them, without renaming anything:

    TRL            prompt: messages or text; image or images; solution or answer; completion; or messages alone
    verl           prompt: messages with <image> in their text; images: [{bytes, path}]; reward_model.ground_truth
    ms-swift       messages with <image> in their text, the last one perhaps an answer; images: [path]; solution;
                   or system, history: [[question, answer]], query, response; objects, which objects.py writes out
    slime          prompt: text or messages; images; label
    LLaVA          conversations of {from: human or gpt, value}, as ShareGPT's; image or images
    LLaMA-Factory  conversations; or system, history, instruction, input (a second line), output; images
    plain          problem, question or query: text, with or without <image>; image or images; answer

A reference answer for the warm start is the last message where that is the assistant's, or response, completion or
output. Where a row has no column of an answer, it is the answer too.
`Columns` names columns that are called otherwise; a dot leads into an object (reward_model.ground_truth). An image is
a path, {bytes, path} as in parquet and `datasets`, or a data: URL; nothing is downloaded. It is kept as it is, byte by
byte. Where no text says <image>, images come first.

A column that is not used is reported; one that holds pictures, video or sound refuses its row, since a question
without its picture is another question. `Columns.ignore` says that this is meant.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_mm.data.faults import BadSample
from gspo_mm.data.media import IMAGE, find_media, names_media
from gspo_mm.data.pictures import kind_of
from gspo_mm.data.samples import to_prompt
from gspo_mm.reward.grounding import Unit

from .objects import has_marks, with_objects

PLACEHOLDER = "<image>"

_PROMPT = ("messages", "conversations", "prompt", "problem", "question", "query", "instruction")
_IMAGES = ("images", "image")
_ANSWER = ("answer", "solution", "label", "ground_truth", "reward_model.ground_truth")
_TASK = ("task", "ability")
_RESPONSE = ("response", "completion", "output")
# who speaks in conversations -> role
_SPEAKERS = {"human": "user", "gpt": "assistant"}
# of a message, besides role and content: what chat templates read
_MESSAGE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")

type Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns; None: the first one found of those that the formats above use."""

    prompt: str | None = None
    # several columns make one list, in this order
    images: tuple[str, ...] = ()
    answer: str | None = None
    task: str | None = None
    response: str | None = None
    # null where a row lacks them
    meta: tuple[str, ...] = ()
    # as if the row did not have them
    ignore: tuple[str, ...] = ()
    # text of a system message to put in front; not a column
    system: str | None = None
    # in which the model gives boxes; not a column
    box_unit: Unit | None = None


def sample_of(
    row: Row,
    key: str,
    columns: Columns,
    *,
    folder: Path,
    task: str,
    on_unused: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """{"__key__": key, "json": bytes, "0.png": bytes, ...}, checked as training will check it. Raises BadSample.

    `folder`: where relative paths of images begin; `task`: of rows whose task column is missing. `on_unused` is called
    with the name of each column that holds something and was not used.
    """
    used: set[str] = set()
    row = {name: value for name, value in row.items() if name not in columns.ignore}
    images = [_image(value, folder) for value in _images(row, columns, used)]
    of_columns = len(images)
    messages = _messages(_asked(row, columns, used), images, folder, on_unused)
    if 0 < of_columns < len(images):
        raise BadSample(
            "image order", "some images stand in the messages and others in a column; name either of them"
        )
    response = _response(row, columns, messages, used)
    messages = [*_before(row, columns, messages, used), *messages]
    if "objects" in row and has_marks([messages, response]):
        used.add("objects")
        column, pictures = plain(row["objects"]), [data for data, _ in images]
        messages, response = with_objects(messages, response, column, pictures, columns.box_unit)
    has_answer = any(name.partition(".")[0] in row for name in _ANSWER)
    said = _MISSING if response is None or has_answer else response
    record = {
        "messages": _placed(messages, len(images)),
        "answer": plain(_find(row, columns.answer, _ANSWER, "answer", used=used, default=said)),
        "task": str(_find(row, columns.task, _TASK, "task", used=used, default=task)),
        "meta": {name: plain(_value(row, name, used)) for name in columns.meta},
    }
    _report_unused(row, used, on_unused, pictured=bool(images))
    if response is not None:
        record["response"] = response
    sample: dict[str, Any] = {"__key__": key, "json": json.dumps(record, ensure_ascii=False).encode()}
    for number, (data, suffix) in enumerate(images):
        sample[f"{number}.{suffix}"] = data
    to_prompt({**sample, "__url__": ""})
    return sample


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy's and pandas' kinds become Python's. Raises BadSample."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if (
        value is None
        or isinstance(value, str | bool | int)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    raise BadSample("wrong value", f"{str(value)[:80]} is nothing that JSON can hold")


_MISSING: Any = object()


def _value(row: Row, name: str, used: set[str]) -> Any:
    """What stands under `name`, in which a dot leads into an object; None where nothing does."""
    value: Any = row
    for part in [name] if name in row else name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is not None:
        used.add(name if name in row else name.partition(".")[0])
    return value


def _find(
    row: Row, name: str | None, usual: Sequence[str], what: str, *, used: set[str], default: Any = _MISSING
) -> Any:
    """The value of column `name`, or of the first of `usual` that the row has and that is not null."""
    for candidate in (name,) if name is not None else usual:
        value = _value(row, candidate, used)
        if value is not None:
            return value
    if default is not _MISSING and name is None:
        return default
    wanted = f"column {name}" if name is not None else f"any of {', '.join(usual)}"
    raise BadSample(f"no {what}", f"{wanted} is missing or null; the row has {', '.join(row)}")


def _asked(row: Row, columns: Columns, used: set[str]) -> Any:
    """The prompt. An instruction has its input below it."""
    prompt, below = _find(row, columns.prompt, _PROMPT, "prompt", used=used), row.get("input")
    if "instruction" in used and isinstance(below, str) and not any(find_media("input", below)):
        used.add("input")
        return f"{prompt}\n{below}".strip()
    return prompt


def _before(
    row: Row, columns: Columns, messages: Sequence[Mapping[str, Any]], used: set[str]
) -> list[dict[str, Any]]:
    """What columns put in front of the messages: a system message, and earlier questions with their answers."""
    before = []
    starts_anew = bool(messages) and messages[0]["role"] != "system"
    system = columns.system
    if system is None and starts_anew and isinstance(row.get("system"), str):
        system = _value(row, "system", used)
    if system:
        before.append({"role": "system", "content": system})
    history = row.get("history")
    if starts_anew and _is_list(history) and all(map(_is_pair, turns := plain(history))):
        used.add("history")
        for asked, said in turns:
            before += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return before


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list) and [type(text) for text in turn] == [str, str]


def _images(row: Row, columns: Columns, used: set[str]) -> list[Any]:
    if columns.images:
        found = [value for name in columns.images if (value := _value(row, name, used)) is not None]
        if not found:
            wanted = ", ".join(columns.images)
            raise BadSample("no image", f"column {wanted} is missing or null; the row has {', '.join(row)}")
    else:
        found = [_find(row, None, _IMAGES, "image", used=used, default=[])]
    return [image for value in found for image in (value if _is_list(value) else [value])]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or hasattr(value, "tolist")


def _response(row: Row, columns: Columns, messages: list[dict[str, Any]], used: set[str]) -> str | None:
    """The reference answer: the assistant's last message, which leaves `messages`, or a column's text."""
    last = _text(messages.pop()) if messages[-1].get("role") == "assistant" else None
    given = _find(row, columns.response, _RESPONSE, "response", used=used, default=None)
    if _is_list(given):  # TRL's completions are messages
        given = list(given)
        if len(given) != 1 or not isinstance(given[0], Mapping):
            raise BadSample("wrong response", "it is neither text nor one message")
        given = _text(given[0])
    if given is not None and not isinstance(given, str):
        raise BadSample("wrong response", f"{str(given)[:80]!r} is no text")
    if last is not None and given is not None and last != given:
        raise BadSample(
            "two responses", "the last message and a column hold different ones; --ignore the column"
        )
    return given if last is None else last


def _report_unused(row: Row, used: set[str], on_unused: Callable[[str], None], *, pictured: bool) -> None:
    """Raises BadSample for columns of pictures, video or sound that would be dropped.

    Beside pictures that are read (`pictured`), a path is taken for where one of them came from.
    """
    media: dict[str, tuple[str, str]] = {}
    for name, value in row.items():
        if name in used or _is_empty(value):
            continue
        found = next(find_media(name, value), None)
        if found and not (pictured and isinstance(value, str) and names_media(name) is None):
            media[name] = found
        else:
            on_unused(name)
    if media:
        names, (place, kind) = ",".join(media), next(iter(media.values()))
        readable = ",".join(place.partition("[")[0] for place, kind in media.values() if kind == IMAGE)
        fix = f"--image {readable} reads it" if kind == IMAGE else f"{kind} cannot be trained on"
        raise BadSample(
            "unused media",
            f"column {place} looks like {kind} and is not used: {fix}, --ignore {names} leaves it out",
        )


def _is_empty(value: Any) -> bool:
    if hasattr(value, "tolist"):
        value = value.tolist()
    return value is None or (isinstance(value, str | bytes | list | tuple | Mapping) and len(value) == 0)


def _image(value: Any, folder: Path) -> tuple[bytes, str]:
    """Encoded bytes, and the suffix of their format."""
    if isinstance(value, Mapping) and value.get("bytes"):
        data = value["bytes"]
    elif isinstance(value, str) and value.startswith("data:"):
        data = _of_url(value)
    else:
        path = value.get("path") if isinstance(value, Mapping) else value
        data = _of_file(path, folder)
    if not isinstance(data, bytes):
        raise BadSample("corrupt image", f"bytes of type {type(data).__name__}")
    return data, _suffix(data)


def _of_url(url: str) -> bytes:
    try:
        return base64.b64decode(url.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("corrupt image", f"data: URL: {error}") from None


def _of_file(path: Any, folder: Path) -> bytes:
    if not isinstance(path, str) or not path:
        raise BadSample("no image", f"{str(path)[:80]!r} is no path, no bytes and no data: URL")
    if "://" in path and not path.startswith("file://"):
        raise BadSample("no image", f"{path} is a web address, which is not fetched; download it first")
    try:
        return (folder / path.removeprefix("file://")).read_bytes()
    except OSError as error:
        raise BadSample("no image", f"{path}: {error.strerror}") from None


def _suffix(data: bytes) -> str:
    name = kind_of(data)[0].lower()
    return {"jpeg": "jpg", "tiff": "tif"}.get(name, name)


def _messages(
    prompt: Any, images: list[tuple[bytes, str]], folder: Path, on_unused: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Chat messages whose content is text or parts; images that stand in parts are appended to `images`."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt or not all(isinstance(m, Mapping) for m in prompt):
        raise BadSample("wrong prompt", "it is neither text nor a list of messages")
    messages = []
    for message in map(_with_role, prompt):
        content: Any = message.get("content")
        if hasattr(content, "tolist"):
            content = content.tolist()
        if isinstance(content, list):
            content = [_part(part, images, folder, on_unused) for part in content]
        read = {name: plain(message[name]) for name in _MESSAGE_KEYS if message.get(name) is not None}
        messages.append({"role": message.get("role"), "content": content, **read})
        _report_unused(
            message,
            {"role", "content", *_MESSAGE_KEYS},
            lambda name: on_unused(f"{name} of messages"),
            pictured=False,
        )
    return messages


def _with_role(message: Row) -> Row:
    """{from, value} as {role, content}; other messages as they are."""
    if "from" not in message or "role" in message:
        return message
    renamed = {"role": _SPEAKERS.get(message["from"], message["from"]), "content": message.get("value")}
    return renamed | {name: value for name, value in message.items() if name not in ("from", "value")}


def _part(
    part: Any, images: list[tuple[bytes, str]], folder: Path, on_unused: Callable[[str], None]
) -> dict[str, Any]:
    """One part of a message, with the columns of parquet that are null left out."""
    if not isinstance(part, Mapping):
        raise BadSample("wrong prompt", f"a part of a message is {str(part)[:80]!r}")
    given = {name: value for name, value in part.items() if value is not None}
    if given.get("type") == "text":
        return given  # with whatever else it has, which is then refused as in shards
    if given.get("type") not in ("image", "image_url"):
        raise BadSample("wrong prompt", f"part type {given.get('type')!r} is neither text nor image")
    for name in given.keys() - {"type", "image", "image_url"}:
        on_unused(f"{name} of image parts")
    source = given.get("image", given.get("image_url"))
    if isinstance(source, Mapping) and "url" in source:
        source = source["url"]
    if source is not None:
        images.append(_image(source, folder))
    return {"type": "image"}


def _placed(messages: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """The messages with an image part wherever their text says <image>, or else in front of the first user text."""
    placed = [
        m | {"content": _split(m["content"]) if isinstance(m["content"], str) else m["content"]}
        for m in messages
    ]
    parts = [part for m in placed if isinstance(m["content"], list) for part in m["content"]]
    first = next((m for m in placed if m["role"] == "user"), None)
    if images and first and not any(part["type"] == "image" for part in parts):
        text = first["content"] if isinstance(first["content"], list) else [_text_part(first["content"])]
        first["content"] = [{"type": "image"}] * images + text
    return placed


def _split(text: str) -> str | list[dict[str, Any]]:
    """Text as it is, or the parts around its <image>s."""
    if PLACEHOLDER not in text:
        return text
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        parts += [{"type": "image"}] if number else []
        parts += [_text_part(piece)] if piece else []
    return parts


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content or [])
