"""Deal sequences to data-parallel ranks and micro-batches, so that ranks which wait for each other wait little.

Every rank gets the same number of micro-batches: experts are spread over data-parallel ranks, so the k-th
micro-batches of all ranks meet at every mixture layer, and pipeline schedules need equal counts anyway. "Slot k" is
these k-th micro-batches together.

    units of work      answers that show the same images stay together: in one micro-batch an image is encoded once
      -> bins          ranks * micro-batches of them, the costliest unit first into the cheapest bin that has room
      -> slots         neighbours by cost, then single sequences moved until the slot is even
      -> ranks         of each slot the costliest bin to the rank with least so far; then bins of a slot exchanged so that few
                       ranks show an image, and sequences moved until ranks are even

This is done with groups cut into smaller and into larger pieces. Where a rank has but a group or two, the other way round is
better: whole groups -> ranks -> bins (`_by_ranks`). What ranks that meet in every slot finish first is kept. One rank has
nobody to wait for: its micro-batches are filled in order (`fill`).

Left out: optimal packing (bin packing and number partitioning at once, both NP-hard; of 512 long-tailed answers the
greedy way leaves 8 ranks within 2 % of each other), swaps of two sequences between ranks, and that a prompt may be computed
once for the answers of a micro-batch to it (packing.py): each counts as if it were alone.

Dims: R ranks, K micro-batches of a rank, B = R * K bins.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import linear_sum_assignment

from gspo_mm.batch.bins import TRIES, Bin, Bins, Item, Unit
from gspo_mm.batch.packing import tokens_of, trees_of
from gspo_mm.families.cost import FlopModel
from gspo_mm.types import EncodedImage, TrainSequence

type NumPatches = Callable[[EncodedImage], int]  # patches of an image before merging
type Dealt = list[list[list[TrainSequence]]]  # [data-parallel rank][micro-batch][sequence]

# (items, ranks, count, max_tokens) -> each rank's `count` bins; None when a sequence finds no room
type _Way = Callable[[Unit, int, int, int], list[list[Bin]] | None]

# Costs within this fraction of their mean are left as they are. Ranks get more of it: what evens out whole ranks
# makes their slots a little less even, and ranks that share experts meet in every slot.
EVEN_SLOT = 0.005
EVEN_RANKS = 0.02
# A group that shares images is cut into pieces of at most this many bins' worth of work. Smaller pieces even out
# better, larger ones encode fewer images twice: both are tried, the faster is kept.
PIECES = (1.0, 1.2)
# How often bins of each slot are exchanged between ranks: after four times little changes.
SWEEPS = 4
# So much longer may take what shows images on fewer ranks: sending and decoding them is not in the cost.
FEWER_RANKS = 0.01


@dataclass(frozen=True, kw_only=True)
class Balance:
    """How even dealt work is, by estimated cost. All 0 for one rank and for no work."""

    imbalance: float  # costliest rank / mean rank - 1: time lost where ranks meet once a step
    slot_imbalance: (
        float  # the same with ranks meeting at every micro-batch, as with experts spread over them
    )
    padding: float  # fraction of the tokens that only round sequences up to `multiple_of`


def fill(
    sequences: Iterable[TrainSequence], max_tokens: int, *, multiple_of: int = 1
) -> list[list[TrainSequence]]:
    """Micro-batches of at most `max_tokens` in order; a sequence longer than that gets one of its own.

    Each sequence counts rounded up to `multiple_of` tokens.
    """
    bins: list[list[TrainSequence]] = []
    room = 0
    for sequence in sequences:
        tokens = _aligned(len(sequence.token_ids), multiple_of)
        if not bins or tokens > room:
            bins.append([])
            room = max_tokens
        bins[-1].append(sequence)
        room -= tokens
    return bins


def deal(
    sequences: list[TrainSequence],
    *,
    ranks: int,
    max_tokens: int,
    cost: FlopModel,
    num_patches: NumPatches,
    multiple_of: int = 1,
    micro_batches_multiple_of: int = 1,
) -> Dealt:
    """Micro-batches for each of `ranks` data-parallel ranks, balanced by `cost` (the FLOPs of an update).

    No micro-batch exceeds `max_tokens`, each sequence rounded up to `multiple_of` (context parallelism cuts it into
    2 * cp equal parts), save a sequence that alone is longer. The number of micro-batches is the same on every
    rank, divisible by `micro_batches_multiple_of` (interleaved pipeline schedules) and as small as the budget
    allows, within about 5 %. Where there are fewer sequences than slots, micro-batches are left empty.

    Within a micro-batch sequences keep their order, and equal input gives equal output.
    """
    if ranks == 1 and micro_batches_multiple_of == 1:
        return [fill(sequences, max_tokens, multiple_of=multiple_of)]
    if not sequences:
        return [[] for _ in range(ranks)]
    items = _items(sequences, cost, num_patches, max_tokens, multiple_of)
    ways: list[_Way] = [partial(_by_slots, piece=piece) for piece in PIECES]
    if any(item.images for item in items.values()):
        ways.append(_by_ranks)
    attempts = [_attempt(items, ranks, max_tokens, micro_batches_multiple_of, way) for way in ways]
    rows = min(attempts, key=_slowest)
    if len(attempts) > len(PIECES) and _slowest(attempts[-1]) <= (1 + FEWER_RANKS) * _slowest(rows):
        rows = attempts[-1]
    return [[[sequences[place] for place in sorted(it.members)] for it in row] for row in rows]


def measure(dealt: Dealt, *, cost: FlopModel, num_patches: NumPatches, multiple_of: int = 1) -> Balance:
    """How even `dealt` is."""
    cost_RK = [[_cost_of(members, cost, num_patches, multiple_of) for members in row] for row in dealt]
    mean = sum(map(sum, cost_RK)) / len(dealt)
    lengths = [len(s.token_ids) for row in dealt for members in row for s in members]
    padded = sum(_aligned(length, multiple_of) for length in lengths)
    if not padded:
        return Balance(imbalance=0.0, slot_imbalance=0.0, padding=0.0)
    return Balance(
        imbalance=max(map(sum, cost_RK)) / mean - 1,
        slot_imbalance=sum(map(max, zip(*cost_RK, strict=True))) / mean - 1,
        padding=1 - sum(lengths) / padded,
    )


def flops_of(dealt: Dealt, *, cost: FlopModel, num_patches: NumPatches, shares_prompts: bool = False) -> int:
    """What all ranks together have to do for `dealt`, padding not counted."""
    members_of = [members for row in dealt for members in row]
    return sum(_cost_of(members, cost, num_patches, 1, shares_prompts) for members in members_of)


def _cost_of(
    members: list[TrainSequence],
    cost: FlopModel,
    num_patches: NumPatches,
    multiple_of: int,
    shares_prompts: bool = False,
) -> int:
    images = {image.key: image for s in members for image in s.images}
    lengths = map(tokens_of, trees_of(members)) if shares_prompts else [len(s.token_ids) for s in members]
    return cost.count(
        (_aligned(length, multiple_of) for length in lengths),
        sum(s.num_trained for s in members),
        map(num_patches, images.values()),
    )


def _items(
    sequences: list[TrainSequence],
    cost: FlopModel,
    num_patches: NumPatches,
    max_tokens: int,
    multiple_of: int,
) -> Unit:
    images: dict[str, tuple[int, int]] = {}  # by content hash
    items: Unit = {}
    for place, sequence in enumerate(sequences):
        for image in sequence.images:
            if image.key not in images:
                images[image.key] = (len(images), cost.image(num_patches(image)))
        tokens = _aligned(len(sequence.token_ids), multiple_of)
        items[place] = Item(
            tokens=min(tokens, max_tokens),
            cost=cost.sequence(tokens, sequence.num_trained),
            images=tuple(dict.fromkeys(images[image.key] for image in sequence.images)),
        )
    return items


def _attempt(items: Unit, ranks: int, max_tokens: int, count_multiple_of: int, way: _Way) -> list[list[Bin]]:
    """Each rank's bins, in as few slots as the greedy way manages."""
    needed = max(
        sum(item.tokens for item in items.values()) / max_tokens,
        sum(2 * item.tokens > max_tokens for item in items.values()),  # no two of these fit together
    )
    count = _up(needed / ranks, count_multiple_of)
    while (rows := way(items, ranks, count, max_tokens)) is None:
        # by a fraction: a large count is not raised one by one
        count = _up(max(count * 1.05, count + 1), count_multiple_of)
    return rows


