"""Shares hold every sequence of their update once, with the denominators of the whole step."""

import numpy as np

from gspo_mm.families.cost import FlopModel
from gspo_mm.policy.shares import deal_updates, split_evenly
from gspo_mm.types import TrainSequence, Work

FLOPS = FlopModel(
    token=10, router=1, pair=1, row=5, patch_embedding=1, patch=1, patch_pair=1, merged=1, patches_per_token=4
)


def sequences(count: int, first: int = 0) -> list[TrainSequence]:
    return [
        TrainSequence(
            name=f"s{first + i}",
            token_ids=np.arange(3 + i % 5, dtype=np.int32),
            trained=np.arange(3 + i % 5) >= 2,
            images=(),
        )
        for i in range(count)
    ]


def test_each_update_is_dealt_on_its_own_with_its_own_denominators() -> None:
    updates = [sequences(12), sequences(8, first=100)]
    shares, metrics, work = deal_updates(
        updates, ranks=2, max_tokens=16, flops=FLOPS, frozen=(), num_patches=lambda _: 4
    )
    for number, update in enumerate(updates):
        found = [s.name for of_rank in shares for micro in of_rank[number].micro_batches for s in micro]
        assert sorted(found) == sorted(s.name for s in update)
        for of_rank in shares:
            assert of_rank[number].num_sequences == len(update)
            assert of_rank[number].num_tokens == sum(len(s.token_ids) - 2 for s in update)
        assert len({len(of_rank[number].micro_batches) for of_rank in shares}) == 1
    assert work.tokens == sum(len(s.token_ids) for update in updates for s in update)
    assert metrics["batch/micro_batches"] == sum(len(share.micro_batches) for share in shares[0])


def test_work_is_counted_forward_and_with_backward() -> None:
    (update,) = [sequences(3)]
    shares, _, work = deal_updates(
        [update], ranks=1, max_tokens=100, flops=FLOPS, frozen=(), num_patches=lambda _: 4
    )
    forward = sum(FLOPS.sequence(len(s.token_ids), len(s.token_ids) - 2) for s in update)
    assert work.forward == forward
    assert work.update == 3 * forward
    assert len(shares) == 1


def test_no_update_gives_no_shares() -> None:
    assert deal_updates([], ranks=2, max_tokens=4, flops=FLOPS, frozen=(), num_patches=lambda _: 4) == (
        [[], []],
        {},
        Work(),
    )


def test_groups_are_spread_evenly_over_updates() -> None:
    assert split_evenly(list(range(7)), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert split_evenly([1, 2], 4) == [[1], [2]]
