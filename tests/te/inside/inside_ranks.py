"""Every parallel layout computes on Transformer Engine's layers what one rank computes, in each number format.

Ranks are forks of a process with the stand-in (tests/te/loaded.py); all that need as many share a launch.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import Forks
from tests.te.ranks import FORMATS, LAYOUTS
from tests.tiny_vl import save, wide_vl

RANKS = Forks("tests.te.loaded", path=(str(Path(sys.prefix) / "te"),))
# largest differences to one rank: of log-probs (nats), of all gradients together, of two updates together, of losses and norms
# (parts of them). Pipeline stages and data parallelism round nothing differently, but for a norm's last digit, by which
# updates are scaled in float32. The rest of BF16 and FP8 is what another order of sums, or a scale of other tokens, does to
# the choice of experts.
EXACT = {"float32": (0.0, 0.0, 1e-3, 1e-6)}
NEARLY = (0.0, 0.0, 1e-6, 1e-6)
CLOSE = {"float32": (5e-6, 1e-5, 1e-4, 1e-5), "bfloat16": (0.1, 0.05, 0.3, 0.05)}
FP8 = (0.2, 0.3, 0.8, 0.15)
SAME = ("pp2", "dp2")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(layout, format) -> what its ranks measured."""
    out = tmp_path_factory.mktemp("measured")
    model = wide_vl(
        num_experts=8,
        num_key_value_heads=4,
        mlp_only_layers=[1],
        vision={"depth": 1, "deepstack_visual_indexes": [0]},
    )
    folder = save(model, out / "model")

    @cache
    def launch(ranks: int) -> str:
        names = [name for name, (size, _, _) in LAYOUTS.items() if size == ranks]
        command = ["-m", "tests.te.ranks", str(out), str(folder), *names]
        done = RANKS.run(*command, ranks=ranks, timeout=900)
        return "" if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]

    @cache
    def get(layout: str, form: str) -> dict[str, Any]:
        fault = launch(LAYOUTS[layout][0])
        file = out / f"{layout} {form}.pt"
        assert file.exists(), f"{layout} {form} was not measured: {fault}"
        return torch.load(file, weights_only=True)

    return get


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors.values()])


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


CASES = [(name, form) for name, (ranks, _, forms) in LAYOUTS.items() if ranks > 1 for form in forms]


@pytest.mark.parametrize(("layout", "form"), CASES, ids=[f"{name}, {form}" for name, form in CASES])
def test_a_layout_computes_what_one_rank_computes(layout: str, form: str, measured: Any) -> None:
    found, expected = measured(layout, form), measured("alone", form)
    logprobs, gradients, updates, sums = EXACT.get(form, NEARLY) if layout in SAME else CLOSE.get(form, FP8)
    assert (found["logprobs"] - expected["logprobs"]).abs().max() <= logprobs
    assert found["gradients"].keys() == expected["gradients"].keys()
    assert apart(flat(found["gradients"]), flat(expected["gradients"])) <= gradients
    assert found["norms"] == pytest.approx(expected["norms"], rel=sums)
    assert found["losses"] == pytest.approx(expected["losses"], rel=sums)
    moved = [flat(m["weights"]) - flat(m["loaded"]) for m in (found, expected)]
    assert apart(*moved) <= updates


@pytest.mark.parametrize(("layout", "form"), CASES, ids=[f"{name}, {form}" for name, form in CASES])
def test_a_layout_exports_what_was_loaded_and_moves_every_tensor(
    layout: str, form: str, measured: Any
) -> None:
    found, expected = measured(layout, form), measured("alone", form)
    assert not [
        name for name, tensor in found["loaded"].items() if torch.equal(tensor, found["weights"][name])
    ]
    cut = form == "tensorwise primary" and "tp" in layout  # each part of a weight has a scale of its own
    different = [n for n, t in expected["loaded"].items() if not torch.equal(t, found["loaded"][n])]
    assert bool(different) == cut
    if cut:
        assert apart(flat(found["loaded"]), flat(expected["loaded"])) < 0.03


def test_formats_differ(measured: Any) -> None:
    """The tests above could not fail otherwise."""
    logprobs = {form: measured("alone", form)["logprobs"] for form in FORMATS}
    assert len({tuple(values.tolist()) for values in logprobs.values()}) >= 4
