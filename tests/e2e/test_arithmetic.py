"""A model that takes text alone learns sums: warm start, GSPO, export. About 20 s of one core for each of the three."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_mm.config import Config, parse_config
from gspo_mm.families.folder import read_hf
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.sft import sft
from gspo_mm.train import train
from tests.conftest import run_tool
from tools.make_tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sums")
    sizes = ("--largest", 9, "--train", 2000, "--validation", 100)
    run_tool("make_shards.py", "arithmetic", path, "--tasks", "add", *sizes)
    return path


def config_of(name: str, model: Path, sums: Path, runs: Path, **optimizer: float) -> Config:
    optimizer |= {"warmup_steps": 5, "beta2": 0.98}
    values: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(runs)},
        "model": {"path": str(model)},
        "data": {"train": [f"{sums}/train-*.tar"]},
        "rollout": {"prompts_per_step": 32, "group_size": 8, "sampling": {"max_new_tokens": 8}},
        "reward": {"file": "configs/rewards/arithmetic.yaml", "workers": 1},
        "loss": {"clip_low": 8e-3, "clip_high": 1e-2},
        "policy": {"dtype": "float32", "micro_batch_tokens": 4096, "optimizer": optimizer},
        "train": {"steps": 30, "updates_per_batch": 4},
        "sft": {"steps": 30, "batch_size": 32},
        "checkpoint": {"every": 0},
        "observe": {"report": False},
    }
    return parse_config(values)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3", "gpt_oss"])
def test_rewards_of_sums_rise_and_plain_transformers_reads_what_was_learned(
    family: str, sums: Path, tmp_path: Path
) -> None:
    make_tiny_model(tmp_path / "model", family=family)
    warm = config_of("warm", tmp_path / "model", sums, tmp_path, lr=3e-3, grad_clip=1.0)
    sft(warm, StopRequest())
    config = config_of("gspo", warm.run.path / "hf", sums, tmp_path, lr=1e-3, grad_clip=0.3)
    train(config, StopRequest())
    lines = [line for line in read_metrics(config.run.path) if line["step"]]
    rewards = [line["reward/mean"] for line in lines]
    assert len(rewards) == 30
    assert fmean(rewards[20:]) > fmean(rewards[:10]) + 0.03
    assert max(line["logprob_gap_max"] for line in lines) < 2e-5
    assert max(line["first_update_ratio_error"] for line in lines) < 1e-5

    exported = config.run.path / "hf"
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    expected = dict(read_hf(exported))
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    before = dict(read_hf(config.model.path))
    moved = [name for name in before if not torch.equal(before[name], expected[name])]
    assert len(moved) == len(before), "every parameter has learned"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    chat: Any = [{"role": "user", "content": "3 + 4 ="}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer: Any = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    assert re.search(r"<answer>\d+</answer><\|im_end\|>$", tokenizer.decode(answer))
