"""The canary finds a model whose answers do not depend on the image."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gspo_mm.config import PolicyConfig
from gspo_mm.policy.canary import blank_image, check_sight
from gspo_mm.policy.engine import Policy
from gspo_mm.types import BlindModelError, EncodedImage, EncodedPrompt, Prompt
from tests.tiny_vl import save, tiny_vl

IMAGE_TOKEN = 252
SIDE = 16  # pixels: 4 x 4 patches, 4 image tokens


class StubProcessor:
    """Patches straight from the pixels; positions as for text."""

    def pixels(self, image: EncodedImage) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(io.BytesIO(image.data)) as opened:
            values = torch.tensor(list(opened.convert("RGB").tobytes()), dtype=torch.float32) / 127.5 - 1
        return values.view(16, -1).repeat(1, 2), torch.tensor([[1, 4, 4]])

    def grid(self, image: EncodedImage) -> torch.Tensor:
        return torch.tensor([[1, 4, 4]])

    def positions(self, token_ids: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
        return torch.arange(len(token_ids)).expand(3, -1)

    def encode_response(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def image(seed: int) -> EncodedImage:
    noise = torch.randint(
        0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    buffer = io.BytesIO()
    Image.fromarray(noise.numpy()).save(buffer, format="PNG")
    data = buffer.getvalue()
    return EncodedImage(data=data, key=EncodedImage.key_of(data), width=SIDE, height=SIDE)


def encoded(*images: EncodedImage, response: str | None = "7") -> EncodedPrompt:
    prompt = Prompt(key="s/1", messages=(), images=images, answer=7, task="digit", response=response)
    ids = (1, 2, *[IMAGE_TOKEN] * 4 * len(images), 3)
    return EncodedPrompt(prompt=prompt, token_ids=ids, pixel_values=None, image_grid_thw=None)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    save(tiny_vl(num_hidden_layers=3), tmp_path / "hf")
    return Policy.from_hf(str(tmp_path / "hf"), PolicyConfig(dtype="float32"), seed=0, total_steps=1)


def blind(policy: Policy) -> None:
    """As if the features were not the image's: the mergers answer the same for any input."""
    for name, parameter in policy.chunks[0].visual.named_parameters():
        if "merger" in name and name.endswith("linear_fc2.weight"):
            parameter.data.zero_()


def test_a_model_that_sees_passes_and_says_by_how_much(policy: Policy) -> None:
    prompts = [encoded(image(1), image(2)), encoded(image(3), response=None), encoded()]
    assert check_sight(policy, StubProcessor(), prompts) > 1e-3


def test_a_blind_model_is_stopped_with_one_sentence(policy: Policy) -> None:
    blind(policy)
    with pytest.raises(
        BlindModelError, match=r"does not see: blanking the images of 1 prompts \(first s/1\)"
    ):
        check_sight(policy, StubProcessor(), [encoded(image(1)), encoded()])


def test_prompts_without_images_say_nothing(policy: Policy) -> None:
    blind(policy)
    assert check_sight(policy, StubProcessor(), [encoded()]) == 0.0


def test_the_blank_image_has_the_size_of_the_real_one() -> None:
    blank = blank_image(EncodedImage(data=b"", key="", width=31, height=17))
    with Image.open(io.BytesIO(blank.data)) as opened:
        assert opened.size == (31, 17)
        assert opened.getextrema() == ((128, 128),) * 3
    assert blank.key == EncodedImage.key_of(blank.data)


def test_the_weights_are_left_as_they_were(policy: Policy) -> None:
    before: dict[str, Any] = {n: p.clone() for n, p in policy.chunks[0].named_parameters()}
    check_sight(policy, StubProcessor(), [encoded(image(1))])
    assert all(torch.equal(p, before[n]) for n, p in policy.chunks[0].named_parameters())
