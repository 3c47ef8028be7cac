"""What a micro-batch keeps between forward and backward, in bytes for a token of a layer.

As Korthikanti et al. (2022, arXiv 2205.05198) count it, for layers of Transformer Engine with sequence parallelism: attention
keeps no scores, norms keep input and output, a mixture keeps what its experts were given. All of it is cut over tp: tokens
between the matrices, columns within them.
"""

from __future__ import annotations

from gspo_mm.plan.setup import Job

# of a layer's own tensors, gradients that live beside them in its backward
_BACKWARD = 0.5
# bytes of float32 logits in a chunk of loss/logprobs.py, and how often they live: logits, their exp, the slope's BF16 copy
CHUNK, _COPIES = 2**28, 2.5


def layer_bytes(job: Job, number: int) -> float:
    """Of a token in a decoder layer on one rank that recomputes nothing."""
    return _elements(job, number, norms=True) * job.policy.width / job.policy.sizes.tp


def kept_bytes(job: Job, number: int) -> float:
    """The same under `policy.recompute`."""
    match job.policy.recompute:
        case "none":
            return layer_bytes(job, number)
        case "selective":
            return _elements(job, number, norms=False) * job.policy.width / job.policy.sizes.tp
        case "full":
            return job.model.hidden * job.policy.width / job.policy.sizes.tp


def _elements(job: Job, number: int, *, norms: bool) -> float:
    """Numbers of a token. Without `norms`: outputs of norms and of the experts' activation are made again."""
    model = job.model
    hidden, queries, keys = model.hidden, model.queries, model.keys
    # input of both norms, which is the residual stream; and their outputs, which the matrices were given
    found = 2.0 * hidden + (2 * hidden if norms else 0)
    if model.linears[number]:
        it = model.linear
        assert it is not None
        # projections, what leaves the convolution, queries and keys of length 1, the answer before and behind its gate
        found += it.matrices + 2 * (2 * it.key + it.value) + 2 * it.value
    else:
        # as projected; queries and keys normed and turned; the answer, and beside it its gate's product
        found += 2 * queries * (1 + model.traits.gated) + 2 * keys + 2 * (queries + keys)
    if not model.mixtures[number]:
        return found + 3 * model.dense_ffn
    inner = 2 * model.expert_ffn + (model.expert_ffn if norms else 0)
    # rows as they arrive, gate and up, their weighed product; of rows that leave a map of their places is kept
    found += model.chosen * job.imbalance * (hidden + inner)
    return found + 3 * model.shared_ffn + 4 * model.experts


def decoder_bytes(job: Job, stage: int, layers: range, *, micro_batches: int) -> float:
    """Of all micro-batches that stage `stage` has under way at its busiest moment, and of the layer in backward."""
    sizes, tokens = job.policy.sizes, job.policy.micro_tokens / job.policy.sizes.cp
    kept = sum(kept_bytes(job, number) for number in layers) * tokens
    whole = max(layer_bytes(job, number) for number in layers) * tokens
    live = whole * ((1 if job.policy.recompute == "full" else 0) + _BACKWARD)
    return kept * under_way(sizes.pp, sizes.vpp, stage, micro_batches) + live


def under_way(pp: int, vpp: int, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds: pp - stage of them in 1F1B (Narayanan et al., 2021, arXiv 2104.04473).

    With vpp chunks a stage it warms up with 2 (pp - stage - 1) + (vpp - 1) pp of its chunks.
    """
    if vpp == 1:
        return min(pp - stage, micro_batches)
    return min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, micro_batches * vpp) / vpp


def head_bytes(job: Job) -> float:
    """Of log-probs on the last stage: hidden states of the answers' rows with their gradient, a chunk's logits, and the
    gradient of the output weight, summed up in float32 and rounded."""
    policy, sizes, lengths = job.policy, job.policy.sizes, job.work.lengths
    rows = policy.micro_tokens / sizes.cp * lengths.answer / lengths.sequence
    vocab = job.padded_vocab / sizes.tp
    logits = min(CHUNK, rows * vocab * 4) * _COPIES
    trained = "language" not in policy.frozen
    gradient = vocab * job.model.hidden * (4 + policy.width % 4) if trained else 0
    return 2 * rows * job.model.hidden * policy.width + logits + gradient


def vision_bytes(job: Job) -> float:
    """Of the tower on the first stage: pixels, blocks, and features kept from one pass to the next."""
    it, policy, lengths = job.model.vision, job.policy, job.work.lengths
    if it is None or not lengths.image:
        return 0.0
    # an image stands once in a micro-batch, however many answers to it do; at worst each sequence has its own
    images = max(1.0, policy.micro_tokens / lengths.sequence)
    patches = images * lengths.image * it.merge
    block = (10 * it.width + 2 * it.inner) * policy.width
    trains = {"vision", "projector"} - policy.frozen
    blocks = (
        1.0
        if "vision" not in trains
        else (1 + it.depth * (it.width / block * 2 if policy.recompute == "full" else 1))
    )
    features = images * lengths.image * it.out * policy.width * (1 + it.levels)
    return patches * it.patch * 4 + patches * block * blocks + 2 * features + policy.feature_cache
