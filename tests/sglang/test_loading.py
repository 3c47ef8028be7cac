"""What a push sends is what SGLang's own model class loads: every parameter gets its values.

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

from gspo_mm.checkpoint.convert import hf_to_megatron, megatron_to_hf
from gspo_mm.config import parse_config
from gspo_mm.families.table import family_of
from gspo_mm.policy.engine import Policy
from gspo_mm.serving import cpu
from gspo_mm.serving.served import SCALE, check_served, served
from gspo_mm.sync.quantize import FP8 as FORMAT
from gspo_mm.sync.quantize import on_the_way
from tests.tiny_vl import (
    IN_BLOCKS,
    made_of_blocks,
    save,
    tiny_glm,
    tiny_hybrid,
    tiny_sinks,
)

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


def send(folder: Path, model: Any, *, fp8: bool) -> tuple[str, ...]:
    """Write what a push sends of `model`; arguments of loading.py that load it."""
    dtype = "bfloat16" if fp8 else "float32"
    save(model, folder / "hf", dtype=getattr(torch, dtype))
    config = parse_config(
        {
            "run": {"name": "run", "dir": str(folder)},
            "model": {"path": str(folder / "hf")},
            "data": {"train": ["none.tar"]},
            "reward": {"file": "configs/rewards/digits.yaml"},
            "policy": {"dtype": dtype},
            "rollout": {"engine": "sglang", "sglang": {"fp8": fp8, "start": "elsewhere"}},
        }
    )
    check_served(config)
    policy = Policy.from_hf(config.model.path, config.policy, seed=0, total_steps=1)
    sent = on_the_way(config)(policy.weights.export(experts_apart=True))
    sent = policy.family.prefixes.renamed(sent)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in sent}, folder / "sent")
    return served(config).model.path, dtype, str(folder / "sent"), str(folder / "held")


def export(folder: Path) -> tuple[str, ...]:
    """Convert the model that `send` saved, there and back in FP8; arguments of loading.py that load it."""
    hf_to_megatron(folder / "hf", folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "exported", hf=folder / "hf", fp8=True)
    return str(folder / "exported"), "bfloat16", str(folder / "exported"), str(folder / "held-exported")


def start(jobs: list[tuple[str, ...]], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sglang.loading", *(word for job in jobs for word in job)],
        env=os.environ | cpu.environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


MIXTURE, DENSE, SIGMOID, SINKS = "mixture", "dense and tied", "sigmoid and tied", "sinks"


@pytest.fixture(scope="module")
def each(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """All in two processes, side by side: SGLang's imports alone take 20 s of a core."""
    models = {
        MIXTURE: tiny_hybrid(),
        DENSE: tiny_hybrid(moe=False, tied=True),
        SIGMOID: tiny_glm(tied=True, n_group=4, topk_group=2, num_experts_per_tok=5, n_shared_experts=2),
        SINKS: tiny_sinks(),
    } | {f"{kind} in FP8": made_of_blocks(kind) for kind in IN_BLOCKS}
    folders = {name: tmp_path_factory.mktemp("loading") for name in models}
    jobs = [send(folders[name], model, fp8="FP8" in name) for name, model in models.items()]
    jobs += [export(folder) for name, folder in folders.items() if "FP8" in name]
    for process in [start(half, folders[MIXTURE]) for half in (jobs[::2], jobs[1::2])]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    results = {}
    for name in models:
        results[name] = Loaded(
            model=models[name],
            folder=folders[name] / "hf",
            sent=load_file(folders[name] / "sent"),
            held=load_file(folders[name] / "held"),
            unfilled=json.loads((folders[name] / "held.json").read_text()),
        )
    return results


@pytest.fixture(params=[MIXTURE, DENSE, SIGMOID])
def loaded(request: pytest.FixtureRequest, each: dict[str, Loaded]) -> Loaded:
    return each[request.param]


def parameter(name: str, loaded: Loaded) -> str:
    """SGLang's that holds a tensor, by Hugging Face's name, whether experts are stacked or apart."""
    for ours, servers in (
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        (".self_attn.", ".self_attn." if is_sigmoid(loaded) else "."),
        (".attn.qkv.", ".attn.qkv_proj."),
    ):
        name = name.replace(ours, servers)
    name = re.sub(r"\.experts\.(\d+\.)?(gate|up|gate_up)_proj(\.weight)?$", ".experts.w13_weight", name)
    name = re.sub(r"\.experts\.(\d+\.)?down_proj(\.weight)?$", ".experts.w2_weight", name)
    for whole, parts in MERGED.items():
        name = re.sub(rf"\.({'|'.join(parts)})\.", f".{whole}.", name)
    return name


