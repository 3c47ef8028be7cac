"""The sequences of a step's updates -> every data-parallel rank's shares. Rank 0, which has the groups, deals them out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Protocol

from gspo_mm.batch.balance import NumPatches, deal, flops_of, measure
from gspo_mm.config import PolicyConfig
from gspo_mm.families.cost import FlopModel
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.parcels import passed_on
from gspo_mm.types import EncodedImage, Share, TrainSequence, Work


class Sizes(Protocol):
    """What dealing needs of `data.Processor`."""

    def num_patches(self, image: EncodedImage) -> int:
        """t*h*w of one image, without decoding it."""
        ...


def share_out(
    policy: Policy,
    updates: Sequence[Sequence[TrainSequence]] | None,
    *,
    processor: Sizes,
    config: PolicyConfig,
) -> tuple[list[Share], dict[str, float], Work]:
    """This rank's shares of each update's sequences, how well they are balanced, and what all ranks do. A collective.

    Rank 0 gives `updates`, and deals them over the data-parallel ranks by cost; what others give is ignored.
    """
    of_dp_rank, told = None, None
    if policy.ranks.main:
        assert updates is not None
        plan = policy.plan
        of_dp_rank, metrics, work = deal_updates(
            updates,
            ranks=plan.dp,
            max_tokens=config.micro_batch_tokens,
            flops=policy.family.flops(policy.hf),
            frozen=config.frozen,
            num_patches=processor.num_patches,
            multiple_of=plan.sequence_multiple,
            micro_batches_multiple_of=plan.pp if plan.vpp > 1 else 1,
            shares_prompts=policy.shares_prompts,
        )
        told = metrics, work
    metrics, work = policy.ranks.from_main(told)
    return passed_on(of_dp_rank, policy.ranks, policy.dp_rank_of), metrics, work


def deal_updates(
    updates: Sequence[Sequence[TrainSequence]],
    *,
    ranks: int,
    max_tokens: int,
    flops: FlopModel,
    frozen: Collection[str],
    num_patches: NumPatches,
    multiple_of: int = 1,
    micro_batches_multiple_of: int = 1,
    shares_prompts: bool = False,
) -> tuple[list[list[Share]], dict[str, float], Work]:
    """([rank][update] shares, measures of balance, work) of each optimizer step's sequences; see `deal` for the sizes.

    `flops` is that of a forward pass, `frozen` the parts that are not trained.
    """
    cost = flops.training(frozen)
    tokens = forward = update = 0
    shares: list[list[Share]] = [[] for _ in range(ranks)]
    balances = []
    for sequences in updates:
        dealt = deal(
            list(sequences),
            ranks=ranks,
            max_tokens=max_tokens,
            cost=cost,
            num_patches=num_patches,
            multiple_of=multiple_of,
            micro_batches_multiple_of=micro_batches_multiple_of,
        )
        balances.append(measure(dealt, cost=cost, num_patches=num_patches, multiple_of=multiple_of))
        flops_dealt = partial(flops_of, dealt, num_patches=num_patches, shares_prompts=shares_prompts)
        update += flops_dealt(cost=cost)
        forward += flops_dealt(cost=flops)
        tokens += sum(len(s.token_ids) for s in sequences)
        trained = sum(s.num_trained for s in sequences)
        for of_rank, micro_batches in zip(shares, dealt, strict=True):
            of_rank.append(
                Share(
                    micro_batches=tuple(map(tuple, micro_batches)),
                    num_sequences=len(sequences),
                    num_tokens=trained,
                )
            )
    work = Work(tokens=tokens, forward=forward, update=update)
    if not balances:
        return shares, {}, work
    metrics = {
        "batch/imbalance": fmean(b.imbalance for b in balances),
        "batch/slot_imbalance": fmean(b.slot_imbalance for b in balances),
        "batch/padding": fmean(b.padding for b in balances),
        "batch/micro_batches": float(sum(len(share.micro_batches) for share in shares[0])),
    }
    return shares, metrics, work


def split_evenly[T](items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """At most `parts` runs of consecutive items whose sizes differ by at most one; none is empty."""
    assert items
    parts = min(parts, len(items))
    edges = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(edges)]