def _by_slots(
    items: Unit, ranks: int, count: int, max_tokens: int, *, piece: float
) -> list[list[Bin]] | None:
    """Bins of like cost first, then slots of them, then ranks."""
    bins = _pack_bins(items, ranks * count, max_tokens, piece)
    return _rows(bins, ranks) if bins else None


def _by_ranks(items: Unit, ranks: int, count: int, max_tokens: int) -> list[list[Bin]] | None:
    """Ranks of like cost first, with groups as whole as they can be, then each rank's bins."""
    piles = _pack_bins(items, ranks, count * max_tokens, 1.0)
    if piles is None:
        return None
    _even_out([[pile] for pile in piles], EVEN_RANKS)
    rows: list[list[Bin]] = []
    for pile in piles:
        bins = _pack_bins(pile.members, count, max_tokens, 0.0)
        if bins is None:
            return None
        _exchange(bins)
        rows.append(sorted(bins, key=lambda it: -it.cost))
    for slot in zip(*rows, strict=True):
        _even_out([[it] for it in slot], EVEN_SLOT)
    return rows


def _slowest(rows: list[list[Bin]]) -> int:
    """The cost of every slot's costliest bin: the time that ranks need which meet in every slot."""
    return sum(max(it.cost for it in slot) for slot in zip(*rows, strict=True))


