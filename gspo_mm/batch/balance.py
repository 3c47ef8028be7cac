"""Deal sequences to data-parallel ranks and micro-batches, so that ranks which wait for each other wait little.

Every rank gets the same number of micro-batches: experts are spread over data-parallel ranks, so the k-th
micro-batches of all ranks meet at every mixture layer, and pipeline schedules need equal counts anyway. "Slot k" is
these k-th micro-batches together.

    units of work      answers that show the same images stay together: in one micro-batch an image is encoded once
      -> bins          ranks * micro-batches of them, the costliest unit first into the cheapest bin that has room
      -> slots         neighbours by cost, then single sequences moved until the slot is even
      -> ranks         of each slot the costliest bin to the rank with least so far, or of those that are alike to the one that
                       has most of its images; then moved until ranks are even

This is done with groups cut into smaller and into larger pieces; what ranks that meet in every slot finish first is
kept. One rank has nobody to wait for: its micro-batches are filled in order (`fill`).

Left out: optimal packing (bin packing and number partitioning at once, both NP-hard; of 512 long-tailed answers the
greedy way leaves 8 ranks within 2 % of each other), swaps of two sequences, and sharing the text of a prompt.

Dims: R ranks, K micro-batches of a rank, B = R * K bins.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from gspo_mm.families.cost import FlopModel
from gspo_mm.types import EncodedImage, TrainSequence

type NumPatches = Callable[[EncodedImage], int]  # patches of an image before merging
type Dealt = list[list[list[TrainSequence]]]  # [data-parallel rank][micro-batch][sequence]

# Costs within this fraction of their mean are left as they are. Ranks get more of it: what evens out whole ranks
# makes their slots a little less even, and ranks that share experts meet in every slot.
EVEN_SLOT = 0.005
EVEN_RANKS = 0.02
# A group that shares images is cut into pieces of at most this many bins' worth of work. Smaller pieces even out
# better, larger ones encode fewer images twice: both are tried, the faster is kept.
PIECES = (1.0, 1.2)
# Ranks whose work so far differs by less than this fraction of a whole rank's are alike to the next bin, which goes to the one
# that has its images. With more, ranks have to be evened out at the expense of their slots.
ALIKE = 0.01
TRIES = 8  # bins, cheapest first, that are looked at before the one with most room


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
    attempts = (_attempt(items, ranks, max_tokens, micro_batches_multiple_of, piece) for piece in PIECES)
    rows = min(attempts, key=_slowest)
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


def flops_of(dealt: Dealt, *, cost: FlopModel, num_patches: NumPatches) -> int:
    """What all ranks together have to do for `dealt`, padding not counted."""
    return sum(_cost_of(members, cost, num_patches, 1) for row in dealt for members in row)


def _cost_of(members: list[TrainSequence], cost: FlopModel, num_patches: NumPatches, multiple_of: int) -> int:
    images = {image.key: image for s in members for image in s.images}
    return cost.count(
        (_aligned(len(s.token_ids), multiple_of) for s in members),
        sum(s.num_trained for s in members),
        map(num_patches, images.values()),
    )


@dataclass(frozen=True, slots=True)
class _Item:
    """One sequence, as far as balancing looks at it."""

    tokens: int  # rounded up; at most the budget, so that an overlong sequence fills a bin by itself
    cost: int  # without its images
    images: tuple[tuple[int, int], ...]  # (number, cost) of each distinct image it shows


type _Unit = dict[int, _Item]  # sequences that are placed together, by their place in the input


class _Bin:
    """A micro-batch in the making."""

    def __init__(self, room: int) -> None:
        self.room = room  # tokens
        self.cost = 0  # every distinct image once
        self.members: _Unit = {}
        self._shown: Counter[int] = Counter()  # how many members show an image

    @property
    def images(self) -> list[int]:
        return [image for image, count in self._shown.items() if count]

    def added(self, item: _Item) -> int:
        """What `item` would cost here on top."""
        return item.cost + sum(cost for image, cost in item.images if not self._shown[image])

    def saved(self, item: _Item) -> int:
        """What there is less to do without the member `item`."""
        return item.cost + sum(cost for image, cost in item.images if self._shown[image] == 1)

    def put(self, place: int, item: _Item) -> None:
        self.cost += self.added(item)
        self.room -= item.tokens
        self.members[place] = item
        self._shown.update(image for image, _ in item.images)

    def take(self, place: int) -> _Item:
        item = self.members.pop(place)
        self.cost -= self.saved(item)
        self.room += item.tokens
        self._shown.subtract(image for image, _ in item.images)
        return item


class _Bins:
    """Bins that are found by least cost or by most room in O(log B).

    A bin's old entries stay in the heaps until they come up; they are known by a cost or room that is no longer true.
    """

    def __init__(self, count: int, max_tokens: int) -> None:
        self.all = [_Bin(max_tokens) for _ in range(count)]
        self._by_cost = [(0, i) for i in range(count)]
        self._by_room = [(-max_tokens, i) for i in range(count)]

    def put(self, unit: _Unit) -> bool:
        """Put `unit` into a cheap bin that has room; False when none has."""
        number = self._find(sum(item.tokens for item in unit.values()))
        if number is None:
            return False
        chosen = self.all[number]
        for place, item in unit.items():
            chosen.put(place, item)
        heapq.heappush(self._by_cost, (chosen.cost, number))
        heapq.heappush(self._by_room, (-chosen.room, number))
        return True

    def _find(self, tokens: int) -> int | None:
        looked_at: list[tuple[int, int]] = []
        found = None
        while found is None and self._by_cost and len(looked_at) < TRIES:
            cost, number = heapq.heappop(self._by_cost)
            if cost == self.all[number].cost:
                looked_at.append((cost, number))
                found = number if tokens <= self.all[number].room else None
        for entry in looked_at:
            heapq.heappush(self._by_cost, entry)
        if found is not None:
            return found
        while -self._by_room[0][0] != self.all[self._by_room[0][1]].room:
            heapq.heappop(self._by_room)
        room, number = -self._by_room[0][0], self._by_room[0][1]
        return number if tokens <= room else None


def _items(
    sequences: list[TrainSequence],
    cost: FlopModel,
    num_patches: NumPatches,
    max_tokens: int,
    multiple_of: int,
) -> list[_Item]:
    images: dict[str, tuple[int, int]] = {}  # by content hash
    items = []
    for sequence in sequences:
        for image in sequence.images:
            if image.key not in images:
                images[image.key] = (len(images), cost.image(num_patches(image)))
        tokens = _aligned(len(sequence.token_ids), multiple_of)
        items.append(
            _Item(
                tokens=min(tokens, max_tokens),
                cost=cost.sequence(tokens, sequence.num_trained),
                images=tuple(dict.fromkeys(images[image.key] for image in sequence.images)),
            )
        )
    return items


def _attempt(
    items: list[_Item], ranks: int, max_tokens: int, count_multiple_of: int, piece: float
) -> list[list[_Bin]]:
    """Each rank's bins, in as few slots as the greedy way manages."""
    needed = max(
        sum(item.tokens for item in items) / max_tokens,
        sum(2 * item.tokens > max_tokens for item in items),  # no two of these fit together
    )
    count = _up(needed / ranks, count_multiple_of)
    while (bins := _pack_bins(items, ranks * count, max_tokens, piece)) is None:
        # by a fraction: a large count is not raised one by one
        count = _up(max(count * 1.05, count + 1), count_multiple_of)
    return _rows(bins, ranks)


