"""What a push sends of a hybrid model is what SGLang's own model class loads: every parameter gets its values.

Its loader says nothing about a tensor that is missing, or that it has no place for.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_mm.config.policy import PolicyConfig
from gspo_mm.families import family_of
from gspo_mm.policy.engine import Policy
from gspo_mm.serving import cpu
from tests.tiny_vl import save, tiny_hybrid

MERGED = {
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model, and what became of its tensors in SGLang's."""

    model: Any
    folder: Path
    sent: dict[str, torch.Tensor]
    held: dict[str, torch.Tensor]
    unfilled: dict[str, Any]


def send(folder: Path, *, moe: bool) -> tuple[Any, subprocess.Popen[str]]:
    """A model, and the process that loads what a push sends of it."""
    model = tiny_hybrid(moe=moe, tied=not moe)
    save(model, folder / "hf")
    policy = Policy.from_hf(str(folder / "hf"), PolicyConfig(dtype="float32"), seed=0, total_steps=1)
    sent = {name: tensor.detach().clone() for name, tensor in policy.weights.export(experts_apart=True)}
    save_file(sent, folder / "sent")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.sglang.loading", *(str(folder / x) for x in ("hf", "sent", "held"))],
        env=os.environ | cpu.environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return model, process


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Loaded]:
    """Side by side, as nearly all of the half minute is SGLang's imports."""
    folders = {moe: tmp_path_factory.mktemp("loading") for moe in (True, False)}
    started = {moe: send(folder, moe=moe) for moe, folder in folders.items()}
    results = {}
    for moe, (model, process) in started.items():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        folder = folders[moe]
        results[moe] = Loaded(
            model=model,
            folder=folder / "hf",
            sent=load_file(folder / "sent"),
            held=load_file(folder / "held"),
            unfilled=json.loads((folder / "held.json").read_text()),
        )
    return results


@pytest.fixture(params=[True, False], ids=["mixture", "dense and tied"])
def loaded(request: pytest.FixtureRequest, both: dict[bool, Loaded]) -> Loaded:
    return both[request.param]


def parameter(name: str) -> str:
    """SGLang's that holds a tensor, by Hugging Face's name, whether experts are stacked or apart."""
    for ours, servers in (
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        (".self_attn.", "."),
        (".attn.qkv.", ".attn.qkv_proj."),
    ):
        name = name.replace(ours, servers)
    name = re.sub(r"experts\.(\d+\.)?(gate|up|gate_up)_proj(\.weight)?$", "experts.w13_weight", name)
    name = re.sub(r"experts\.(\d+\.)?down_proj(\.weight)?$", "experts.w2_weight", name)
    for whole, parts in MERGED.items():
        if not name.startswith("visual."):
            name = re.sub(rf"\.({'|'.join(parts)})\.", f".{whole}.", name)
    return name


def test_every_parameter_gets_its_values(loaded: Loaded) -> None:
    parts: dict[str, list[torch.Tensor]] = {}  # in transformers' order, which is that of MERGED
    for name, tensor in loaded.model.named_parameters():
        parts.setdefault(parameter(name), []).append(tensor.detach())
    assert loaded.unfilled["all"] == []
    assert loaded.held.keys() == parts.keys()
    for name, tensors in parts.items():
        assert torch.equal(loaded.held[name], torch.cat(tensors)), name


@pytest.mark.parametrize("change", ["left out", "renamed"])
def test_each_tensor_that_is_missing_is_missed(change: str, loaded: Loaded) -> None:
    """The comparison above would see it. A stray part of an expert is an error by itself."""
    unfilled = loaded.unfilled[change]
    refused = {name for name in loaded.sent if ".experts." in name} if change == "renamed" else set()
    assert unfilled.keys() == loaded.sent.keys() - refused
    assert unfilled == {name: [parameter(name)] for name in unfilled}


def test_names_that_pushes_are_checked_by_are_the_servers(loaded: Loaded) -> None:
    family = family_of(loaded.folder)
    hf = family.load_config(str(loaded.folder))
    family.check_served(hf)
    layers = family.linear_layers(hf)
    for name, parts in layers.items():
        rows = sum(len(loaded.sent[part]) for part in parts)
        held = loaded.held[name]
        assert held.flatten(0, -2).shape[0] == rows
        assert torch.equal(held.flatten(0, -2), torch.cat([loaded.sent[part] for part in parts]))
    matrices = {name for name, tensor in loaded.held.items() if tensor.dim() > 1 and "visual." not in name}
    small = ("mlp.gate.weight", "shared_expert_gate.weight", "in_proj_ba.weight", "conv1d.weight")
    assert layers.keys() == {
        name for name in matrices if not name.endswith((*small, "embed_tokens.weight", "lm_head.weight"))
    }
    whole = {name: server for name in loaded.sent if (server := family.whole_tensor(name))}
    for name, server in whole.items():
        assert torch.equal(loaded.held[server], loaded.sent[name])
    vectors = {name for name, tensor in loaded.held.items() if tensor.dim() == 1 and "norm" in name}
    assert vectors <= set(whole.values())