def _pack_bins(items: Unit, num_bins: int, max_tokens: int, piece: float) -> list[Bin] | None:
    """All items in `num_bins` bins of like cost; None when a sequence finds no room."""
    bins = Bins(num_bins, max_tokens)
    loose: list[tuple[int, Item]] = []
    for unit in _units(items, num_bins, max_tokens, piece):
        if not bins.put(unit):
            loose += unit.items()
    loose.sort(key=lambda entry: -entry[1].tokens)
    return bins.all if all(bins.put({place: item}) for place, item in loose) else None


def _units(items: Unit, num_bins: int, max_tokens: int, piece: float) -> list[Unit]:
    """Sequences that show the same images, in pieces that are not too much for one bin; the costliest first."""
    together: defaultdict[object, Unit] = defaultdict(dict)
    for place, item in items.items():
        together[item.images or place][place] = item  # text shares nothing
    images = {image for item in items.values() for image in item.images}
    share = (sum(item.cost for item in items.values()) + sum(cost for _, cost in images)) / num_bins
    pieces: list[tuple[int, Unit]] = []
    for unit in together.values():
        pieces += _cut(unit, piece * share, max_tokens)
    return [unit for _, unit in sorted(pieces, key=lambda entry: -entry[0])]


def _cut(unit: Unit, max_cost: float, max_tokens: int) -> Iterator[tuple[int, Unit]]:
    """(cost, piece) of a unit, its images paid by each piece; a piece exceeds a limit only if it is one sequence."""
    shared = sum(cost for _, cost in next(iter(unit.values())).images)
    piece: Unit = {}
    cost, tokens = shared, 0
    for place, item in unit.items():
        if piece and (cost + item.cost > max_cost or tokens + item.tokens > max_tokens):
            yield cost, piece
            piece, cost, tokens = {}, shared, 0
        piece[place] = item
        cost += item.cost
        tokens += item.tokens
    yield cost, piece


def _rows(bins: list[Bin], ranks: int) -> list[list[Bin]]:
    """Each rank's bins, one of every slot; the costliest slot first, so that memory runs out at once or never."""
    bins = _apart(bins)
    rows: list[list[Bin]] = [[] for _ in range(ranks)]
    for start in range(0, len(bins), ranks):
        slot = bins[start : start + ranks]
        _even_out([[it] for it in slot], EVEN_SLOT)
        slot.sort(key=lambda it: -it.cost)
        for row, it in zip(sorted(rows, key=lambda row: sum(it.cost for it in row)), slot, strict=True):
            row.append(it)
    _bring_together(rows)
    _even_out(rows, EVEN_RANKS)
    return rows


