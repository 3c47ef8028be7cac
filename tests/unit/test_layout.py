"""Every token of a micro-batch lies on exactly one rank, and what a rank needs to know of it is right."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_mm.policy.layout import lay_out, padded_tokens, zigzag
from gspo_mm.policy.parallel import ParallelPlan
from gspo_mm.types import MicroBatch

IMAGE = 9


def batch(sequences: list[tuple[list[int], int]]) -> MicroBatch:
    """Sequences as (token ids, prompt length)."""
    lengths = [len(ids) for ids, _ in sequences]
    return MicroBatch(
        names=tuple(map(str, range(len(sequences)))),
        token_ids=torch.tensor([t for ids, _ in sequences for t in ids], dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        positions=torch.arange(3 * sum(lengths)).view(3, -1) + 1,
        response_mask=torch.tensor(
            [i >= p for ids, p in sequences for i in range(len(ids))], dtype=torch.bool
        ),
        response_cu_seqlens=torch.tensor([0, *(len(ids) - p for ids, p in sequences)]).cumsum(0).int(),
        advantages=torch.zeros(len(sequences)),
        rollout_logprobs=None,
        pixel_values=None,
        image_grid_thw=None,
        image_keys=(),
        image_index=torch.empty(0, dtype=torch.int64),
    )


def all_ranks(packed: MicroBatch, plan: ParallelPlan, *, multiple: int = 1, extra: int = 0) -> dict[Any, Any]:
    total = padded_tokens(packed, plan, multiple=multiple) + extra
    return {
        (cp, tp): lay_out(packed, plan, cp_rank=cp, tp_rank=tp, image_token_id=IMAGE, total=total)
        for cp in range(plan.cp)
        for tp in range(plan.tp)
    }


@st.composite
def micro_batches(draw: st.DrawFn) -> MicroBatch:
    sequences = []
    for _ in range(draw(st.integers(0, 4))):
        ids = draw(st.lists(st.integers(1, 12), min_size=2, max_size=11))
        sequences.append((ids, draw(st.integers(1, len(ids) - 1))))
    return batch(sequences)


@settings(max_examples=80)
@given(micro_batches(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.sampled_from([1, 4]))
def test_tokens_predictions_and_images_are_shared_out_once(
    packed: MicroBatch, cp: int, tp: int, multiple: int
) -> None:
    plan = ParallelPlan(cp=cp, tp=tp)
    ranks = all_ranks(packed, plan, multiple=multiple)
    own = [layout.token_ids.view(tp, -1)[rank] for (_, rank), layout in ranks.items()]
    real = [layout.own_is_real for layout in ranks.values()]
    shown = torch.cat([ids[mask] for ids, mask in zip(own, real, strict=True)])
    assert sorted(shown.tolist()) == sorted(packed.token_ids.tolist())
    # predictions: one per response token, in the order of R once gathered
    of_cp = [ranks[rank, 0] for rank in range(cp)]
    targets = torch.cat([layout.targets for layout in of_cp])
    in_order = torch.empty_like(targets).index_copy_(0, of_cp[0].response_order, targets)
    assert in_order.tolist() == packed.token_ids[packed.response_mask].tolist()
    assert of_cp[0].response_counts == [len(layout.targets) for layout in of_cp]
    # image tokens: all of the prompts', none that was sampled
    numbers = [n for layout in ranks.values() for n in layout.visual_feature.tolist()]
    images = int(((packed.token_ids == IMAGE) & ~packed.response_mask).sum())
    assert sorted(numbers) == list(range(images))
    for (_, rank), layout in ranks.items():
        assert (layout.token_ids.view(tp, -1)[rank][layout.visual_index] == IMAGE).all()
        assert len(layout.own_is_real) % multiple == 0


def test_a_prediction_is_made_from_the_token_before() -> None:
    packed = batch([([1, 2, 3, 4, 5], 3), ([6, 7], 1)])
    (layout,) = all_ranks(packed, ParallelPlan()).values()
    assert layout.token_ids[layout.predicting_rows].tolist() == [3, 4, 6]
    assert layout.targets.tolist() == [4, 5, 7]
    assert layout.cu_seqlens.tolist() == [0, 5, 7]
    assert torch.equal(layout.positions, packed.positions)


def test_context_parallel_ranks_hold_an_early_and_a_late_piece() -> None:
    packed = batch([(list(range(1, 9)), 4), ([20, 21, 22], 1)])
    ranks = all_ranks(packed, ParallelPlan(cp=2))
    assert ranks[0, 0].token_ids.tolist() == [1, 2, 7, 8, 20, 0]
    assert ranks[1, 0].token_ids.tolist() == [3, 4, 5, 6, 21, 22]
    assert ranks[0, 0].cu_seqlens.tolist() == [0, 8, 12]
    assert ranks[0, 0].own_is_real.tolist() == [True] * 5 + [False]
    assert zigzag([4], 2, 0).tolist() == [0, 3]


def test_the_tail_is_a_sequence_of_its_own_without_targets() -> None:
    packed = batch([([1, 2, 3], 1)])
    (layout,) = all_ranks(packed, ParallelPlan(), multiple=8).values()
    assert layout.cu_seqlens.tolist() == [0, 3, 8]
    assert layout.own_is_real.tolist() == [True] * 3 + [False] * 5
    assert layout.targets.tolist() == [2, 3]
    (longer,) = all_ranks(packed, ParallelPlan(), multiple=8, extra=8).values()
    assert longer.cu_seqlens.tolist() == [0, 3, 16]


@pytest.mark.parametrize("plan", [ParallelPlan(), ParallelPlan(cp=2, tp=2)])
def test_a_micro_batch_without_sequences_is_all_tail(plan: ParallelPlan) -> None:
    for layout in all_ranks(batch([]), plan).values():
        assert len(layout.token_ids) >= plan.tp
        assert not layout.own_is_real.any()
        assert not len(layout.targets)


def test_a_sampled_image_token_is_text() -> None:
    packed = batch([([IMAGE, 1, IMAGE], 1)])
    (layout,) = all_ranks(packed, ParallelPlan()).values()
    assert layout.visual_index.tolist() == [0]
    prompt_only = dataclasses.replace(packed, response_mask=torch.zeros(3, dtype=torch.bool))
    (layout,) = all_ranks(prompt_only, ParallelPlan()).values()
    assert layout.visual_feature.tolist() == [0, 1]
