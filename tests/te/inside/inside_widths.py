"""What `check_widths` lets through runs in every recipe; what it refuses fails inside Transformer Engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gspo_mm.config import PolicyConfig
from gspo_mm.policy import engine, spec
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.precision import PrecisionError
from tests.tiny_vl import save, tiny_vl
from tools.check_parity import positions_model, random_batch

FITS = {"hidden_size": 80, "num_hidden_layers": 3, "mlp_only_layers": [1]}
FITS |= {"intermediate_size": 112, "moe_intermediate_size": 48}


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "FUSED", True)


def update(folder: Path, recipe: str, *, primary_weights: bool = False) -> float:
    fp8 = {"recipe": recipe, "primary_weights": primary_weights}
    policy = Policy.from_hf(str(folder), PolicyConfig.model_validate({"fp8": fp8}), seed=0, total_steps=2)
    batch = random_batch(positions_model(policy.hf), images=1)
    return policy.update([batch], lambda _, logprobs_R, __: (logprobs_R.sum(), {})).grad_norm


@pytest.mark.parametrize("primary_weights", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_widths_that_fit_run(recipe: str, primary_weights: bool, tmp_path: Path) -> None:
    assert update(save(tiny_vl(**FITS), tmp_path), recipe, primary_weights=primary_weights) > 0


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ({"hidden_size": 72}, "hidden_size=72"),
        ({"moe_intermediate_size": 24}, "moe_intermediate_size=24"),
        ({"intermediate_size": 104}, "intermediate_size=104"),
        ({"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8}, "keys and values=56"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_widths_that_do_not_fit_are_refused_and_would_fail(
    text: dict[str, Any], named: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    narrow = {"rope_parameters": rope} if "head_dim" in text else {}
    folder = save(tiny_vl(**{**FITS, **narrow, **text}), tmp_path)
    with pytest.raises(PrecisionError, match=rf"{named} is no multiple of 16.*set policy\.fp8\.recipe=null"):
        update(folder, recipe)
    monkeypatch.setattr(engine, "check_widths", lambda *_, **__: None)
    with pytest.raises((AssertionError, ValueError), match=r"Caller must pad|FP8 execution requires"):
        update(folder, recipe)
