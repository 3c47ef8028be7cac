"""Another model family needs its file and one line in a table: parity, export, the engine, a train step know no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    Starcoder2Config,
)

from gspo_mm.batch import answered, pack
from gspo_mm.config import DataConfig, PolicyConfig, parse_config
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.families.folder import read_hf
from gspo_mm.families.table import FAMILIES, Row, family_of
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.embedded import EmbeddedEngine
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.sync.embedded import EmbeddedPush
from gspo_mm.train import train
from gspo_mm.types import GspoError, SamplingParams
from tools.check_parity import compare, load_reference, random_batches
from tools.make_tiny_model import CHAT_TEMPLATE


@pytest.fixture(scope="module", autouse=True)
def in_the_table() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llava", Row("tests.toy_family:ToyFamily"))
        yield


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the family, with the tokens of the usual tiny one."""
    path = tmp_path_factory.mktemp("toy") / "llava"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    text = Starcoder2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
        sliding_window=None,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        bos_token_id=None,
    )
    vision = SiglipVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).float().eval()
        for name, parameter in model.named_parameters():  # norms and biases that do something
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(path)
    (path / "model.safetensors").unlink()
    safetensors.torch.save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token="<|image_pad|>",
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return Policy.from_hf(str(folder), PolicyConfig(dtype="float32"), seed=0, total_steps=1)


@pytest.fixture(scope="module")
def processor(folder: Path, digit_shards: Path) -> Processor:
    return Processor(str(folder), DataConfig(train=[f"{digit_shards}/train-*.tar"]))


def test_the_policy_is_transformers_model(policy: Policy, folder: Path) -> None:
    """Log-probs, gradients of every parameter, and weights there and back; in sequences that images are in and out of."""
    reference = load_reference(folder)
    parity = compare(policy, reference, random_batches(reference))
    assert parity.max_abs_logprob < 2e-5
    assert parity.max_rel_grad < 1e-4, parity.worst_grad
    assert parity.roundtrip_exact


def test_the_engine_samples_with_the_policys_weights(
    policy: Policy, processor: Processor, folder: Path, digit_shards: Path
) -> None:
    config = parse_config(values(folder, digit_shards, folder.parent))
    engine = EmbeddedEngine(str(folder), processor, dtype=torch.float32, max_batch=32)
    EmbeddedPush(config, policy, engine).push(version=1)
    prompts = PromptSource(config.data, processor, seed=0, split="train").take(4)
    assert all(prompt.image_grid_thw is not None for prompt in prompts)
    groups = engine.generate(prompts, group_size=3, sampling=SamplingParams(max_new_tokens=6), seed=0)
    sequences = [
        answered(p, c.token_ids) for p, completions in zip(prompts, groups, strict=True) for c in completions
    ]
    sampled = torch.tensor([lp for completions in groups for c in completions for lp in c.logprobs])
    (ours,) = policy.logprobs([pack(sequences, processor)])
    assert (ours - sampled).abs().max() < 2e-5


def values(folder: Path, digit_shards: Path, runs: Path) -> dict[str, Any]:
    return {
        "run": {"name": "toy", "dir": str(runs)},
        "model": {"path": str(folder)},
        "data": {
            "train": [f"{digit_shards}/train-*.tar"],
            "validation": [f"{digit_shards}/validation-*.tar"],
        },
        "rollout": {"prompts_per_step": 8, "group_size": 4, "sampling": {"max_new_tokens": 6}},
        "reward": {"file": str(runs / "reward.yaml")},
        "policy": {"dtype": "float32", "optimizer": {"lr": 1e-3}, "micro_batch_tokens": 512},
        "train": {"steps": 2, "updates_per_batch": 2, "eval_prompts": 8},
    }


def test_it_is_trained_resumed_and_exported(folder: Path, digit_shards: Path, tmp_path: Path) -> None:
    part = {"name": "vowel", "type": "format", "accuracy": True, "args": {"pattern": "(?s).*[aeiou].*"}}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "letters", "parts": [part]}))
    config = parse_config(values(folder, digit_shards, tmp_path))
    train(config, StopRequest())
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    train(more, StopRequest())
    lines = read_metrics(config.run.path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines[1:]:
        assert line["logprob_gap_max"] < 2e-5
        assert line["grad_norm"] > 0
    exported = config.run.path / "hf"
    before, after = dict(read_hf(folder)), dict(read_hf(exported))
    assert before.keys() == after.keys()
    used = [name for name in before if "post_layernorm" not in name and "encoder.layers.2" not in name]
    assert all(not torch.equal(before[name], after[name]) for name in used), "every parameter has learned"
    assert json.loads((exported / "config.json").read_text())["model_type"] == "llava"
    AutoModelForImageTextToText.from_pretrained(exported)


def test_servers_are_refused_in_a_sentence(folder: Path) -> None:
    family = family_of(folder)
    with pytest.raises(
        GspoError, match=r"models of type llava are not served by SGLang here; set rollout\.engine"
    ):
        family.check_served(family.load_config(str(folder)))
