"""Did the weights arrive? Checksums of some tensors, taken when they are sent and asked of every server afterwards.

Only tensors that a server keeps whole and as they were sent can be compared (`Family.whole_tensor`): norms, routers, the
vision tower's patch embedding. They are spread over all parts of the model, so a part that was left out or sent under a
wrong name shows. The algorithms are those of SGLang's POST /weights_checker: the first 8 bytes of SHA-256 in host
memory, sums of mixed words on GPUs (sglang/kernels/ops/memory/gpu_tensor_hash.py).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as functional

from gspo_mm.families.base import Family
from gspo_mm.families.operations import Entry
from gspo_mm.serving.admin import call_all
from gspo_mm.serving.served import tensor_names
from gspo_mm.serving.server import Server, ServerError
from gspo_mm.types import GspoError

# by substring
_LEFT_OUT = [
    "experts",
    "qkv_proj",
    "o_proj",
    "attn.proj",
    "linear_fc",
    "embed_tokens",
    "pos_embed",
    "lm_head",
]


_32, _64 = 2**32 - 1, 2**64 - 1
_TILE = 8192  # words


class Checksums:
    """Collects names and checksums of what this rank sends."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self.names: list[str] = []  # Hugging Face's, of everything sent
        self.sent: dict[str, str] = {}  # by the server's name of the tensor

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """`name` is Hugging Face's."""
        self.names.append(name)
        if of_server := self._family.whole_tensor(name):
            self.sent[of_server] = checksum(tensor)

    def noted(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, noted as they pass."""
        for name, tensor in tensors:
            self.note(name, tensor)
            yield name, tensor


def compare(servers: list[Server], sent: dict[str, str], *, timeout: float) -> None:
    """Raise ServerError naming the first tensor that a server holds another value of than was `sent`."""
    replies = call_all(
        servers, "/weights_checker", timeout=timeout, action="checksum", skip_tensor_list=_LEFT_OUT
    )
    for server, reply in zip(servers, replies, strict=True):
        for rank in reply["ranks"]:
            compare_one(server.name, sent, rank["checksums"])


def check_complete(weight_map: list[Entry], sent: Iterable[str]) -> None:
    """Raise GspoError unless every tensor was sent once, experts one by one."""
    counts = Counter(sent)
    for name in tensor_names(weight_map):
        if counts[name] != 1:
            raise GspoError(
                f"a push of weights sent {name} {counts[name]} times; this is a defect, please report it"
            )


def compare_one(server: str, sent: dict[str, str], held: dict[str, str]) -> None:
    """Raise ServerError when `held` differs from `sent`, or when they have (almost) nothing in common."""
    common = sent.keys() & held.keys()
    wrong = sorted(name for name in common if sent[name] != held[name])
    if wrong:
        raise ServerError(
            f"server {server} holds other values of {len(wrong)} of {len(common)} compared tensors than were sent, "
            f"first {wrong[0]}"
        )
    missing = sorted(sent.keys() - held.keys())
    if missing:
        raise ServerError(
            f"server {server} has no tensor {missing[0]} ({len(missing)} of {len(sent)} missing)"
        )


def checksum(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits, as a server that holds the tensor on the same kind of device computes them."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if tensor.is_cuda:
        return f"{sum_of_mixed_words(data):016x}"
    return hashlib.sha256(memoryview(data.numpy())).hexdigest()[:16]


def sum_of_mixed_words(data: torch.Tensor) -> int:
    """64 bits of [N] uint8 bytes: two 32-bit hashes per tile of 8192 words, added up and mixed once more."""
    words = functional.pad(data, (0, -len(data) % 4)).view(torch.int32).long() & _32
    place = torch.arange(len(words), device=words.device)
    seed = 0x243F6A88
    halves = []
    for factor, offset, turn in (
        (0x27D4EB2D, seed, 15),
        (0x165667B1, (seed * 0x9E3779B1 ^ 0xDEADBEEF) & _32, 13),
    ):
        key = (place * factor + offset & _32) ^ (place << turn | place >> 32 - turn) & _32
        mixed = _mix(words ^ key)
        tiles = functional.pad(mixed, (0, -len(mixed) % _TILE)).view(-1, _TILE).sum(1)
        halves.append(_mix(tiles & _32 ^ 4 * len(words) & _32))
    total = (sum(halves[0].tolist()) << 32) + sum(halves[1].tolist()) & _64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        total = (total ^ total >> shift) * factor & _64
    return total ^ total >> 31


def _mix(words: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's last step for 32-bit words, which are held in int64."""
    words = (words ^ words >> 16) * 0x85EBCA6B & _32
    words = (words ^ words >> 13) * 0xC2B2AE35 & _32
    return words ^ words >> 16
