"""What of a module a checkpoint holds."""

from __future__ import annotations

import torch


def held(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; what is shared, under its first name."""
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
    if buffers := dict(module.named_buffers()):
        kept = module.state_dict().keys()
        tensors |= {name: buffer for name, buffer in buffers.items() if name in kept}
    return tensors
