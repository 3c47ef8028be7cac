"""Cases that run on the stand-in (tests/te) and, as they are, on a card (tests/gpu)."""

from __future__ import annotations

import torch

# the stand-in leaves torch.cuda.is_available() as it is
ON_CARD = torch.cuda.is_available()
DEVICE = "cuda" if ON_CARD else "cpu"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal; on a card, whose kernels add in no fixed order, nearly so."""
    if not ON_CARD:
        return torch.equal(a, b)
    return float((a - b).abs().max()) <= 0.02 * float(a.abs().max()) + 1e-6
