"""Tars and images as tests want them, good and bad."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> str:
    """Write members in their order; returns the path as a pattern of data.train."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def image_bytes(image: Image.Image | None = None, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new("RGB", (64, 48), "red")).save(buffer, kind, **options)
    return buffer.getvalue()


def record(text: str = "Which digit?", images: int = 1, **changes: Any) -> bytes:
    """The JSON of a sample with one question."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    sample = {"messages": [{"role": "user", "content": content}], "answer": 1, "task": "digit"}
    return json.dumps(sample | changes).encode()


def write_samples(path: Path, keys: Iterable[str], **changes: Any) -> str:
    """A shard of small good samples, each with its key in its answer and an image of its own."""
    members = []
    for i, key in enumerate(keys):
        image = Image.new("RGB", (32, 32), (i % 256, i // 256 % 256, hash(path.name) % 256))
        members += [(f"{key}.png", image_bytes(image)), (f"{key}.json", record(answer=key, **changes))]
    return write_tar(path, members)
