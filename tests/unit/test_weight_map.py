"""The weight map names every tensor of both sides once, and its operations lose nothing."""

from typing import Any

import pytest
import torch

from gspo_mm.families.operations import (
    Copy,
    MergeGatedQkv,
    MergeGateUp,
    MergeQkv,
    Operation,
    Sections,
    StackExperts,
    VocabPad,
)
from gspo_mm.families.table import FAMILIES
from gspo_mm.hf.tensors import held
from tests.tiny_vl import tiny_glm, tiny_hybrid, tiny_sinks, tiny_vl, tiny_windows

G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G)


OPERATIONS: dict[str, tuple[Operation, list[torch.Tensor]]] = {
    "copy": (Copy("tp", 1), [rand(6, 8)]),
    "copy on every rank": (Copy(), [rand(5)]),
    "vocabulary": (VocabPad(13, 16), [rand(13, 3)]),
    "vocabulary that fits": (VocabPad(16, 16), [rand(16, 3)]),
    "qkv": (MergeQkv(4, 3), [rand(24, 5), rand(12, 5), rand(12, 5)]),
    "qkv bias": (MergeQkv(4, 3), [rand(24), rand(12), rand(12)]),
    "gated qkv": (MergeGatedQkv(2, 3), [rand(24, 5), rand(6, 5), rand(6, 5)]),
    "sections": (Sections((4, 2, 8, 2), (6, 8, 2)), [rand(6, 5), rand(8, 5), rand(2, 5)]),
    "sections of one tensor": (Sections((4, 2), (6,)), [rand(6, 1, 3)]),
    "gate and up": (MergeGateUp(), [rand(8, 5), rand(8, 5)]),
    "experts in": (StackExperts(gated=True), [rand(3, 16, 5)]),
    "experts out": (StackExperts(gated=False), [rand(3, 5, 8)]),
    "turned experts in, gate and up in turns": (
        StackExperts(gated=True, turned=True, in_turns=True),
        [rand(3, 5, 16)],
    ),
    "turned experts out": (StackExperts(gated=False, turned=True), [rand(3, 8, 5)]),
    "biases of experts in, gate and up in turns": (StackExperts(gated=True, in_turns=True), [rand(3, 16)]),
    "biases of experts out": (StackExperts(gated=False, axis=None), [rand(3, 5)]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_there_and_back_is_the_same_bits(name: str) -> None:
    op, hf = OPERATIONS[name]
    back = op.to_hf(op.to_megatron(hf))
    assert len(back) == len(hf)
    assert all(torch.equal(a, b) for a, b in zip(back, hf, strict=True))


def test_qkv_puts_the_queries_of_a_group_before_its_key_and_value() -> None:
    heads, groups, size = 6, 3, 2
    rows = torch.arange(heads * size).float()[:, None]
    key, value = (
        100 + torch.arange(groups * size).float()[:, None],
        200 + torch.arange(groups * size).float()[:, None],
    )
    (merged,) = MergeQkv(groups, size).to_megatron([rows, key, value])
    assert merged[:, 0].tolist()[:8] == [0, 1, 2, 3, 100, 101, 200, 201]
    assert merged[:, 0].tolist()[8:12] == [4, 5, 6, 7]


def test_padded_rows_are_zero_and_last() -> None:
    weight = rand(13, 3)
    (padded,) = VocabPad(13, 16).to_megatron([weight])
    assert padded.shape == (16, 3)
    assert torch.equal(padded[:13], weight)
    assert not padded[13:].any()


def test_experts_keep_their_number() -> None:
    stacked = rand(3, 4, 5)
    experts = StackExperts(gated=False).to_megatron([stacked])
    assert all(torch.equal(experts[e], stacked[e]) for e in range(3))


@pytest.mark.parametrize("name", [n for n in OPERATIONS if OPERATIONS[n][0].axis is not None])
def test_shards_of_two_ranks_hold_every_element_once(name: str) -> None:
    op, hf = OPERATIONS[name]
    for whole in op.to_megatron(hf):
        parts = [op.shard(whole, 2, rank) for rank in range(2)]
        assert torch.equal(
            torch.cat([p.flatten() for p in parts]).sort().values, whole.flatten().sort().values
        )
        assert torch.equal(op.shard(whole, 1, 0), whole)
        assert torch.equal(op.unshard(parts), whole)


def test_a_rank_of_a_gated_layer_holds_the_same_part_of_gate_and_up() -> None:
    """Its SwiGLU multiplies them element by element, so the halves must match on every rank."""
    gate, up = torch.arange(4.0)[:, None], 10 + torch.arange(4.0)[:, None]
    for op, hf in ((MergeGateUp(), [gate, up]), (StackExperts(gated=True), [torch.cat([gate, up])[None]])):
        (whole,) = op.to_megatron(hf)
        assert op.shard(whole, 2, 1)[:, 0].tolist() == [2, 3, 12, 13]


def test_a_rank_of_the_attention_holds_whole_groups() -> None:
    q, k, v = torch.arange(4.0)[:, None], 10 + torch.arange(2.0)[:, None], 20 + torch.arange(2.0)[:, None]
    op = MergeQkv(2, 1)
    (whole,) = op.to_megatron([q, k, v])
    assert op.shard(whole, 2, 1)[:, 0].tolist() == [2, 3, 11, 21]


def test_gates_of_queries_stand_behind_the_queries_of_their_group() -> None:
    """transformers' projection holds each head's query and gate one after the other."""
    query = torch.arange(8.0)[:, None]  # heads of one dim: query 0, its gate 1, query 2, its gate 3 ...
    key, value = 10 + torch.arange(2.0)[:, None], 20 + torch.arange(2.0)[:, None]
    op = MergeGatedQkv(2, 1)
    (whole,) = op.to_megatron([query, key, value])
    assert whole[:, 0].tolist() == [0, 2, 1, 3, 10, 20, 4, 6, 5, 7, 11, 21]
    assert op.shard(whole, 2, 1)[:, 0].tolist() == [4, 6, 5, 7, 11, 21]


def test_a_rank_holds_its_part_of_every_section() -> None:
    op = Sections((4, 2, 2), (4, 2, 2))
    (whole,) = op.to_megatron([torch.arange(4.0), 10 + torch.arange(2.0), 20 + torch.arange(2.0)])
    assert op.shard(whole, 2, 1).tolist() == [2, 3, 11, 21]


@pytest.mark.parametrize("options", [{}, {"moe": False, "tied": True}], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_every_parameter_of_a_hybrid_is_named_once(options: dict[str, Any], fused: bool) -> None:
    assert_named_once(tiny_hybrid(**options), fused=fused)


@pytest.mark.parametrize(
    "options", [{"n_shared_experts": 2}, {"attention_bias": False, "tied": True}], ids=str
)
@pytest.mark.parametrize("fused", [False, True])
def test_every_parameter_and_bias_of_sigmoid_routers_is_named_once(
    options: dict[str, Any], fused: bool
) -> None:
    assert_named_once(tiny_glm(**options), fused=fused)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_every_parameter_of_a_model_with_windows_is_named_once(tied: bool, fused: bool) -> None:
    assert_named_once(tiny_windows(tied=tied), fused=fused)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_every_parameter_of_a_model_with_sinks_is_named_once(tied: bool, fused: bool) -> None:
    assert_named_once(tiny_sinks(tied=tied), fused=fused)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True},
        {"mlp_only_layers": [1], "attention_bias": True},
        {"decoder_sparse_step": 2},
        {"moe": False},
        {"moe": False, "tied": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [False, True])
def test_every_parameter_of_transformers_is_named_once(options: dict[str, Any], fused: bool) -> None:
    assert_named_once(tiny_vl(**options), fused=fused)


def assert_named_once(model: Any, *, fused: bool) -> None:
    family = FAMILIES[model.config.model_type].family
    entries = family.weight_map(model.config, padded_vocab=256, fused=fused)
    hf = [name for entry in entries for name in entry.hf]
    assert sorted(hf) == sorted(held(model))
    megatron = [name for entry in entries for name in entry.megatron]
    assert len(megatron) == len(set(megatron))
