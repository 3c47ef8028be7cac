"""Shards made by chance: whatever their bytes, reading ends, and gives prompts or reasons.

`GSPO_FUZZ=10000` tries as many shards a test; the default is for every day.
"""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gspo_mm.config import DataConfig
from gspo_mm.data.faults import BadSample
from gspo_mm.data.filters import Filter
from gspo_mm.data.processor import decode_image
from gspo_mm.data.samples import sample_key, to_prompt
from gspo_mm.data.shards import FAULT, read_shard
from tests.tars import image_bytes, record

FUZZ = settings(
    max_examples=int(os.environ.get("GSPO_FUZZ", "100")),
    deadline=5000,  # ms for one shard: a hang is a failure
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize="GSPO_FUZZ" not in os.environ,
)

IMAGES = [
    image_bytes(),
    image_bytes(kind="JPEG"),
    image_bytes(kind="GIF"),
    image_bytes(kind="WEBP"),
    image_bytes(kind="TIFF"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "video"]) | JSON},
    optional={"text": st.text(max_size=9) | JSON},
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system", "assistant"]) | JSON,
        "content": st.lists(PART, max_size=3) | JSON,
    }
)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(MESSAGE, max_size=2) | JSON,
        "answer": JSON,
        "task": st.just("t") | JSON,
        "meta": st.dictionaries(st.text(max_size=3), JSON, max_size=2) | JSON,
        "response": st.text(max_size=3) | JSON,
    },
)
DATA = st.one_of(
    st.sampled_from([*IMAGES, record(), b""]),
    st.binary(max_size=300),
    RECORD.map(lambda value: json.dumps(value).encode()),
    JSON.map(lambda value: json.dumps(value).encode()),
)
NAME = st.one_of(
    st.sampled_from(["1.png", "1.json", "2.0.png", "2.1.jpg", "2.json", "../3.json", "__4.json", "5"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12),
)
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12)
FILTER = Filter(
    DataConfig(train=["x"], curriculum={"key": "level", "start": 0, "end": 9, "samples": 10}),  # type: ignore[arg-type]
    training=True,
)


def verdict(raw: Any) -> str:
    """What the training does with a sample up to the tokenizer: the reason why it is not used, or ""."""
    try:
        prompt = to_prompt(raw)
        for image in prompt.images:
            assert decode_image(image.data).mode == "RGB"
        FILTER.check(prompt, 5)
    except BadSample as fault:
        return json.loads(json.dumps([fault.reason, fault.detail]))[0]  # as the quarantine file wants it
    return ""


def verdicts(path: Path) -> list[str]:
    samples = list(read_shard(str(path)))
    assert all(sample_key(raw).encode() for raw in samples)
    return [verdict(raw) for raw in samples]


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def changed(data: bytes, changes: list[tuple[float, int]]) -> bytes:
    """Some bytes of `data` replaced; places are fractions of its length."""
    edited = bytearray(data)
    for place, value in changes:
        if edited:
            edited[min(int(place * len(edited)), len(edited) - 1)] = value
    return bytes(edited)


GOOD = tar_of([(f"{i}.{s}", d) for i in range(3) for s, d in (("png", IMAGES[0]), ("json", record()))])


@FUZZ
@given(members=st.lists(st.tuples(NAME, DATA), max_size=8))
def test_any_members_give_prompts_or_reasons(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(members))
    verdicts(path)


@FUZZ
@given(changes=CHANGES, cut=st.floats(0, 1))
def test_any_damage_to_a_shard_gives_prompts_or_reasons(
    tmp_path: Path, changes: list[tuple[float, int]], cut: float
) -> None:
    path = tmp_path / "a.tar"
    data = changed(GOOD, changes)[: int(cut * len(GOOD)) + 1]
    path.write_bytes(data)
    found = verdicts(path)
    lost = len(data) < 6 * 1024
    assert not lost or found[-1] == "damaged shard"


@FUZZ
@given(data=st.binary(max_size=3000))
def test_any_bytes_are_a_shard_or_a_fault(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    assert list(read_shard(str(path)))[-1][FAULT]


@FUZZ
@given(image=st.sampled_from(IMAGES), changes=CHANGES, cut=st.floats(0.1, 1))
def test_any_damage_to_an_image_gives_a_picture_of_its_size_or_a_reason(
    image: bytes, changes: list[tuple[float, int]], cut: float
) -> None:
    data = changed(image, changes)[: int(cut * len(image))]
    raw: dict[str, Any] = {"__key__": "1", "__url__": "a.tar", "json": record(), "png": data}
    assert verdict(raw) in ("no difficulty", "aspect ratio", "corrupt image", "image too large")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 10240])
def test_zeros_are_an_empty_shard_or_a_fault(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(size))
    found = list(read_shard(str(path)))
    assert not found or found[0][FAULT]