def _slowest(rows: list[list[_Bin]]) -> int:
    """The cost of every slot's costliest bin: the time that ranks need which meet in every slot."""
    return sum(max(it.cost for it in slot) for slot in zip(*rows, strict=True))


def _pack_bins(items: list[_Item], num_bins: int, max_tokens: int, piece: float) -> list[_Bin] | None:
    """All items in `num_bins` bins of like cost; None when a sequence finds no room."""
    bins = _Bins(num_bins, max_tokens)
    loose: list[tuple[int, _Item]] = []
    for unit in _units(items, num_bins, max_tokens, piece):
        if not bins.put(unit):
            loose += unit.items()
    loose.sort(key=lambda entry: -entry[1].tokens)
    return bins.all if all(bins.put({place: item}) for place, item in loose) else None


def _units(items: list[_Item], num_bins: int, max_tokens: int, piece: float) -> list[_Unit]:
    """Sequences that show the same images, in pieces that are not too much for one bin; the costliest first."""
    together: defaultdict[object, _Unit] = defaultdict(dict)
    for place, item in enumerate(items):
        together[item.images or place][place] = item  # text shares nothing
    images = {image for item in items for image in item.images}
    share = (sum(item.cost for item in items) + sum(cost for _, cost in images)) / num_bins
    pieces: list[tuple[int, _Unit]] = []
    for unit in together.values():
        pieces += _cut(unit, piece * share, max_tokens)
    return [unit for _, unit in sorted(pieces, key=lambda entry: -entry[0])]


