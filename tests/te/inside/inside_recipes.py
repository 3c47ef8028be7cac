"""A run goes on under another number format: BF16, and FP8 primary weights of either recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.policy import spec
from gspo_mm.policy.engine import Policy
from tests.tiny_vl import save, wide_vl
from tools.bench.card.parity import policy, unmoved
from tools.check_parity import random_batch

FORMATS = ["bf16", "tensorwise", "blockwise"]


@pytest.fixture(scope="module")
def model() -> Any:
    return wide_vl()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize(
    ("written", "read"), [(w, r) for w in FORMATS for r in FORMATS if w != r], ids=lambda name: name
)
def test_checkpoints_cross_between_number_formats(
    written: str, read: str, model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's exact weights go over, and the other format rounds them in its own way."""
    monkeypatch.setattr(spec, "FUSED", True)
    batch = random_batch(model, images=2)
    first, second = (policy(folder, f, fp8={"primary_weights": f != "bf16"}) for f in (written, read))
    assert not unmoved(first, batch, 3)
    save_policy(first, tmp_path / "c").finish()
    load_policy(second, tmp_path / "c")
    exact, found = mains(first), mains(second)
    assert exact.keys() == found.keys()
    assert all(torch.equal(exact[name], found[name]) for name in exact)
    exported = dict(second.export())
    for name, tensor in first.export():
        rounding = 2**-4 if min(tensor.shape) > 1 else 0.0  # of FP8, at most
        assert float((exported[name].float() - tensor.float()).norm() / tensor.float().norm()) <= rounding, (
            name
        )
    assert not unmoved(second, batch, 3)


def mains(of: Policy) -> dict[str, torch.Tensor]:
    """The optimizer's float32 weights."""
    named: dict[str, Any] = {name: of.weights[name] for name in of.weights.names()}
    return {name: parameter.main_param.flatten() for name, parameter in named.items()}
