"""Tensors that files hold in another form than transformers keeps: matrices in FP8 blocks, experts one by one.

Both are how Qwen and DeepSeek publish their -FP8 checkpoints: `X.weight` float8_e4m3fn [R, C] and `X.weight_scale_inv`
[⌈R/128⌉, ⌈C/128⌉], of which each number times the 128 x 128 bytes of its block is the weight; and `experts.3.up_proj.weight`
where transformers has `experts.gate_up_proj` [E, 2F, D]. What was stored in FP8 is read as BF16.
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
from gspo_mm.hf.headers import FP8, Header, HfFolderError, fp8_block, read_headers

SCALE = "_scale_inv"  # of the scales' name, after that of the weight


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
        self.headers = self._without_scales() if self._block else dict(self._files)
        for entry in entries:
            if isinstance(entry.op, StackExperts) and entry.hf[0] not in self.headers:
                self._join_experts(entry.hf[0], entry.op, len(entry.megatron))

    def tensor(self, name: str) -> torch.Tensor:
        if name in self.apart:
            experts = self.apart[name]
            return torch.stack([torch.cat([self._read(part) for part in parts]) for parts in experts])
        return self._read(name)

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._from_file(name)
        if self._block and name + SCALE in self._files:
            return dequantize(tensor, self._from_file(name + SCALE), self._block)
        return tensor

    def _from_file(self, name: str) -> torch.Tensor:
        file = self._files[name].file
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file].get_tensor(self._name_in_file[name])

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
