"""FP8 on the way to servers that hold their weights so, and an audit that both sides mean the same layers.

`serving/served.py` says the format and which weights it is for. A tensor is quantised when it is whole, on the rank that
sends it, so that no block straddles a cut between the trainer's ranks; the server cuts blocks, not elements.

A server that gets a layer in another format than it holds does not say so: bytes are cast, scales without a place are
dropped. Hence the audit. SGLang's POST /weights_checker gives a checksum of every layer with block scales, whatever it
is asked to leave out (utils/weight_checker.py, the same in 0.5.21 to 0.5.23): asked to leave out all, it names just those.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as functional

from gspo_mm.config import Config
from gspo_mm.families.base import Family
from gspo_mm.families.operations import StackExperts
from gspo_mm.families.table import family_of
from gspo_mm.serving.admin import call_all
from gspo_mm.serving.served import BLOCK, SCALE, quantized_names, weight_map
from gspo_mm.serving.server import Server, ServerError

FP8 = torch.float8_e4m3fn

type Tensors = Iterable[tuple[str, torch.Tensor]]
type Layers = Mapping[str, tuple[str, ...]]  # Family.linear_layers

_LARGEST = torch.finfo(FP8).max  # 448
_TINY = 2.0**-100  # blocks without a larger element become 0: _LARGEST / amax must not overflow


def on_the_way(config: Config) -> Callable[[Tensors], Iterator[tuple[str, torch.Tensor]]]:
    """What happens to all (Hugging Face name, whole tensor) before they are sent to the servers of a run."""
    if not config.rollout.sglang.fp8:
        return iter
    family = family_of(config.model.path)
    return Quantizer(family, family.load_config(config.model.path))


class Quantizer:
    """Passes tensors on, those of `Family.linear_layers` in FP8 and each followed by its scales. Experts leave apart."""

    def __init__(self, family: Family, hf: Any) -> None:
        self._quantized = quantized_names(family, hf)
        entries = weight_map(family, hf)
        self._stacks = {entry.hf[0]: entry.op for entry in entries if isinstance(entry.op, StackExperts)}

    def __call__(self, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        for whole_name, whole in tensors:
            for name, tensor in self._apart(whole_name, whole):
                yield from self.one(name, tensor)

    def one(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A matrix, or anything else but stacked experts."""
        if name in self._quantized:
            weight, scales = quantize(tensor)
            yield name, weight
            yield name + SCALE, scales
        else:
            yield name, tensor

    def _apart(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        op = self._stacks.get(name)
        if op is None or op.together:
            yield name, tensor
            return
        yield from op.all_apart(name, tensor)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, C] -> float8_e4m3fn [R, C] and float32 scales [⌈R/128⌉, ⌈C/128⌉], which times the former are the weight.

    The operations are those of transformers' Fp8Quantize, in its order, for equal bits. Rows and columns missing in the
    last blocks count as zeros. A block of zeros has scale 1; NaN and infinity come out as NaN, never as a number.
    """
    rows, columns = weight.shape
    padded = functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    # [row blocks, 128, column blocks, 128]
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = blocks.abs().amax((1, 3))
    factors = torch.where(largest <= _TINY, 1.0, _LARGEST / largest)
    scaled = (blocks * factors[:, None, :, None]).clamp(-_LARGEST, _LARGEST)
    whole = scaled.flatten(2, 3).flatten(0, 1)
    return whole[:rows, :columns].to(FP8).contiguous(), 1.0 / factors


def audit(servers: list[Server], layers: Layers, sent: Collection[str], *, timeout: float) -> None:
    """Raise ServerError unless every server holds in FP8 the layers that were sent so, and no other.

    `sent`: Hugging Face's names of all tensors that were sent, scales included.
    """
    replies = call_all(servers, "/weights_checker", timeout=timeout, action="checksum", skip_tensor_list=[""])
    for server, reply in zip(servers, replies, strict=True):
        for rank in reply["ranks"]:
            audit_one(server.name, layers, sent, rank["checksums"].keys())


def audit_one(server: str, layers: Layers, sent: Collection[str], held: Collection[str]) -> None:
    """`held`: the server's names of the weights that it has scales for. Names are compared whole."""
    names = set(sent)
    scaled = {name for name in names if name + SCALE in names}
    of_server = {part: name for name, parts in layers.items() for part in parts}
    only_sent = sorted(name for name in scaled if of_server.get(name) not in held)
    only_held = sorted(name for name in held if not scaled.issuperset(layers.get(name, (name,))))
    if only_sent or only_held:
        sides = [f"{len(only_sent)} were sent so only, first {only_sent[0]}"] if only_sent else []
        sides += [f"{len(only_held)} are held so only, first {only_held[0]}"] if only_held else []
        raise ServerError(
            f"server {server} and trainer do not hold the same layers in FP8: {'; '.join(sides)}; see that "
            "rollout.sglang.fp8 is what the server was started with and that its sglang is supported"
        )
