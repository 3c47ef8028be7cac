"""Read a Hugging Face folder tensor by tensor.

A trap lies in fused experts. Published checkpoints store `gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D];
transformers keeps [E, 2F, D] and [E, D, F] in memory, and saves a model that it did not load in just that layout.
Everything inside the program is in transformers' in-memory layout; reading decides by dims against config.json and
refuses to guess. write.py writes.

E experts, D hidden, F inner size of an expert.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from gspo_mm.families.table import family_of
from gspo_mm.types import GspoError

type Layout = Literal["published", "transformers"]

INDEX = "model.safetensors.index.json"


class HfFolderError(GspoError, ValueError):
    """A Hugging Face folder that cannot be read or written."""


def read_hf(path: str | Path, experts_layout: str = "auto") -> HfFolder:
    """Open a folder. `experts_layout`: auto, published or transformers (see the module docstring).

    Raises HfFolderError when it has no safetensors, or when the layout cannot be told and is not given.
    """
    return HfFolder(Path(path), experts_layout)


class HfFolder:
    """The tensors of a folder in transformers' in-memory layout; iterating yields (name, tensor)."""

    def __init__(self, path: Path, experts_layout: str = "auto") -> None:
        self.path = path
        family = family_of(path)
        self._files = _locate(path)
        self.expert_shapes = family.expert_shapes(family.load_config(str(path)))
        self._handles: dict[Path, Any] = {}
        self.experts_layout: Layout | None = (
            self._decide_layout(experts_layout) if self.expert_shapes else None
        )

    def names(self) -> list[str]:
        return list(self._files)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor. Raises HfFolderError for a name that the folder does not have."""
        tensor = self._handle(name).get_tensor(name)
        if self.experts_layout == "published" and expert_kind(name) in self.expert_shapes:
            return tensor.transpose(1, 2)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._handle(name).get_slice(name).get_dtype()]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._files:
            yield name, self.tensor(name)

    def _handle(self, name: str) -> Any:
        if name not in self._files:
            raise HfFolderError(
                f"{self.path} has no tensor {name}; it is not the model that its config.json describes"
            )
        file = self._files[name]
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    def _decide_layout(self, wanted: str) -> Layout:
        """From the shape of every fused expert tensor: none may contradict, and one at least must tell."""
        found: set[Layout] = set()
        for name in self._files:
            shape = self.expert_shapes.get(expert_kind(name))
            if shape is None:
                continue
            on_disk = tuple(self._handle(name).get_slice(name).get_shape()[1:])
            if on_disk not in (shape, shape[::-1]):
                raise HfFolderError(
                    f"{self.path}: {name} is {on_disk} per expert but config.json makes it {shape[::-1]} or {shape}"
                )
            if shape[0] != shape[1]:
                found.add("transformers" if on_disk == shape else "published")
        if len(found) > 1:
            raise HfFolderError(f"{self.path} mixes both layouts of fused experts; save it again")
        if wanted != "auto":
            if found and wanted not in found:
                raise HfFolderError(
                    f"model.experts_layout={wanted} but the experts in {self.path} are in the {found.pop()} layout; "
                    "use auto"
                )
            return "published" if wanted == "published" else "transformers"
        if not found:
            raise HfFolderError(
                f"{self.path} has no fused experts ({' or '.join(self.expert_shapes)}) whose dims tell their layout; "
                "set model.experts_layout to published (checkpoints from the hub) or transformers (save_pretrained)"
            )
        return found.pop()


def expert_kind(name: str) -> str:
    """`gate_up_proj` or `down_proj` for a fused expert tensor, else something that is neither."""
    parent, _, last = name.rpartition(".")
    return last if parent.endswith(".experts") else ""


def _locate(path: Path) -> dict[str, Path]:
    """Tensor name -> file, in the order of the files."""
    if (path / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
        absent = sorted({f for f in weight_map.values() if not (path / f).is_file()})
        if absent:
            raise HfFolderError(f"{path} is incomplete: {absent[0]} is named in {INDEX} but not there")
        return {name: path / file for name, file in weight_map.items()}
    single = path / "model.safetensors"
    if not single.is_file():
        raise HfFolderError(f"{path} has no model.safetensors and no {INDEX}; download the weights first")
    with safe_open(single, framework="pt") as handle:
        return dict.fromkeys(handle.keys(), single)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
