"""Why rollout engine and policy differ much at a token, where a router explains it: two experts that it scores almost alike.

Which of the two is chosen then hangs on the last bits of their scores, in which two implementations of one model
differ. The token goes through another expert, and its log-prob is another: by 0.05 nats, say, where all others agree to
1e-6. Neither side is wrong.

    margin of a token in a layer = (k-th score − (k+1)-th score) / largest |score|,  k experts are chosen

Looked at are the few tokens of a step that differ most, and only where they do by far more than the step's median, in
one more forward pass over their sequences. It needs the weights that the answers were compared with, so a step with a
single update, which learns the differences only while it changes them, has no look.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gspo_mm.batch import Pixels, pack
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.expert_load import routers
from gspo_mm.types import MicroBatch, TrainSequence

logger = logging.getLogger(__name__)

_FEW = 3  # tokens looked at of a rank's micro-batches, each of another sequence
_ODD = 50.0  # times the step's median difference
_LEAST = 1e-3  # nats; smaller differences are odd to nobody
# margins below can be turned by what two implementations differ by: some roundings of this type, one after the other
_TURNED = {torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True, kw_only=True)
class OddToken:
    """A token whose log-probs differ much."""

    gap: float  # nats
    sequence: TrainSequence
    place: int  # of the token in its sequence

    def __str__(self) -> str:
        return f"{self.sequence.name}, token {self.place}, {self.gap:.2g} nats"


class NearTies:
    """Looks for them in one policy; `said` is what the last look found, a sentence a token, the same on every rank."""

    def __init__(self, policy: Policy, processor: Pixels) -> None:
        """A collective: a stage of dense layers alone takes part in the looks of the others."""
        self._policy, self._processor = policy, processor
        self._has_routers = policy.ranks.any(any(True for _ in routers(policy.chunks)))
        self._turned = _TURNED[next(policy.parameters()).dtype]
        self.said: list[str] = []

    def look(
        self,
        members: Sequence[Sequence[TrainSequence]],
        batches: Sequence[MicroBatch],
        logprobs: Sequence[torch.Tensor | None],
    ) -> dict[str, float]:
        """Metrics, {"near_ties/odd", "near_ties/explained"}; none where nothing is odd. A collective.

        `members` are the sequences of `batches`, `logprobs` [R] nats the policy's, with the weights that it has now.
        """
        self.said = []
        if not self._has_routers:
            return {}
        gaps = [_gaps(batch, old) for batch, old in zip(batches, logprobs, strict=True)]
        own = torch.cat([gap for gap in gaps if gap is not None] or [torch.empty(0)])
        medians = [
            m for m in self._policy.ranks.gather(float(own.median()) if len(own) else None) if m is not None
        ]
        bound = max(_LEAST, _ODD * statistics.median(medians)) if medians else float("inf")
        odd = _odd_tokens(members, batches, gaps, bound)
        if not self._policy.ranks.any(bool(odd)):
            return {}
        found = self._explain(odd)
        everything = dict(item for of_rank in self._policy.ranks.gather(found) for item in of_rank.items())
        self.said = [sentence for _, sentence in everything.values()]
        for sentence in self.said:
            logger.info(sentence)
        return {
            "near_ties/odd": float(len(everything)),
            "near_ties/explained": float(sum(explained for explained, _ in everything.values())),
        }

    def _explain(self, odd: list[OddToken]) -> dict[str, tuple[bool, str]]:
        """By token, whether a near tie can explain it, and what there is to say. A collective."""
        margins = self._margins([token.sequence for token in odd], [token.place - 1 for token in odd])
        found: dict[str, tuple[bool, str]] = {}
        for token, (margin, layer) in zip(odd, margins, strict=True):
            explained = margin <= self._turned
            why = (
                f"a near tie of two experts in layer {layer} can explain it (margin {margin:.1g} of the scores, and rounding "
                f"turns up to {self._turned:.1g})"
                if explained
                else f"no near tie of experts can explain it (smallest margin {margin:.1g}, in layer {layer})"
            )
            found[token.sequence.name] = explained, f"engine and policy differ at {token}: {why}"
        return found

    def _margins(self, sequences: list[TrainSequence], places: list[int]) -> list[tuple[float, int]]:
        """Of the token at each place of a sequence, the smallest margin of all layers, and its layer. A collective."""
        batch = pack(sequences, self._processor)
        wanted = batch.cu_seqlens[:-1].long() + torch.tensor(places, dtype=torch.int64)
        own: list[dict[int, tuple[float, int]]] = [{}]

        def note(layer: int, chunk: Any, router: Any, given: tuple[Any, ...], _: Any) -> None:
            margin_N = router_margins(router, given[0])[chunk.real_rows].cpu()
            for number, token in enumerate(wanted.tolist()):
                for row in (chunk.real_tokens == token).nonzero().flatten().tolist():
                    best = own[0].get(number, (float("inf"), -1))
                    own[0][number] = min(best, (float(margin_N[row]), layer))

        hooks = [
            router.register_forward_hook(partial(note, layer, chunk))
            for chunk, layer, router in routers(self._policy.chunks)
        ]
        try:
            self._policy.logprobs([batch] * self._policy.plan.pp)
        finally:
            for hook in hooks:
                hook.remove()
        # rows are spread over the ranks of tensor and context parallelism, layers over stages, sequences over data ranks
        key = [sequence.name for sequence in sequences]
        everywhere = self._policy.ranks.gather({key[number]: best for number, best in own[0].items()})
        return [
            min((of_rank[name] for of_rank in everywhere if name in of_rank), default=(float("inf"), -1))
            for name in key
        ]


@torch.no_grad()
def router_margins(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[N] float64: k-th less (k+1)-th score of each row, over its largest |score|."""
    scores = router.gating(hidden).double().view(-1, router.config.num_moe_experts)
    if router.score_function == "sigmoid":
        scores = scores.sigmoid()
    if router.expert_bias is not None:
        scores = scores + router.expert_bias
    if router.topk >= scores.shape[1]:
        return torch.full_like(scores[:, 0], float("inf"))
    best = scores.topk(router.topk + 1, dim=1).values
    return (best[:, -2] - best[:, -1]) / scores.abs().amax(1).clamp(min=1e-30)


def _gaps(batch: MicroBatch, old_R: torch.Tensor | None) -> torch.Tensor | None:
    """[R] float64 nats, on the host; None where the rollouts came without log-probs."""
    if batch.rollout_logprobs is None or old_R is None:
        return None
    return (old_R.double().cpu() - batch.rollout_logprobs.double()).abs()


def _odd_tokens(
    members: Sequence[Sequence[TrainSequence]],
    batches: Sequence[MicroBatch],
    gaps: Sequence[torch.Tensor | None],
    bound: float,
) -> list[OddToken]:
    """The worst token of each sequence that has one above the bound; a few of them, the worst first."""
    found: list[OddToken] = []
    for sequences, batch, gap_R in zip(members, batches, gaps, strict=True):
        if gap_R is None:
            continue
        starts = batch.response_cu_seqlens.tolist()
        for sequence, start, end in zip(sequences, starts[:-1], starts[1:], strict=True):
            place = int(gap_R[start:end].argmax())
            if (gap := float(gap_R[start + place])) > bound:
                trained = sequence.trained.nonzero()[0]
                found.append(OddToken(gap=gap, sequence=sequence, place=int(trained[place])))
    return sorted(found, key=lambda token: token.gap, reverse=True)[:_FEW]
