"""Every FP8 recipe, with primary weights and without, begins to learn the digits task as BF16 does.

The first steps only, in which the loss falls to two fifths: `tests/gpu` has the 50 that a card is to make.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_mm.policy import spec
from tests.gpu.test_gpu import curve, digits  # noqa: F401  # a fixture

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def fused() -> None:
    spec.FUSED = True


@pytest.fixture(scope="module")
def bf16(digits: Path) -> list[float]:  # noqa: F811
    return curve(digits, "bf16", steps=STEPS)


@pytest.mark.parametrize("primary_weights", [False, True], ids=["beside", "primary"])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_an_fp8_recipe_begins_to_learn_as_bf16_does(
    recipe: str,
    primary_weights: bool,
    digits: Path,  # noqa: F811
    bf16: list[float],
) -> None:
    fp8 = {"recipe": recipe, "primary_weights": primary_weights}
    found = curve(digits, f"{recipe} {primary_weights}".replace(" ", "-"), steps=STEPS, fp8=fp8)
    assert bf16[-1] < 0.45 * bf16[0]
    assert found != bf16
    assert sum(found) == pytest.approx(sum(bf16), rel=0.02)
    assert found == pytest.approx(bf16, rel=0.05)
