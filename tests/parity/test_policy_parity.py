"""The policy is transformers' own model: log-probs, every gradient, and the weights on the way there and back."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.config import PolicyConfig
from gspo_mm.families.folder import read_hf
from gspo_mm.families.operations import Copy, Entry, MergeGateUp
from gspo_mm.policy.engine import Policy
from gspo_mm.types import MicroBatch
from tests.tiny_vl import (
    SIGMOID_MODELS,
    SINK_MODELS,
    save,
    tiny_glm,
    tiny_hybrid,
    tiny_sinks,
    tiny_text,
    tiny_vl,
    tiny_windows,
)
from tools.check_parity import compare, random_batch, reference_logprobs

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
ODD_WIDTHS: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 100,
    "num_hidden_layers": 5,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-3,
}

MODELS: dict[str, dict[str, Any]] = {
    "grouped queries 2": {},
    "one key group, odd vocabulary, tied": {
        "num_key_value_heads": 1,
        "vocab_size": 301,
        "tied": True,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    },
    "every second layer is a mixture, heads wider than hidden": {
        "decoder_sparse_step": 2,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "rope_parameters": {**ROPE, "mrope_section": [4, 4, 4], "rope_theta": 5e6},
    },
    "first layer dense, attention biases": {
        "mlp_only_layers": [0],
        "attention_bias": True,
        "vocab_size": 270,
    },
    "sparse step and dense layers, two DeepStack levels": {
        "num_hidden_layers": 5,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-3,
        "vision": {"deepstack_visual_indexes": [0, 2]},
    },
    "square gate_up": {"moe_intermediate_size": 32, "num_experts_per_tok": 4},
    "no layer is a mixture": {"mlp_only_layers": [0, 1, 2, 3]},
    "dense": {"moe": False},
    "dense, tied, odd vocabulary": {"moe": False, "tied": True, "vocab_size": 277, "num_key_value_heads": 1},
    "dense, attention biases, heads wider than hidden, one DeepStack level": {
        "moe": False,
        "attention_bias": True,
        "head_dim": 24,
        "rope_parameters": {**ROPE, "mrope_section": [4, 4, 4], "rope_theta": 5e6},
        "vision": {"depth": 2, "deepstack_visual_indexes": [1]},
    },
    "dense, odd widths": {
        "moe": False,
        **ODD_WIDTHS,
    },
}

TEXT_ALONE: dict[str, dict[str, Any]] = {
    "text, dense": {"moe": False},
    "text, dense, tied, odd vocabulary": {
        "moe": False,
        "tied": True,
        "vocab_size": 277,
        "num_key_value_heads": 1,
    },
    "text, dense, attention biases, heads wider than hidden": {
        "moe": False,
        "attention_bias": True,
        "head_dim": 24,
        "num_key_value_heads": 4,
    },
    "text, dense, odd widths, other angles": {
        "moe": False,
        **ODD_WIDTHS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    },
    "text, weights sum to 1": {"norm_topk_prob": True},
    "text, weights do not sum to 1": {"norm_topk_prob": False, "num_experts": 6, "num_experts_per_tok": 3},
    "text, one expert a token": {"norm_topk_prob": False, "num_experts_per_tok": 1, "vocab_size": 301},
    "text, first layer dense, attention biases": {
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "attention_bias": True,
        "vocab_size": 270,
    },
    "text, every second layer is a mixture, tied, square gate_up": {
        "norm_topk_prob": False,
        "num_hidden_layers": 5,
        "decoder_sparse_step": 2,
        "tied": True,
        "moe_intermediate_size": 32,
    },
}


HYBRIDS: dict[str, dict[str, Any]] = {
    "hybrid, a mixture": {},
    "hybrid, dense, tied, odd vocabulary": {
        "moe": False,
        "tied": True,
        "vocab_size": 277,
        "num_key_value_heads": 1,
    },
    "hybrid, every second layer linear, a head of values for each of keys": {
        "num_hidden_layers": 5,
        "layer_types": ["full_attention", "linear_attention"] * 2 + ["linear_attention"],
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "linear_conv_kernel_dim": 2,
        "num_key_value_heads": 4,
        "vocab_size": 301,
    },
    "hybrid, wide convolution, odd widths, other angles": {
        "hidden_size": 60,
        "linear_conv_kernel_dim": 6,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 7,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "head_dim": 24,
        "rope_parameters": {
            **ROPE,
            "rope_theta": 5e6,
            "mrope_section": [4, 1, 1],
            "partial_rotary_factor": 0.5,
        },
    },
    "hybrid, dense, three of keys for six of values, wide heads": {
        "moe": False,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 6,
        "linear_conv_kernel_dim": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 100,
    },
    "hybrid, dense, whole attention first, odd widths, other angles": {
        "moe": False,
        "hidden_size": 60,
        "layer_types": ["full_attention", *["linear_attention"] * 3, "full_attention"],
        "num_hidden_layers": 5,
        "vocab_size": 301,
        "head_dim": 24,
        "rope_parameters": {
            **ROPE,
            "rope_theta": 5e6,
            "mrope_section": [4, 1, 1],
            "partial_rotary_factor": 0.5,
        },
    },
    "hybrid, dense, every second layer linear, tied": {
        "moe": False,
        "tied": True,
        "full_attention_interval": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_value_head_dim": 16,
    },
    "hybrid, all layers linear, square experts": {
        "layer_types": ["linear_attention"] * 4,
        "moe_intermediate_size": 32,
    },
}


WINDOWED: dict[str, dict[str, Any]] = {
    "windows": {},
    "windows, tied, one key group, odd vocabulary": {
        "tied": True,
        "num_key_value_heads": 1,
        "vocab_size": 277,
    },
    "windows in every block, larger than images, wide time, other angles": {
        "vision": {"fullatt_block_indexes": [], "window_size": 64},
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [1, 3, 4]},
    },
    "windows, odd widths, blocks of their own": {
        "hidden_size": 60,
        "intermediate_size": 100,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "num_hidden_layers": 5,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        "vision": {"depth": 4, "window_size": 24, "fullatt_block_indexes": [0, 3], "intermediate_size": 44},
    },
}


def policy_of(model: Any, folder: Path, **save_options: Any) -> Policy:
    save(model, folder, **save_options)
    return Policy.from_hf(str(folder), PolicyConfig(dtype="float32"), seed=0, total_steps=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_vl()


@pytest.fixture
def policy(model: Any, tmp_path: Path) -> Policy:
    return policy_of(model, tmp_path / "hf")


def build(name: str) -> Any:
    for models, make in (
        (MODELS, tiny_vl),
        (TEXT_ALONE, tiny_text),
        (HYBRIDS, tiny_hybrid),
        (WINDOWED, tiny_windows),
        (SIGMOID_MODELS, tiny_glm),
        (SINK_MODELS, tiny_sinks),
    ):
        if name in models:
            return make(**models[name], seed=len(name))
    raise KeyError(name)


@pytest.mark.parametrize("name", [*MODELS, *TEXT_ALONE, *HYBRIDS, *WINDOWED, *SIGMOID_MODELS, *SINK_MODELS])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_every_gradient_equal_transformers(
    name: str, temperature: float, tmp_path: Path
) -> None:
    model = build(name)
    layout = "transformers" if temperature == 1.0 else "published"
    policy = policy_of(model, tmp_path / "hf", layout=layout)
    result = compare(policy, model, [random_batch(model, images=3, seed=len(name))], temperature=temperature)
    assert result.max_abs_logprob < 2e-5
    assert result.max_rel_grad < 1e-4, result.worst_grad
    assert result.roundtrip_exact


def test_a_batch_of_text_only_equals_transformers(policy: Policy, model: Any) -> None:
    result = compare(policy, model, [random_batch(model, images=0)])
    assert result.max_abs_logprob < 2e-5


def swap(a: str, b: str) -> Any:
    def broken(entries: list[Entry]) -> list[Entry]:
        other = {a: b, b: a}
        return [
            dataclasses.replace(e, hf=tuple(_renamed(n, other) for n in e.hf)) if len(e.hf) == 1 else e
            for e in entries
        ]

    return broken


def _renamed(name: str, other: dict[str, str]) -> str:
    return next((name.replace(old, new) for old, new in other.items() if old in name), name)


class PlainQkv(Copy):
    """What a careless map would do: queries, keys, values one after the other."""

    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(hf)]


class UpGate(MergeGateUp):
    def to_megatron(self, hf: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(hf[::-1])]


BROKEN: dict[str, Any] = {
    "the norms before attention and MLP swapped": swap("input_layernorm", "post_attention_layernorm"),
    "the norms of queries and keys swapped": swap("q_norm", "k_norm"),
    "embedding and output layer swapped": swap("model.language_model.embed_tokens", "lm_head"),
    "two layers swapped": swap("layers.2.", "layers.3."),
    "two DeepStack levels swapped": swap("deepstack_merger_list.0", "deepstack_merger_list.1"),
    "experts in reverse": lambda entries: [
        dataclasses.replace(e, megatron=e.megatron[::-1]) if len(e.megatron) > 1 else e for e in entries
    ],
    "queries, keys and values not interleaved by group": lambda entries: [
        dataclasses.replace(e, op=PlainQkv()) if len(e.hf) == 3 else e for e in entries
    ],
    "up before gate": lambda entries: [
        dataclasses.replace(e, op=UpGate()) if len(e.hf) == 2 else e for e in entries
    ],
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_entry_of_the_weight_map_shows_in_the_log_probs(fault: str, tmp_path: Path) -> None:
    model = tiny_vl(mlp_only_layers=[0])
    policy = policy_of(model, tmp_path / "hf")
    policy.weights.entries = BROKEN[fault](policy.weights.entries)
    policy.load_hf(read_hf(tmp_path / "hf"))
    batch = random_batch(model)
    (ours,) = policy.logprobs([batch])
    assert (ours - reference_logprobs(model, batch)).abs().max() > 1e-3


def test_leaving_deepstack_out_would_show(
    policy: Policy, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = random_batch(model)
    (whole,) = policy.logprobs([batch])
    encode = policy.family.encode_images
    monkeypatch.setattr(
        policy.chunks[0].family,
        "encode_images",
        lambda *a: (encode(*a)[0], [torch.zeros_like(level) for level in encode(*a)[1]]),
        raising=False,
    )
    (without,) = policy.logprobs([batch])
    assert (whole - without).abs().max() > 1e-3


def alone(batch: MicroBatch, model: Any, index: int) -> MicroBatch:
    """Sequence `index` of a `random_batch` as a batch of its own (its images: 0, all, 0 twice, none, none)."""
    assert batch.image_grid_thw is not None
    count = len(batch.image_grid_thw)
    shown = [[0], list(range(count)), [0, 0], [], []][index]
    tokens = slice(*batch.cu_seqlens[index : index + 2].tolist())
    merged = {i: n for n, i in enumerate(dict.fromkeys(shown))}
    patches = batch.pixel_values.split(batch.image_grid_thw.prod(-1).tolist())
    mask = batch.response_mask[tokens]
    return dataclasses.replace(
        batch,
        names=batch.names[index : index + 1],
        token_ids=batch.token_ids[tokens],
        cu_seqlens=torch.tensor([0, len(mask)], dtype=torch.int32),
        positions=batch.positions[:, tokens],
        response_mask=mask,
        response_cu_seqlens=torch.tensor([0, int(mask.sum())], dtype=torch.int32),
        pixel_values=torch.cat([patches[i] for i in merged]) if merged else None,
        image_grid_thw=batch.image_grid_thw[list(merged)] if merged else None,
        image_index=torch.tensor([merged[i] for i in shown], dtype=torch.int64),
    )


def test_neighbours_in_the_pack_change_nothing(policy: Policy, model: Any) -> None:
    batch = random_batch(model, seed=3)
    (packed,) = policy.logprobs([batch])
    single = policy.logprobs([alone(batch, model, i) for i in range(batch.num_sequences)])
    assert (packed - torch.cat(single)).abs().max() < 2e-6


@pytest.mark.parametrize(
    "name",
    [
        "grouped queries 2",
        "dense",
        "text, dense",
        "text, weights sum to 1",
        "hybrid, a mixture",
        "windows",
        "sigmoid",
        "sinks",
    ],
)
def test_other_tokens_in_one_sequence_change_no_other(name: str, tmp_path: Path) -> None:
    model = build(name)
    policy = policy_of(model, tmp_path / "hf")
    batch = random_batch(model, images=2)
    ids = batch.token_ids.clone()
    first, end = batch.cu_seqlens[3:5].tolist()  # of text alone, between others
    ids[first:end] = (ids[first:end] + 1) % 200
    (before,), (after,) = (policy.logprobs([b]) for b in (batch, dataclasses.replace(batch, token_ids=ids)))
    moved = (after - before).abs()
    changed = torch.zeros(len(moved), dtype=torch.bool)
    changed[slice(*batch.response_cu_seqlens[3:5].tolist())] = True
    assert (moved[changed] > 1e-3).all()
    assert (
        moved[~changed] < 5e-6
    ).all()  # experts are given other rows beside theirs, which rounds differently


def test_equal_images_go_through_the_vision_tower_once(policy: Policy, model: Any) -> None:
    grids: list[Any] = []
    hook = policy.chunks[0].visual.register_forward_pre_hook(
        lambda _, args, kwargs: grids.append((len(args[0]), len(kwargs["grid_thw"]))), with_kwargs=True
    )
    batch = random_batch(model, images=3)
    policy.logprobs([batch])
    hook.remove()
    assert len(batch.image_index) == 6
    assert grids == [(len(batch.pixel_values), 3)]


def test_the_image_decides_the_log_probs_of_its_own_sequences_only(policy: Policy, model: Any) -> None:
    batch = random_batch(model, images=3)
    (seen,) = policy.logprobs([batch])
    (blank,) = policy.logprobs(
        [dataclasses.replace(batch, pixel_values=torch.zeros_like(batch.pixel_values))]
    )
    with_images = int(batch.response_cu_seqlens[3])
    moved = (seen - blank).abs()
    assert (moved[:with_images] > 1e-5).all()
    # not to the bit: experts are given other image tokens beside theirs, and matrix products of another size round differently
    assert (moved[with_images:] < 5e-6).all()
    assert moved[:with_images].median() > 1000 * moved[with_images:].max()


def test_an_image_token_that_was_sampled_is_text(policy: Policy, model: Any) -> None:
    batch = random_batch(model)
    ids = batch.token_ids.clone()
    ids[-1] = model.config.image_token_id
    (logprobs,) = policy.logprobs([dataclasses.replace(batch, token_ids=ids)])
    assert torch.equal(logprobs[:-1], policy.logprobs([batch])[0][:-1])
    assert logprobs.isfinite().all()


def test_image_tokens_without_their_image_are_refused(policy: Policy, model: Any) -> None:
    batch = random_batch(model)
    with pytest.raises(ValueError, match="image tokens but"):
        policy.logprobs([dataclasses.replace(batch, image_index=batch.image_index[:-1])])


def test_entropy_is_that_of_the_whole_vocabulary(policy: Policy, model: Any) -> None:
    batch = random_batch(model, images=0)
    with torch.no_grad():
        _, entropy = policy.chunks[0](batch, temperature=0.7, entropy=True)
    first = int(batch.response_mask.nonzero()[0])
    with torch.no_grad():
        logits = model(input_ids=batch.token_ids[None, :first]).logits[0, -1]
    expected = torch.distributions.Categorical(logits=logits.double() / 0.7).entropy()
    assert entropy[0].item() == pytest.approx(expected.item(), abs=1e-5)
