"""A checkpoint written under one layout continues under any other, optimizer included; conversion changes no bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gspo_mm.checkpoint.convert import hf_to_megatron, megatron_to_hf
from gspo_mm.checkpoint.distributed import load_weights
from gspo_mm.families.folder import read_hf
from gspo_mm.policy.engine import Policy
from tests.forked import COMMANDS
from tests.parallel.layouts import LAYOUTS, LORA, policy_config
from tests.parallel.resume import steps
from tests.tiny_vl import save, tiny_text, tiny_vl
from tools.check_parity import load_reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_vl(num_hidden_layers=12, mlp_only_layers=[1], vocab_size=250)
    path = save(model, tmp_path_factory.mktemp("model") / "moe")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


def run(action: str, name: str, folder: Path, checkpoint: Path, out: Path) -> Any:
    command = ["-m", "tests.parallel.resume", action, str(folder), str(checkpoint), name, str(out)]
    done = COMMANDS.run(*command, ranks=LAYOUTS[name][0])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint of TP2 x EP2, and what the uninterrupted run did next."""
    path = tmp_path_factory.mktemp("saved")
    return path / "checkpoint", run("save", "tp2 ep2 etp1", folder, path / "checkpoint", path / "out")


@pytest.mark.parametrize("name", ["pp2", "pp2 interleaved", "ep4"])
def test_resuming_under_another_layout_continues_the_run(
    name: str, folder: Path, saved: tuple[Path, Any], tmp_path: Path
) -> None:
    checkpoint, expected = saved
    found = run("load", name, folder, checkpoint, tmp_path / "out")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_resuming_on_one_rank_continues_the_run(folder: Path, saved: tuple[Path, Any]) -> None:
    checkpoint, expected = saved
    for ours, theirs in zip(steps("load", folder, checkpoint, {}), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_adapters_of_all_ranks_are_continued_on_one(folder: Path, tmp_path: Path) -> None:
    """Experts' adapters lie on different ranks, others are the same on all."""
    expected = run("save", "lora tp2 ep2", folder, tmp_path / "checkpoint", tmp_path / "out")
    found = steps("load", folder, tmp_path / "checkpoint", {"lora": LORA})
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    assert expected[0][0] != pytest.approx(expected[1][0], rel=1e-3)


def test_the_state_decides_what_comes_next(folder: Path, saved: tuple[Path, Any]) -> None:
    """Without the checkpoint's optimizer the same weights would not do the same: the test above can fail."""
    _, expected = saved
    fresh = steps("save", folder, saved[0].parent / "other", {})
    assert fresh[0][0] == pytest.approx(expected[0][0], rel=2e-5)  # the run on one rank is the same run
    assert expected[0][0] != pytest.approx(expected[1][0], rel=1e-3)


@pytest.mark.parametrize("kind", ["moe", "tied dense", "text"])
def test_there_and_back_changes_no_bit(kind: str, folder: Path, tmp_path: Path) -> None:
    if kind == "text":
        folder = save(tiny_text(num_hidden_layers=2, vocab_size=131), tmp_path / "text", dtype=torch.bfloat16)
    elif kind == "tied dense":
        dense = tiny_vl(moe=False, tied=True, num_hidden_layers=12, attention_bias=True, vocab_size=131)
        folder = save(dense, tmp_path / "dense", dtype=torch.bfloat16)
    assert "every bit checked" in convert("tools/hf_to_megatron.py", folder, tmp_path / "megatron")
    convert("-m gspo_mm.cli export", tmp_path / "megatron", tmp_path / "hf")
    before, after = read_hf(folder), read_hf(tmp_path / "hf")
    assert set(after.names()) == set(before.names())
    for name in before.names():
        assert torch.equal(after.tensor(name), before.tensor(name)), name
        assert after.dtype(name) is before.dtype(name)
    if kind == "text":
        stored = load_file(tmp_path / "hf" / "model.safetensors")
        original = load_file(folder / "model.safetensors")
        assert stored.keys() == original.keys()  # experts one by one
        assert all(torch.equal(stored[name], original[name]) for name in original)
    if kind == "moe":
        assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{{ messages }}"
        assert after.experts_layout == "published"
        load_reference(tmp_path / "hf")


def test_what_many_ranks_wrote_is_exported_and_what_is_converted_is_read_by_many(
    folder: Path, saved: tuple[Path, Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "policy").symlink_to(saved[0])
    megatron_to_hf(tmp_path / "run", tmp_path / "hf", hf=folder)
    policy = Policy.from_hf(str(folder), policy_config({}), seed=0, total_steps=6)
    load_weights(policy.chunks, saved[0])
    exported = read_hf(tmp_path / "hf")
    for name, tensor in policy.export():
        assert torch.equal(exported.tensor(name), tensor.to(exported.dtype(name))), name
    hf_to_megatron(folder, tmp_path / "converted", check=True)
    start = tmp_path / "converted" / "policy"
    expected = steps("load", folder, start, {})
    for name in ("tp2 ep2 etp1", "pp2 interleaved"):
        found = run("load", name, folder, start, tmp_path / name)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)


def convert(tool: str, source: Path, out: Path) -> str:
    done = COMMANDS.run(*tool.split(), str(source), str(out), "--check", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