def _bring_together(rows: list[list[Bin]]) -> None:
    """Exchange bins of a slot, which cost alike, so that ranks get those whose images they show in other slots."""
    shown_by: defaultdict[int, Counter[int]] = defaultdict(Counter)  # image -> in how many bins of each rank
    for rank, row in enumerate(rows):
        for image in (image for it in row for image in it.images):
            shown_by[image][rank] += 1
    for number in [*range(len(rows[0]))] * SWEEPS if shown_by else []:
        slot = [row[number] for row in rows]
        known = np.eye(len(rows)) / 100  # [bin, rank]: images that the rank shows; what gains nothing stays
        for rank, it in enumerate(slot):
            for image in it.images:
                shown_by[image][rank] -= 1
        for i, it in enumerate(slot):
            for image in it.images:
                known[i, [rank for rank, count in shown_by[image].items() if count]] += 1
        for i, rank in zip(*linear_sum_assignment(known, maximize=True), strict=True):
            rows[rank][number] = slot[i]
            for image in slot[i].images:
                shown_by[image][int(rank)] += 1


def _apart(bins: list[Bin]) -> list[Bin]:
    """The costliest first; of bins that cost alike those with the same images apart, so that one rank can have them all."""
    grain = EVEN_SLOT * sum(it.cost for it in bins) / len(bins)
    turns: Counter[int] = Counter()
    turn = []
    for it in bins:
        turn.append(max((turns[image] for image in it.images), default=0))
        turns.update(it.images)
    order = sorted(range(len(bins)), key=lambda i: (-(bins[i].cost // grain), turn[i], -bins[i].cost))
    return [bins[i] for i in order]


def _even_out(piles: list[list[Bin]], fraction: float) -> None:
    """Move sequences between bins of the same slot until the piles cost alike or no move helps."""
    cost = [sum(it.cost for it in pile) for pile in piles]
    tolerance = fraction * sum(cost) / len(piles)
    order = sorted(range(len(piles)), key=lambda i: cost[i])
    while len(order) > 1:
        high = order[-1]
        for low in order[:-1]:
            if cost[high] - cost[low] <= tolerance:
                return
            best = min(_moves(piles[high], piles[low], cost[high], cost[low]), default=None)
            if best is not None:
                _, slot, place = best
                piles[low][slot].put(place, piles[high][slot].take(place))
                cost[high], cost[low] = (sum(it.cost for it in piles[i]) for i in (high, low))
                order.sort(key=lambda i: cost[i])
                break
        else:
            order.pop()  # nothing can leave the costliest pile: one overlong sequence, or full bins elsewhere


def _exchange(bins: list[Bin]) -> None:
    """Exchange sequences of a rank's costliest bin and of its cheap ones until it costs what others do or no exchange helps."""
    tolerable = (1 + EVEN_SLOT) * sum(it.cost for it in bins) / len(bins)
    while (high := max(bins, key=lambda it: it.cost)).cost > tolerable:
        cheap = heapq.nsmallest(TRIES, bins, key=lambda it: it.cost)
        found = (
            (*each, i) for i, low in enumerate(cheap) if low is not high for each in _exchanges(high, low)
        )
        best = min(found, default=None)
        if best is None:
            return
        _, place, back, number = best
        low = cheap[number]
        there, here = high.take(place), low.take(back)
        low.put(place, there)
        high.put(back, here)


def _exchanges(high: Bin, low: Bin) -> Iterator[tuple[int, int, int]]:
    """(cost of the costlier bin afterwards, place, place) of exchanges that make it less than that of `high`."""
    for place, item in high.members.items():
        for back, other in low.members.items():
            alike = item.images == other.images
            if not alike and not set(item.images).isdisjoint(other.images):
                continue
            if high.room + item.tokens < other.tokens or low.room + other.tokens < item.tokens:
                continue
            if alike:
                less = more = item.cost - other.cost
            else:
                less, more = high.saved(item) - high.added(other), low.added(item) - low.saved(other)
            after = max(high.cost - less, low.cost + more)
            if after < high.cost:
                yield after, place, back


def _moves(high: list[Bin], low: list[Bin], high_cost: int, low_cost: int) -> Iterator[tuple[int, int, int]]:
    """(cost of the costlier pile afterwards, slot, place) of moves that make it less than `high_cost`."""
    for slot, (source, target) in enumerate(zip(high, low, strict=True)):
        for place, item in source.members.items():
            if item.tokens <= target.room:
                after = max(high_cost - source.saved(item), low_cost + target.added(item))
                if after < high_cost:
                    yield after, slot, place


def _aligned(tokens: int, multiple_of: int) -> int:
    return -(-tokens // multiple_of) * multiple_of


def _up(count: float, step: int) -> int:
    """The least multiple of `step` that is at least `count`."""
    return math.ceil(count / step) * step
