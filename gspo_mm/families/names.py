"""Names of tensors in published checkpoints, where they begin otherwise than transformers' own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prefixes:
    """Pairs (transformers' prefix, published prefix). A folder is read under both, and written under the published ones."""

    pairs: tuple[tuple[str, str], ...] = ()

    def published(self, name: str) -> str:
        """From transformers' name."""
        for ours, theirs in self.pairs:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def in_memory(self, name: str) -> str:
        """transformers' name, from either."""
        if name.startswith(tuple(ours for ours, _ in self.pairs)):
            return name
        for ours, theirs in self.pairs:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    def renamed(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors under published names."""
        for name, tensor in tensors:
            yield self.published(name), tensor
