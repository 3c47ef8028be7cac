"""Seconds of sampling. Decoding reads all weights and the cache of every answer for each token: memory decides (roofline of
Williams et al., 2009), until batches are so large that products do.

Answers are of very different length. With mean m and limit M the share of those longer than t is taken as (1 - t/M)^a with
a = M/m - 1: its mean is m, for m near M most are cut off, for m far below it few are long. So the last answers of a batch, which
a synchronous step waits for, are decoded by nearly empty servers.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_mm.plan.serving import layer_cache_bytes, served_bytes, server_capacity, state_bytes
from gspo_mm.plan.setup import Job, Lengths, Servers

_INTERVALS = 100


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Seconds for the answers of one step."""

    # all of them, from the first prompt to the end of the longest answer
    in_turn: float
    # with servers that are always full
    steady: float
    # of these, prompts
    prefill: float
    # after the push, of answers that go on: their cache is computed again
    again: float
    # answers decoded at once by a server that is full, and whether the cache or the batch limits them
    at_once: int
    limit: str

    def seconds(self, *, overlaps: bool) -> float:
        """That servers need for a step: all answers in turn, or as many as are taken from them where they go on."""
        return self.steady + self.again if overlaps else self.in_turn


def rollout_of(job: Job) -> Rollout:
    """Servers whose cache holds no answer take for ever."""
    servers, work = job.servers, job.work
    assert servers is not None
    capacity = server_capacity(job, servers)
    own = work.answers / servers.number
    asked = work.in_flight * work.group / servers.number
    wanted = asked if work.staleness else min(own, asked)
    at_once = max(1.0, min(wanted, capacity.answers))
    shape = Shape(work.lengths)
    prefill = _prefill(job, servers, work.prompts / servers.number)
    if not capacity.answers:
        return Rollout(
            in_turn=float("inf"), steady=float("inf"), prefill=prefill, again=0.0, at_once=0, limit="memory"
        )
    decoder = Decoder(job, servers)
    full = decoder.seconds(at_once, shape.prompt + shape.middle) / at_once  # for each token
    steady = own * work.lengths.answer * full + prefill
    waiting = max(0.0, own - at_once) * work.lengths.answer * full
    return Rollout(
        in_turn=waiting + decoder.tail(shape, min(own, at_once)) + prefill,
        steady=steady,
        prefill=prefill,
        again=_again(job, servers, at_once, shape),
        at_once=int(at_once),
        limit="cache" if capacity.answers < wanted else "batch",
    )


class Shape:
    """How long answers are."""

    def __init__(self, lengths: Lengths) -> None:
        self.prompt, self._limit = lengths.prompt, lengths.longest
        self._power = max(0.0, lengths.longest / lengths.answer - 1)

    def longer(self, tokens: float) -> float:
        """Share of answers with more tokens."""
        return max(0.0, 1 - tokens / self._limit) ** self._power

    def longest(self, answers: float) -> float:
        """Of so many, in the middle of cases: 1 - 1/answers are shorter."""
        return self._limit * (1 - answers ** (-1 / self._power)) if self._power > 1e-6 else self._limit

    @property
    def middle(self) -> float:
        """Tokens that an answer under way has at a time picked at random."""
        return self._limit / (self._power + 2)


class Decoder:
    """Seconds of a token on one server."""

    def __init__(self, job: Job, servers: Servers) -> None:
        model, gpu, share = job.model, job.gpu, job.efficiency
        self._model, self._servers = model, servers
        self._whole = served_bytes(model, servers)
        width = 1 if servers.fp8 else 2
        self._experts = sum(model.mixtures) * 3 * model.hidden * model.expert_ffn * model.experts * width
        self._cache, self._state = layer_cache_bytes(model, servers), state_bytes(model, servers)
        self._bandwidth = gpu.bandwidth * share.decode
        self._peak = gpu.peak(fp8=servers.fp8) * share.products
        wait = 2 * job.latency(servers.tp) if servers.tp > 1 else 0.0
        self._launches = share.decode_step + model.layers * (share.decode_layer + wait)

    def seconds(self, batch: float, context: float) -> float:
        """For each of `batch` answers, with `context` tokens before it."""
        model, servers = self._model, self._servers
        read = self._weights(batch) / servers.tp
        # data-parallel attention: each group of GPUs has its part of the answers
        seen = model.seen(context)
        read += batch / servers.dp * (seen * self._cache + 2 * self._state)
        flops = batch * (model.flops_token + model.flops_row + model.flops_pair * seen) / servers.tp
        return max(read / self._bandwidth, flops / self._peak) + self._launches

    def _weights(self, batch: float) -> float:
        """Bytes that a step touches: of E experts, each chosen with K/E, those that some answer chose."""
        if not self._model.experts:
            return self._whole
        return self._whole - self._experts * (1 - self._model.chosen / self._model.experts) ** batch

    def tail(self, shape: Shape, batch: float) -> float:
        """Until `batch` answers that started together have ended: the batch shrinks as they do."""
        end = shape.longest(batch * self._servers.number)
        width = end / _INTERVALS
        return sum(
            width * self.seconds(max(1.0, batch * shape.longer(done)), shape.prompt + done)
            for done in ((number + 0.5) * width for number in range(_INTERVALS))
        )


def _prefill(job: Job, servers: Servers, prompts: float) -> float:
    """Seconds for prompts on one server, each once for its group, with their images."""
    model, lengths, gpu = job.model, job.work.lengths, job.gpu
    peak = gpu.peak(fp8=servers.fp8) * job.efficiency.products
    flops = lengths.prompt * model.flops_token + model.pairs(lengths.prompt) * model.flops_pair
    return prompts * (flops + model.flops_image(lengths.image)) / (peak * servers.tp)


def _again(job: Job, servers: Servers, batch: float, shape: Shape) -> float:
    """Seconds to compute the cache of answers under way, rollout.on_update=retract."""
    tokens = shape.middle + job.work.lengths.prompt / job.work.group
    peak = job.gpu.peak(fp8=servers.fp8) * job.efficiency.products
    return batch * tokens * job.model.flops_token / (peak * servers.tp)