def _cut(unit: _Unit, max_cost: float, max_tokens: int) -> Iterator[tuple[int, _Unit]]:
    """(cost, piece) of a unit, its images paid by each piece; a piece exceeds a limit only if it is one sequence."""
    shared = sum(cost for _, cost in next(iter(unit.values())).images)
    piece: _Unit = {}
    cost, tokens = shared, 0
    for place, item in unit.items():
        if piece and (cost + item.cost > max_cost or tokens + item.tokens > max_tokens):
            yield cost, piece
            piece, cost, tokens = {}, shared, 0
        piece[place] = item
        cost += item.cost
        tokens += item.tokens
    yield cost, piece


def _rows(bins: list[_Bin], ranks: int) -> list[list[_Bin]]:
    """Each rank's bins, one of every slot; the costliest slot first, so that memory runs out at once or never."""
    bins = _apart(bins)
    rows: list[list[_Bin]] = [[] for _ in range(ranks)]
    shown_by: defaultdict[int, set[int]] = defaultdict(set)  # the ranks of an image
    tolerance = ALIKE * sum(it.cost for it in bins) / ranks
    for start in range(0, len(bins), ranks):
        slot = bins[start : start + ranks]
        _even_out([[it] for it in slot], EVEN_SLOT)
        slot.sort(key=lambda it: -it.cost)
        so_far = {rank: sum(it.cost for it in rows[rank]) for rank in range(ranks)}
        free = sorted(so_far, key=so_far.__getitem__)
        for it in slot:
            known = Counter(rank for image in it.images for rank in shown_by[image])
            most = so_far[free[0]] + tolerance
            alike = [rank for rank in free if so_far[rank] <= most]
            chosen = max(alike, key=known.__getitem__)  # the first of them where none stands out
            free.remove(chosen)
            rows[chosen].append(it)
            for image in it.images:
                shown_by[image].add(chosen)
    _even_out(rows, EVEN_RANKS)
    return rows


def _apart(bins: list[_Bin]) -> list[_Bin]:
    """The costliest first; of bins that cost alike those with the same images apart, so that one rank can have them all."""
    grain = EVEN_SLOT * sum(it.cost for it in bins) / len(bins)
    turns: Counter[int] = Counter()
    turn = []
    for it in bins:
        turn.append(max((turns[image] for image in it.images), default=0))
        turns.update(it.images)
    order = sorted(range(len(bins)), key=lambda i: (-(bins[i].cost // grain), turn[i], -bins[i].cost))
    return [bins[i] for i in order]


def _even_out(piles: list[list[_Bin]], fraction: float) -> None:
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


def _moves(
    high: list[_Bin], low: list[_Bin], high_cost: int, low_cost: int
) -> Iterator[tuple[int, int, int]]:
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
