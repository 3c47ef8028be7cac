"""Tensors that files hold in another form than transformers keeps: matrices in FP8 blocks or in MXFP4, experts one by one.

FP8 and experts one by one are how Qwen and DeepSeek publish their -FP8 checkpoints: `X.weight` float8_e4m3fn [R, C] and
`X.weight_scale_inv` [⌈R/128⌉, ⌈C/128⌉], of which each number times the 128 x 128 bytes of its block is the weight; and
`experts.3.up_proj.weight` where transformers has `experts.gate_up_proj` [E, 2F, D]. MXFP4 is how OpenAI publishes gpt-oss:
`X_blocks` uint8 [E, out, in/32, 16], each byte two numbers of four bits, the lower one first, and `X_scales` uint8
[E, out, in/32], powers of two for 32 numbers each; transformers' X is [E, in, out]. What was stored in either is read as BF16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gspo_mm.families.names import Prefixes
from gspo_mm.families.operations import Entry, StackExperts
from gspo_mm.hf.headers import BYTES, FP8, Header, HfFolderError, fp8_block, is_mxfp4, read_headers

SCALE = "_scale_inv"  # of the scales' name, after that of the weight
_BLOCKS, _SCALES = "_blocks", "_scales"  # of MXFP4's, likewise
_GROUP = 32  # numbers that share a scale


class Stored:
    """The tensors of a folder under transformers' names. `headers`: what they are once they are read."""

    def __init__(self, path: Path, entries: Iterable[Entry], prefixes: Prefixes) -> None:
        """`entries`: the family's weight map. Raises HfFolderError for scales or experts that are not complete."""
        self._path = path
        self._files: dict[str, Header] = {}
        self._name_in_file: dict[str, str] = {}  # by transformers' name
        for name, header in read_headers(path).items():
            if (ours := prefixes.in_memory(name)) in self._files:
                raise HfFolderError(
                    f"{path} holds one tensor under two names, {self._name_in_file[ours]} and {name}; take one out of the files"
                )
            self._files[ours], self._name_in_file[ours] = header, name
        self._block = fp8_block(path)
        self._handles: dict[Path, Any] = {}
        # fused tensor -> names of each expert's
        self.apart: dict[str, list[list[str]]] = {}
        # tensors in MXFP4, under transformers' names
        self._packed: set[str] = set()
        self.headers = self._without_scales() if self._block else dict(self._files)
        if is_mxfp4(path):
            self._note_packed()
        for entry in entries:
            op = entry.op
            if isinstance(op, StackExperts) and not op.together and entry.hf[0] not in self.headers:
                self._join_experts(entry.hf[0], op, len(entry.megatron))

    def tensor(self, name: str, expert: int | None = None) -> torch.Tensor:
        """With `expert` that one of a fused tensor, as [1, ...]."""
        if name in self.apart:
            experts = self.apart[name] if expert is None else [self.apart[name][expert]]
            return torch.stack([torch.cat([self._read(part) for part in parts]) for parts in experts])
        return self._read(name, expert)

    def close(self) -> None:
        """Give back the memory that files are mapped to; they are opened again where they are needed."""
        self._handles.clear()

    def _read(self, name: str, expert: int | None = None) -> torch.Tensor:
        if name in self._packed:
            return unpack(self._from_file(name + _BLOCKS, expert), self._from_file(name + _SCALES, expert))
        tensor = self._from_file(name, expert)
        if self._block and name + SCALE in self._files:
            return dequantize(tensor, self._from_file(name + SCALE), self._block)
        return tensor

    def _from_file(self, name: str, expert: int | None = None) -> torch.Tensor:
        file = self._files[name].file
        handle = self._handles.get(file)
        if handle is None:
            handle = self._handles[file] = safe_open(file, framework="pt")
        if expert is None:
            return handle.get_tensor(self._name_in_file[name])
        return handle.get_slice(self._name_in_file[name])[expert : expert + 1]

    def _without_scales(self) -> dict[str, Header]:
        """Headers of what is read: FP8 as BF16, its scales left out."""
        found = dict(self._files)
        for name, header in self._files.items():
            if header.dtype != FP8:
                continue
            scales = found.pop(name + SCALE, None)
            if scales is None:
                raise HfFolderError(
                    f"{self._path}: {name} is in FP8 but no file holds its scales, {name}{SCALE}; download or copy the "
                    "folder again, whole"
                )
            assert self._block
            blocks = tuple(-(-size // block) for size, block in zip(header.shape, self._block, strict=False))
            if len(header.shape) != 2 or scales.shape != blocks:
                raise HfFolderError(
                    f"{self._path}: {name} is {header.shape} and its scales {scales.shape}, but blocks of {self._block} "
                    f"(weight_block_size of config.json) make them {blocks}; use the config.json of these weights"
                )
            found[name] = replace(header, dtype="BF16")
        return found

    def _note_packed(self) -> None:
        """Put the headers of what is read, BF16, in place of those of blocks and scales."""
        for name, header in self._files.items():
            if header.dtype != BYTES or name.endswith(_SCALES):
                continue
            whole = name.removesuffix(_BLOCKS)
            scales = self._files.get(whole + _SCALES)
            if whole == name or scales is None:
                raise HfFolderError(
                    f"{self._path}: {name} holds bytes, but no file holds its scales, {whole}{_SCALES}; download or copy the "
                    "folder again, whole"
                )
            if len(header.shape) != 4 or header.shape != (*scales.shape, _GROUP // 2):
                raise HfFolderError(
                    f"{self._path}: {name} is {header.shape} and its scales {scales.shape}, which is not MXFP4 in groups of "
                    f"{_GROUP}; download or copy the folder again, whole"
                )
            experts, rows, groups, _ = header.shape
            del self.headers[name], self.headers[whole + _SCALES]
            self.headers[whole] = replace(header, dtype="BF16", shape=(experts, groups * _GROUP, rows))
            self._packed.add(whole)

    def _join_experts(self, fused: str, op: StackExperts, count: int) -> None:
        """Note how a fused tensor is made, where a layer's experts are stored one by one."""
        experts = [op.names_apart(fused, expert) for expert in range(count)]
        names = [name for parts in experts for name in parts]
        missing = [name for name in names if name not in self.headers]
        if len(missing) == len(names):
            return
        if missing:
            raise HfFolderError(
                f"{self._path} lacks {missing[0]}, one of {len(missing)} matrices of experts that are not there while "
                f"{len(names) - len(missing)} of their layer are; download or copy it again, or use the config.json of "
                "these weights"
            )
        headers = [self.headers.pop(name) for name in names]
        if odd := next((n for n, h in zip(names, headers, strict=True) if h.shape != headers[0].shape), None):
            raise HfFolderError(
                f"{self._path}: {odd} has another shape than {names[0]}; save the experts of a layer alike"
            )
        rows, columns = headers[0].shape
        self.apart[fused] = experts
        self.headers[fused] = replace(headers[0], shape=(count, rows * len(experts[0]), columns))


def dequantize(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """float8_e4m3fn [R, C] and scales [⌈R/block⌉, ⌈C/block⌉] -> BF16 [R, C], rounded once."""
    rows, columns = weight.shape
    whole = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    return (weight.float() * whole).bfloat16()


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4's blocks uint8 [E, R, G, 16] and scales uint8 [E, R, G] -> BF16 [E, 32*G, R], exactly.

    Four bits are a sign, two of exponent and one of mantissa; eight are an exponent, 127 more than it (OCP Microscaling
    Formats 1.0).
    """
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.bfloat16)
    numbers = torch.cat([magnitudes, -magnitudes])
    pairs = torch.stack([numbers[(blocks & 15).int()], numbers[(blocks >> 4).int()]], -1).flatten(-2)
    return torch.ldexp(pairs, scales.int()[..., None] - 127).bfloat16().flatten(-2).transpose(1, 2)