def is_sigmoid(loaded: Loaded) -> bool:
    return loaded.model.config.model_type == "glm4v_moe"


def test_every_parameter_gets_its_values(loaded: Loaded) -> None:
    parts: dict[str, list[torch.Tensor]] = {}  # in transformers' order, which is that of MERGED
    biases = [pair for pair in loaded.model.named_buffers() if pair[0].endswith("correction_bias")]
    for name, tensor in [*loaded.model.named_parameters(), *biases]:
        parts.setdefault(parameter(name, loaded), []).append(tensor.detach())
    assert loaded.unfilled["all"] == []
    assert loaded.held.keys() == parts.keys()
    for name, tensors in parts.items():
        assert torch.equal(loaded.held[name], torch.cat(tensors)), name


@pytest.mark.parametrize("change", ["left out", "renamed"])
def test_each_tensor_that_is_missing_is_missed(change: str, loaded: Loaded) -> None:
    """The comparison above would see it. A stray part of an expert is an error by itself, but for GLM's loader."""
    unfilled = loaded.unfilled[change]
    raises = change == "renamed" and not is_sigmoid(loaded)
    refused = {name for name in loaded.sent if ".experts." in name} if raises else set()
    assert unfilled.keys() == loaded.sent.keys() - refused
    assert unfilled == {name: [parameter(name, loaded)] for name in unfilled}


def test_experts_that_servers_take_together_get_their_values(each: dict[str, Loaded]) -> None:
    loaded = each[SINKS]
    assert loaded.unfilled["all"] == []
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in loaded.model.named_parameters():
        ours = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name)
        ours = re.sub(r"gate_up_proj(_bias)?$", r"w13_weight\1", ours)
        parts.setdefault(re.sub(r"down_proj(_bias)?$", r"w2_weight\1", ours), []).append(tensor.detach())
    assert loaded.held.keys() == parts.keys()
    for name, tensors in parts.items():
        assert torch.equal(loaded.held[name], torch.cat(tensors).to(loaded.held[name].dtype)), name
    for change in ("left out", "renamed"):
        unfilled = loaded.unfilled[change]
        assert unfilled.keys() == loaded.sent.keys()
        assert all(len(names) == 1 for names in unfilled.values())
    family = family_of(loaded.folder)
    whole = {name: server for name in loaded.sent if (server := family.whole_tensor(name))}
    assert len(whole) == 2 * 4 + 1 + 2 * 4  # norms and routers of four layers
    assert all(torch.equal(loaded.held[server], loaded.sent[name]) for name, server in whole.items())


def test_names_that_pushes_are_checked_by_are_the_servers(loaded: Loaded) -> None:
    family = family_of(loaded.folder)
    hf = family.load_config(str(loaded.folder))
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


@pytest.mark.parametrize("kind", IN_BLOCKS)
def test_what_is_sent_in_fp8_is_what_is_held_so(kind: str, each: dict[str, Loaded]) -> None:
    loaded = each[f"{kind} in FP8"]
    family = family_of(loaded.folder)
    layers = family.linear_layers(family.load_config(str(loaded.folder)))
    # some have scales of the key/value cache, which come with no push
    assert {name.rpartition(".")[2] for name in loaded.unfilled["all"]} <= {"k_scale", "v_scale"}
    assert {name for name, tensor in loaded.held.items() if tensor.dtype == FORMAT} == layers.keys()
    for name, parts in layers.items():
        for suffix in ("", SCALE):
            sent = [loaded.sent[family.prefixes.published(part) + suffix] for part in parts]
            held = loaded.held[name + suffix]
            assert torch.equal(held.flatten(0, -2).view(torch.uint8), torch.cat(sent).view(torch.uint8))


@pytest.mark.parametrize("kind", IN_BLOCKS)
def test_a_server_that_starts_with_an_exported_folder_holds_what_a_push_sends(
    kind: str, each: dict[str, Loaded]
) -> None:
    """Scales and bytes of what is in FP8, and all else, to the bit."""
    loaded = each[f"{kind} in FP8"]
    held = load_file(loaded.folder.with_name("held-exported"))
    assert held.keys() == loaded.held.keys()
    sent = held.keys() - set(loaded.unfilled["all"])
    assert [name for name in sent if not torch.equal(bits(held[name]), bits(loaded.held[name]))] == []


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)
