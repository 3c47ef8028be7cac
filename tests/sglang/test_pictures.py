"""SGLang sees each picture as the policy does: its own loader on every kind there is, its server on some of them."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gspo_mm.config import Config
from gspo_mm.data.pictures import decode_image, measure
from gspo_mm.data.processor import Processor
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout import requests as client
from gspo_mm.rollout.requests import request_of
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.stages import check_servers
from gspo_mm.sync.parity import ParityError, check_parity
from gspo_mm.sync.sglang import SGLangPush
from gspo_mm.types import EncodedImage, EncodedPrompt, Prompt, SamplingParams
from tests.pictures import ALL, scene
from tests.sglang.conftest import MakeConfig
from tests.tars import image_bytes, record, write_tar

SENT = [
    *("JPEG RGB", "JPEG CMYK", "PNG P", "PNG I;16", "TIFF LAB", "GIF P", "BMP 1"),
    *("PNG RGBA", "WEBP RGBA", "PNG palette, alphas", "BMP with alpha", "PNG RGB, a colour transparent"),
    *("TIFF floats", "TIFF 32 bits", "animated WEBP", "MPO", "PNG with gamma"),
    *("JPEG turned 6 by exif", "PNG turned 5 by xmp", "WEBP turned 8 by both", "TIFF turned 7 by exif"),
]


def as_it_came(data: bytes, *, lossless: bool) -> str:
    """What SGLang would have to decode in its own way."""
    return "data:image/any;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def policy(config: Config, engine: SGLangEngine) -> Policy:
    SGLangPush.serve_folder(config, engine)
    return Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=1)


def encoded(processor: Processor, name: str, data: bytes) -> EncodedPrompt:
    width, height = measure(data)
    picture = EncodedImage(data=data, key=EncodedImage.key_of(data), width=width, height=height)
    parts = [{"type": "image"}, {"type": "text", "text": "What is in the upper left corner?"}]
    messages = ({"role": "user", "content": parts},)
    return processor.encode(Prompt(key=name, messages=messages, images=(picture,), answer="", task="t"))


def test_the_servers_loader_makes_the_policys_pixels_of_what_is_sent(processor: Processor) -> None:
    from sglang.srt.utils.common import load_image  # type: ignore[import-not-found]

    for name, data in ALL.items():
        prompt = encoded(processor, name, data)
        ((url,),) = request_of(prompt, processor, SamplingParams(), 1)["image_data"]
        seen, _ = load_image(url)
        assert seen.mode == "RGB", name
        assert np.array_equal(np.asarray(seen), np.asarray(decode_image(data))), name


def test_no_picture_is_left_to_the_jpeg_decoder_of_a_gpu(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.utils import common  # type: ignore[import-not-found]

    monkeypatch.setattr(common, "is_cuda", lambda: True)
    assert common.is_jpeg_with_cuda(image_bytes(scene(), "JPEG")), "it would be, as it came"
    for name, data in ALL.items():
        ((url,),) = request_of(encoded(processor, name, data), processor, SamplingParams(), 1)["image_data"]
        assert not common.is_jpeg_with_cuda(common.get_image_bytes(url)), name


def test_the_server_computes_the_policys_log_probs_whatever_the_picture_is(
    policy: Policy, engine: SGLangEngine, processor: Processor
) -> None:
    gaps = check_parity(
        policy, engine, processor, [encoded(processor, name, ALL[name]) for name in SENT], threshold=1e-4
    )
    assert gaps["after an image"].largest < 1e-4
    assert gaps["response"].largest < 1e-4


def test_a_picture_that_the_server_sees_otherwise_is_named_with_what_is_odd_about_it(
    policy: Policy, engine: SGLangEngine, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "data_url", as_it_came)
    names = ["PNG RGB", "JPEG RGB", "PNG L", "BMP RGB", "PNG palette, alphas"]
    prompts = [encoded(processor, name, ALL[name]) for name in names]
    check_parity(policy, engine, processor, prompts[:-1], threshold=1e-4)
    with pytest.raises(ParityError) as error:
        check_parity(policy, engine, processor, prompts, threshold=1e-4)
    said = str(error.value)
    assert "other pictures than the policy in 1 of 5 samples" in said
    assert "PNG palette, alphas (PNG P transparency, 40x24) by " in said
    assert "extra_args" not in said


def test_the_preflight_finds_the_odd_pictures_of_the_training_data(
    make_config: MakeConfig,
    policy: Policy,
    engine: SGLangEngine,
    processor: Processor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The held-out prompt alone would pass."""
    members = []
    for number in range(40):
        data = ALL["PNG RGBA"] if number == 31 else image_bytes(scene())
        members += [(f"{number}.png", data), (f"{number}.json", record(f"What is it? {number}"))]
    config = make_config(
        data={"train": [write_tar(tmp_path / "odd.tar", members)]},
        rollout={"sglang": {"max_logprob_gap": 1e-4}},
    )
    usual = [encoded(processor, "held out", image_bytes(scene()))]
    given: Any = SimpleNamespace(
        policy=policy, servers=engine, processor=processor, canary=usual, ranks=policy.ranks
    )
    check_servers(config, given)
    monkeypatch.setattr(client, "data_url", as_it_came)
    with pytest.raises(ParityError, match=r"in 1 of 3 samples.*odd.tar/31 \(PNG RGBA, 40x24\) by "):
        check_servers(config, given)
