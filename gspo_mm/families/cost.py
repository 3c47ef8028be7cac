"""What a micro-batch costs: the floating-point operations of the model as a polynomial in its sizes.

Used to balance work over data-parallel ranks (`balance.py`) and as the numerator of model-FLOPs utilisation (MFU).
The coefficients come from the family (`Family.flops`); here is only how they add up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from gspo_mm.types import MicroBatch


@dataclass(frozen=True, kw_only=True)
class FlopModel:
    """FLOPs of one pass, exact integers. A fresh one is the forward pass; `training()` makes the one of an update.

    Convention, as usual for MFU: a multiply-add is 2 FLOPs and only matrix products count. Left out: norms, softmax,
    rotary angles, activations, biases, the embedding look-up, the loss, the optimizer, and activation recomputation
    (a run with it does more work, not more useful work). Of a mixture of experts only the top-k chosen count, and
    the router's scores over all of them.

    Decoder attention is counted as a causal kernel has to do it: L * (L + 1) / 2 pairs of a query with a key it may
    see. Tables that say L * L / 2 leave out half the diagonal, those that say L * L count masked pairs too. Vision
    attention sees every pair of patches within a frame (an image is one frame).
    """

    token: int  # per token of a sequence: q, k, v and output projections, MLP or chosen experts, all layers
    router: int  # per token of a sequence: router scores, all mixture layers
    pair: int  # per causal pair of tokens: query . key and weight * value, all heads and layers without a window
    window_pair: int = (
        0  # as `pair`, of the layers in which a token sees itself and those before it, `window` in all
    )
    window: int = 0
    row: int  # per row that predicts a trained token: output layer
    patch_embedding: int = 0  # per image patch: the convolution that reads pixels
    patch: int = 0  # per image patch: q, k, v and output projections and MLP, all vision blocks
    patch_pair: int = 0  # per pair of patches of one frame: as `pair`, all vision blocks
    merged: int = 0  # per image token: the merger and every DeepStack merger
    patches_per_token: int = 1  # patches that are merged into one image token

    def pairs(self, length: int) -> int:
        """FLOPs of the decoder's attention for one sequence."""
        beyond = max(
            length - self.window, 0
        )  # tokens that a window does not reach back to, seen from the last one
        causal = length * (length + 1) // 2
        return self.pair * causal + self.window_pair * (causal - beyond * (beyond + 1) // 2)

    def sequence(self, length: int, rows: int) -> int:
        """FLOPs of one sequence of `length` tokens, image tokens included, of which `rows` are trained."""
        return (self.token + self.router) * length + self.pairs(length) + self.row * rows

    def image(self, patches: int) -> int:
        """FLOPs of the vision tower for one frame of `patches` patches; the decoder's share is in `sequence`."""
        return (
            (self.patch_embedding + self.patch) * patches
            + self.patch_pair * patches**2
            + self.merged * (patches // self.patches_per_token)
        )

    def count(self, lengths: Iterable[int], rows: int, image_patches: Iterable[int]) -> int:
        """FLOPs of sequences of these lengths with `rows` trained tokens in all, and of these distinct images."""
        decoder = sum(self.sequence(length, 0) for length in lengths) + self.row * rows
        return decoder + sum(map(self.image, image_patches))

    def of_batch(self, batch: MicroBatch) -> int:
        """FLOPs of a packed micro-batch, each distinct image once."""
        grids = [] if batch.image_grid_thw is None else batch.image_grid_thw.tolist()
        return self.count(
            (end - start for start, end in pairwise(batch.cu_seqlens.tolist())),
            batch.num_response_tokens,
            (h * w for t, h, w in grids for _ in range(t)),
        )

    def training(self, frozen: Collection[str] = ()) -> FlopModel:
        """FLOPs of forward and backward; `frozen` names parts as `policy.freeze` does.

        The backward pass of a matrix product with a weight is two products of the forward's size: one for the
        gradient of its input, one for the gradient of the weight. The second falls away where the weight is frozen,
        the first where nothing below is trained. Pixels need no gradient. Attention has no weights: always two.

        If "language" is frozen, a micro-batch without images has no backward pass at all; it is counted as if it
        had one, as a polynomial cannot know.
        """
        language = "language" not in frozen
        router = language and "router" not in frozen
        projector = "projector" not in frozen
        vision = "vision" not in frozen
        return replace(
            self,
            # the gradient of the decoder's input is always needed: by its embeddings, or by the image features
            token=self.token * (2 + language),
            router=self.router * (2 + router),
            pair=self.pair * 3,
            window_pair=self.window_pair * 3,
            row=self.row * (2 + language),
            # a merger begins with a norm, whose weights need the gradient of what follows
            merged=self.merged * (1 + projector + (projector or vision)),
            patch=self.patch * (3 if vision else 1),
            patch_pair=self.patch_pair * (3 if vision else 1),
            patch_embedding=self.patch_embedding * (2 if vision else 1),
        )


def matmul(inner: int, outer: int) -> int:
    """FLOPs of one row [inner] times a matrix [inner, outer]."""
    return 2 * inner * outer
